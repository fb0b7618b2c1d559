"""ONNX Runtime on a GPU: a session of its CPU provider on the fake GPU's stream (see fake_gpu)."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import fake_gpu
import numpy as np
import pytest
from fake_gpu import CudaError, FakeCuda

onnxruntime = pytest.importorskip("onnxruntime")
from ddpm_edge import Bundle, Generator
from ddpm_edge.errors import ClosedError, EngineError
from ddpm_edge.runtimes.base import gpu_engine
from ddpm_edge.runtimes.onnx_runtime import CUDA, OnnxRuntimeEngine

MODEL = Bundle.open().model()[1]
REAL = onnxruntime.InferenceSession


class Binding:
    """An IOBinding that takes addresses of the fake GPU, as they are the host's."""

    def __init__(self, session: Any) -> None:
        self.real = session.io_binding()
        self.bind_input = self._bind(self.real.bind_input)
        self.bind_output = self._bind(self.real.bind_output)

    def _bind(self, bind: Any) -> Any:
        def bound(name: str, kind: str, number: int, dtype: Any, shape: Any, at: int) -> None:
            assert (kind, number) == ("cuda", 0)
            bind(name, "cpu", 0, dtype, shape, at)

        return bound


class Session:
    """What a session on CUDA does, as far as it is used."""

    def __init__(self, machine: Machine, options: dict[str, str], model: Any) -> None:
        self.machine, self.options = machine, options
        self.real = REAL(model, providers=["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs = self.real.get_inputs, self.real.get_outputs

    def get_providers(self) -> list[str]:
        return [CUDA, "CPUExecutionProvider"]

    def io_binding(self) -> Binding:
        return Binding(self.real)

    def run_with_iobinding(self, binding: Binding, options: Any) -> None:
        self.machine.runs += 1
        if self.machine.fail is not None:
            raise self.machine.fail
        plain = onnxruntime.RunOptions()
        stream = int(self.options["user_compute_stream"])
        self.machine.cuda.queue(stream, lambda: self.real.run_with_iobinding(binding.real, plain))
        self.machine.cuda.cudaStreamSynchronize(stream)


class Machine:
    """A machine with onnxruntime-gpu."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.fail, self.runs = cuda, None, 0
        self.needs_the_cpu = False  # a node of the model
        self.opened: list[dict[str, str]] = []

    def session(self, model: Any, options: Any, providers: Any, enable_fallback: int) -> Any:
        if isinstance(providers[0], str):
            return REAL(model, options, providers)
        (_, own), *rest = providers
        if not rest:  # as ONNX Runtime refuses both, the flag and the CPU by name
            assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
            if self.needs_the_cpu:
                raise RuntimeError("nodes that are assigned to the default CPU EP")
        self.opened.append(own)
        return Session(self, own, model)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    fake = Machine(fake_gpu.install(monkeypatch).cuda)
    both = [CUDA, "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    monkeypatch.setattr(onnxruntime, "InferenceSession", fake.session)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    return fake


@pytest.fixture
def generator(machine: Machine) -> Iterator[Generator]:
    with Generator.load(runtime="onnxruntime", device="cuda") as generator:
        yield generator


CALL: dict[str, Any] = {"label": [1, None, 5], "guidance": 2.0, "seed": 3, "steps": 5}


def test_images_are_those_of_the_cpu(generator: Generator, machine: Machine) -> None:
    result = generator.run(3, dtype="float32", **CALL)
    assert (result.runtime, result.loop) == ("onnxruntime on cuda:0", "device")
    with Generator(Bundle.open(), OnnxRuntimeEngine(MODEL, "cpu"), "fp32") as on_cpu:
        theirs = on_cpu.sample(3, dtype="float32", **CALL)
    np.testing.assert_allclose(result.images, theirs, atol=1e-5)  # it asks about 6, not about 5
    assert machine.runs == 5
    (options,) = machine.opened
    assert set(options) == {"device_id", "use_tf32", "user_compute_stream"}
    assert "cudaStreamBeginCapture" not in machine.cuda.calls  # a replay would not be right


def test_a_failure_is_an_error(generator: Generator, machine: Machine) -> None:
    machine.fail = RuntimeError("it broke")  # type: ignore[assignment]
    with pytest.raises(EngineError, match="it broke"):
        generator.sample(1, seed=0, steps=2)
    machine.fail = None
    assert len(generator.sample(1, seed=0, steps=2)) == 1


def test_without_cuda_bindings_the_loop_runs_on_the_host(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.cuda.fail["cudaStreamCreateWithFlags"] = CudaError.cudaErrorNoDevice
    with caplog.at_level(logging.INFO, "ddpm_edge"), OnnxRuntimeEngine(MODEL, "cuda") as engine:
        assert gpu_engine(engine) is None
        assert engine.device == "cuda:0"
        assert engine.concurrent
    assert "arrays do not stay on the GPU: CUDA does not work" in caplog.text


def test_a_model_that_needs_the_cpu_runs_with_the_loop_on_the_host(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    """What the CPU reads of a bound input is a copy of when it was bound."""
    machine.needs_the_cpu = True
    with caplog.at_level(logging.INFO, "ddpm_edge"), OnnxRuntimeEngine(MODEL, "cuda") as engine:
        assert (engine.device, gpu_engine(engine)) == ("cuda:0", None)
    assert "arrays do not stay on the GPU: ONNX Runtime cannot load the model: nodes" in caplog.text
    assert not machine.cuda.streams


def test_what_nobody_closed_is_freed(machine: Machine) -> None:
    generator = Generator.load(runtime="onnxruntime", device="cuda")
    generator.sample(1, seed=0, steps=2)
    steps = generator.stream(1, seed=0, steps=3)
    del generator
    assert len(list(steps)) == 3  # as long as something of it is at work it goes on
    del steps
    gc.collect()
    cuda = machine.cuda
    assert not any([cuda.streams, cuda.events, cuda.modules])
    assert not any(cuda.blocks.values())


def test_closing_frees_the_stream(machine: Machine) -> None:
    engine = OnnxRuntimeEngine(MODEL, "cuda")
    assert not engine.concurrent  # all calls are on one stream
    resident = engine.resident(1, {})
    session = weakref.ref(engine._session.real._sess)
    engine.close()
    engine.close()
    assert not machine.cuda.streams
    assert session() is None  # else it would be freed after its stream
    for call in (resident, lambda: engine.resident(1, {})):
        with pytest.raises(ClosedError):
            call()
