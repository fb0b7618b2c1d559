"""Engines: the ONNX Runtime adapter and the choice of a runtime."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import ToyEngine

from ddpm_edge.bundle import BUILT_IN
from ddpm_edge.errors import (
    ClosedError,
    ConfigError,
    EngineError,
    EngineLostError,
    RuntimeUnavailableError,
)
from ddpm_edge.runtimes import Engine, onnx_runtime, open_engine, select
from ddpm_edge.runtimes.base import TensorSpec, check_inputs

onnxruntime = pytest.importorskip("onnxruntime")

MODEL = BUILT_IN / "unet.onnx"


def arrays(batch: int = 2, **changes: Any) -> dict[str, np.ndarray]:
    usual = {
        "x": np.zeros((batch, 1, 28, 28), np.float32),
        "t": np.zeros(batch, np.int64),
        "label": np.zeros(batch, np.int64),
    }
    return {name: array for name, array in (usual | changes).items() if array is not None}


@pytest.fixture(scope="module")
def engine() -> Any:
    with open_engine(MODEL, device="cpu", threads=1) as opened:
        yield opened


def test_lifecycle(engine: Engine) -> None:
    assert (engine.runtime, engine.device, engine.concurrent) == ("onnxruntime", "cpu", True)
    assert {name: str(spec) for name, spec in engine.inputs.items()} == {
        "x": "float32 (any, 1, 28, 28)",
        "t": "int64 (any)",
        "label": "int64 (any)",
    }
    opened = open_engine(MODEL.read_bytes())
    opened.close()
    opened.close()
    with pytest.raises(ClosedError, match="the engine was closed"):
        opened(arrays())


def test_outputs_are_the_caller_s(engine: Engine) -> None:
    first = engine(arrays())["prediction"]
    kept = first.copy()
    engine(arrays(x=np.ones((2, 1, 28, 28), np.float32)))
    assert first.shape == (2, 1, 28, 28)
    assert first.dtype == np.float32
    assert (first == kept).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": None}, "takes inputs x, t, label; got t, label"),
        ({"y": np.zeros(2)}, "got x, t, label, y"),
        ({"x": np.zeros((2, 1, 28, 28))}, r"'x' must be float32 \(any, 1, 28, 28\); got float64"),
        ({"x": np.zeros((2, 3, 28, 28), np.float32)}, r"got float32 \(2, 3, 28, 28\)"),
        ({"x": np.zeros((2, 784), np.float32)}, r"got float32 \(2, 784\)"),
        ({"t": np.zeros(2, np.int32)}, r"'t' must be int64 \(any\); got int32"),
        ({"t": np.zeros(3, np.int64)}, "same batch size >= 1; got {'x': 2, 't': 3, 'label': 2}"),
    ],
)
def test_inputs_that_do_not_fit(engine: Engine, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        engine(arrays(**changes))


def test_no_batch_at_all(engine: Engine) -> None:
    with pytest.raises(EngineError, match="same batch size >= 1"):
        engine(arrays(0))


@pytest.mark.parametrize("model", [b"", b"not a model", b"\x08\x08"])
def test_models_that_do_not_load(model: bytes) -> None:
    with pytest.raises(EngineError, match="ONNX Runtime cannot load the model"):
        open_engine(model)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"the model cannot be loaded: .*none.onnx"):
        open_engine(tmp_path / "none.onnx")


@pytest.mark.parametrize("threads", [0, -1, True, 1.0, 2**40])
def test_threads(threads: Any) -> None:
    with pytest.raises(ConfigError, match="threads must be a whole number [<>]= 1"):
        open_engine(MODEL, threads=threads)


def test_a_device_asked_for_by_name_runs_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(RuntimeUnavailableError, match=r"has only .*CPU.*use device='cpu'"):
            open_engine(MODEL, device="cuda")
    # onnxruntime-gpu lists CUDA without a GPU, and its session then runs on the CPU
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda model, options, providers, enable_fallback: real(model, options, both[1:]),
    )
    with pytest.raises(RuntimeUnavailableError, match="'cuda:0' was asked for, but .* runs on CPU"):
        open_engine(MODEL, device="cuda:0")
    with open_engine(MODEL) as engine:  # not asked for by name: the CPU it is, and it says so
        assert engine.device == "cpu"


def test_a_gpu_that_fails_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    real = onnxruntime.InferenceSession

    def session(model: Any, options: Any, providers: list[Any], enable_fallback: int) -> Any:
        assert not enable_fallback  # ONNX Runtime's own prints to stdout
        if len(providers) > 1:
            raise RuntimeError("CUDA failure 35: CUDA driver version is insufficient")
        return real(model, options, providers)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with pytest.raises(EngineError, match="cannot load the model: CUDA failure 35"):
        open_engine(MODEL, device="cuda")
    with open_engine(MODEL) as engine:
        assert engine.device == "cpu"
    assert "cannot use the GPU (CUDA failure 35" in caplog.text
    assert capfd.readouterr() == ("", "")


def test_auto_takes_the_first_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Engine:
        raise RuntimeUnavailableError("no such thing here")

    toy = ToyEngine()
    monkeypatch.setattr(select, "RUNTIMES", {"a": missing, "b": lambda *_: toy, "c": missing})
    assert open_engine(b"") is toy
    with pytest.raises(RuntimeUnavailableError, match="no such thing here"):
        open_engine(b"", runtime="a")
    with pytest.raises(RuntimeUnavailableError, match="unknown runtime 'd'; runtimes are auto, a"):
        open_engine(b"", runtime="d")


def test_check_inputs_agrees_with_the_toy() -> None:
    toy = ToyEngine()
    check_inputs(toy.inputs, arrays())


# Interrupts: a signal reaches Python only between two instructions of the main thread


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = x, float32 (any, 512), in a thousand products: microseconds a row, minutes for many."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    size, count = 512, 1000
    names = ["x", *(f"x{i}" for i in range(1, count)), "y"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", [names[i], "w"], [names[i + 1]]) for i in range(count)],
        "slow",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", size])],
        [numpy_helper.from_array(np.eye(size, dtype=np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path = tmp_path_factory.mktemp("slow") / "slow.onnx"
    onnx.save(model, path)
    return path


INTERRUPTED = """
import signal, sys, threading
import numpy as np
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs begin with it ignored
from ddpm_edge.runtimes import open_engine

engine = open_engine(sys.argv[1], device="cpu")
warm, before = "warm" in sys.argv, threading.active_count()
few, many = np.ones((1, 512), np.float32), np.ones((16384, 512), np.float32)
if warm:  # the adapter knows its pace, not how long a larger batch takes
    engine({"x": few})
print("running", flush=True)
try:
    engine({"x": many})
except KeyboardInterrupt:
    assert (engine({"x": few})["y"] == few).all()
    assert threading.active_count() == before
    print("interrupted, and usable", flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize("state", ["fresh", "warm"])
def test_ctrl_c_ends_a_long_call(slow_model: Path, state: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, slow_model, state], stdout=-1, stderr=-1, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "running\n"
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=20)  # the call takes a minute and more
    finally:
        child.kill()
    assert (out, err) == ("interrupted, and usable\n", "")


def test_only_the_main_thread_s_slow_calls_are_handed_to_another(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed = []

    def run(session: Any, names: list[str], feed: Mapping[str, np.ndarray]) -> Any:
        handed.append(len(feed["x"]))
        return session.run(names, feed)

    monkeypatch.setattr(onnx_runtime, "_run_interruptibly", run)
    monkeypatch.setattr(engine, "_seconds_a_sample", onnx_runtime.SLOW_SECONDS / 2)
    engine(arrays(3))
    assert handed == [3]
    for seconds, batch in [(onnx_runtime.SLOW_SECONDS / 2, 1), (1e-9, 3)]:
        monkeypatch.setattr(engine, "_seconds_a_sample", seconds)
        engine(arrays(batch))
    monkeypatch.setattr(engine, "_seconds_a_sample", 60.0)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(engine, arrays(3)).result()
    assert handed == [3]


def test_a_program_may_sample_while_it_ends() -> None:
    code = (
        "import atexit\nfrom ddpm_edge import Generator\ngenerator = Generator.load(device='cpu')\n"
        "atexit.register(lambda: print(generator.sample(1, steps=1).shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("(1, 28, 28, 1)\n", "")


# Failures


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6 : RUNTIME_EXCEPTION : Non-zero status code: std::bad_alloc", MemoryError),
        ("1 : FAIL : Failed to allocate memory for requested buffer of size 513", MemoryError),
        ("1 : FAIL : Non-zero status code", EngineError),
        ("1 : FAIL : CUDA failure 700: an illegal memory access", EngineLostError),
    ],
)
def test_failed_runs(
    engine: Any, monkeypatch: pytest.MonkeyPatch, text: str, expected: type, slow: bool
) -> None:
    class Failing:
        def run(self, *_: Any) -> Any:
            raise Exception(text)  # the nearest common base of ONNX Runtime's own

    monkeypatch.setattr(engine, "_session", Failing())
    monkeypatch.setattr(engine, "_seconds_a_sample", 60.0 if slow else 0.0)
    with pytest.raises(expected, match="ONNX Runtime.*" + text.rpartition(" : ")[2]):
        engine(arrays())


def test_onnxruntime_reports_nothing(tmp_path: Path) -> None:
    """From 1.32 on it writes a number for this device to the user's cache when it is imported."""
    program = "from ddpm_edge import Generator\nGenerator.load().sample(1, steps=1)"
    environment = os.environ | {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "c")}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)
    assert not [path for path in tmp_path.rglob("*") if "icrosoft" in str(path)]


LIMITED = """
import resource
from ddpm_edge import Generator
from ddpm_edge.errors import OutOfMemoryError

generator = Generator.load(device="cpu")
expected = generator.sample(1, seed=0, steps=2)
_, most = resource.getrlimit(resource.RLIMIT_AS)
# too much for ONNX Runtime, whose arena then has all that was left; for the draws, of 299 MB
for batch, megabytes in ((512, 300), (100_000, 100)):
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    try:
        generator.sample(batch, batch=batch, steps=2, seed=0)
    except OutOfMemoryError as error:
        assert isinstance(error, MemoryError)
        print(error)
    assert (generator.sample(1, seed=0, steps=2) == expected).all()
print("usable")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory as Linux does")
def test_too_little_memory_leaves_the_generator_usable() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    runtimes, numpys, last = done.stdout.splitlines()
    assert "not enough memory for 512 samples at once (ONNX Runtime: " in runtimes
    assert "not enough memory for 100000 samples at once (Unable to allocate 299. MiB" in numpys
    assert "give a smaller batch=" in runtimes
    assert last == "usable"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="sends SIGALRM")
def test_what_a_signal_handler_raises_passes_through(engine: Any) -> None:
    class StopNowError(Exception):
        pass

    def handler(*_: Any) -> None:
        raise StopNowError

    usual = signal.signal(signal.SIGALRM, handler)
    engine(arrays())  # so that the next call is known to be long
    try:
        engine._seconds_a_sample = 60.0
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(StopNowError):
            engine(arrays(600))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)
    assert engine(arrays())["prediction"].shape[0] == len(arrays()["x"])


def bound_to_the_cpu(engine: Any) -> onnx_runtime.Bound:
    return onnx_runtime.Bound(engine._session, engine.outputs, 0, "cpu")


def test_bound_inputs_and_outputs(engine: Engine) -> None:
    """What runs on CUDA, with the CPU as the device."""
    bound, options = bound_to_the_cpu(engine), onnx_runtime._run_options()
    rng, kept = np.random.default_rng(0), []
    for batch in (2, 2, 5, 1, 2):
        x = rng.standard_normal((batch, 1, 28, 28)).astype(np.float32)
        strided = np.repeat(x, 2, axis=3)[..., ::2]  # not contiguous
        inputs = arrays(batch, x=strided)
        (got,) = bound.run(inputs, batch, options)
        kept.append((got, engine(inputs)["prediction"]))
    for got, expected in kept:  # no answer is overwritten by a later one
        np.testing.assert_array_equal(got, expected)


def test_bound_inputs_are_bound_again_when_they_change() -> None:
    """ONNX Runtime copies what the CPU needs of an input when it is bound, not when it runs."""

    class Binding:
        def __init__(self) -> None:
            self.copies: dict[str, np.ndarray] = {}

        def bind_ortvalue_input(self, name: str, value: Any) -> None:
            self.copies[name] = np.copy(value.numpy())

        def bind_ortvalue_output(self, name: str, value: Any) -> None:
            self.output = value

    def run(binding: Binding, options: Any) -> None:
        binding.output.update_inplace(binding.copies["x"] + 1)

    session = SimpleNamespace(io_binding=Binding, run_with_iobinding=run)
    specs = {"prediction": TensorSpec((None, 2), np.dtype(np.float32))}
    bound = onnx_runtime.Bound(session, specs, 0, "cpu")
    for value in (1.0, 5.0):
        (answer,) = bound.run({"x": np.full((3, 2), value, np.float32)}, 3, None)
        assert (answer == value + 1).all()


def test_bound_arrays_are_each_threads_own(engine: Engine) -> None:
    bound, options = bound_to_the_cpu(engine), onnx_runtime._run_options()

    def run(seed: int) -> bool:
        x = np.random.default_rng(seed).standard_normal((2, 1, 28, 28)).astype(np.float32)
        (got,) = bound.run(arrays(2, x=x), 2, options)
        return bool((got == engine(arrays(2, x=x))["prediction"]).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(24)))
