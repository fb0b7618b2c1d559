"""The TensorRT adapter, building and the cache's use, on a GPU of NumPy arrays (see fake_gpu)."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_gpu
import numpy as np
import pytest
from click.testing import CliRunner
from fake_gpu import CudaError, FakeTensorRT, Severity

pytest.importorskip("onnxruntime")
from ddpm_edge import Bundle, Generator
from ddpm_edge.bench import bench
from ddpm_edge.build import BuildOptions, build
from ddpm_edge.cli import main
from ddpm_edge.errors import (
    BuildError,
    CacheWarning,
    ClosedError,
    ConfigError,
    EngineError,
    EngineLostError,
    EngineMissingError,
    OutOfMemoryError,
    RuntimeUnavailableError,
)
from ddpm_edge.export.to_tensorrt import Profile, build_engine
from ddpm_edge.runtimes import cuda
from ddpm_edge.runtimes.flavour import Flavour, flavour_for
from ddpm_edge.runtimes.trt import TensorRTEngine
from ddpm_edge.samplers import SAMPLERS

SAMPLER_NAMES = sorted(set(SAMPLERS) - {"euler"})  # which is of rectified flow


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DDPM_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["device", "host", "host, integrated"])
def generator(gpu: FakeTensorRT, request: pytest.FixtureRequest) -> Iterator[Generator]:
    """The built-in model on TensorRT; the loops differ in how they call the engine."""
    loop, _, memory = request.param.partition(", ")
    gpu.cuda.integrated = int(bool(memory))
    build(options=BuildOptions(max_batch=4))
    with Generator.load(runtime="tensorrt", loop=loop) as generator:
        yield generator


@pytest.fixture(scope="module")
def on_cpu() -> Iterator[Generator]:
    with Generator.load(runtime="onnxruntime", device="cpu", threads=1) as generator:
        yield generator


def engine_bytes(gpu: FakeTensorRT) -> bytes:
    return build().built.engine


# Running


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_images_are_those_of_onnx_runtime(
    generator: Generator, on_cpu: Generator, sampler: str
) -> None:
    arguments: dict[str, Any] = {"seed": 3, "sampler": sampler, "steps": 6, "label": [1, 2, 5]}
    if sampler == "ddpm":
        arguments["variance"] = "beta-tilde"
    assert generator.runtime == "tensorrt on cuda:0"
    ours = generator.sample(3, guidance=[1.0, 2.0, 3.0], dtype="float32", **arguments)
    theirs = on_cpu.sample(3, guidance=[1.0, 2.0, 3.0], dtype="float32", **arguments)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)  # other threads sum in another order


def test_verify(generator: Generator) -> None:
    assert all(comparison.passed for comparison in generator.verify())


def test_batches_come_and_go(generator: Generator, on_cpu: Generator) -> None:
    for n in (1, 4, 2, 8, 3):
        ours, theirs = (g.sample(n, seed=n, steps=2, batch=n) for g in (generator, on_cpu))
        assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_the_default_batch_fits_the_profile(generator: Generator, gpu: FakeTensorRT) -> None:
    assert gpu.builds[-1]["profile"] == (1, 1, 8)  # four images, and guidance asks twice
    assert len(generator.sample(20, seed=0, steps=1)) == 20
    assert len(generator.sample(9, seed=0, steps=1, label=3, guidance=2.0)) == 9


def test_a_batch_outside_the_profile(generator: Generator) -> None:
    with pytest.raises(EngineError, match=r"batches of 1 to 8; got 9 .*--max-batch 9"):
        generator.sample(9, batch=9, steps=1)
    with pytest.raises(EngineError, match=r"batches of 1 to 8; got 10"):
        next(iter(generator.stream(5, label=1, guidance=2.0, steps=1)))
    assert len(generator.sample(2, steps=1)) == 2


def test_threads_share_it(generator: Generator) -> None:
    expected = [generator.sample(2, seed=seed, steps=3) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda seed: generator.sample(2, seed=seed, steps=3), range(6)))
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_rtx_compiles_for_the_batch_before_a_graph_is_captured(
    gpu: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT for RTX alone has such a strategy, and begins with slower kernels without it."""
    made = engine_bytes(gpu), flavour_for(cuda.gpu()), cuda.gpu()
    with TensorRTEngine(*made) as engine:
        assert engine.resident(1, {}).capturable
        assert engine._engine.settings == ["USER_MANAGED"] * 2
    strategies = SimpleNamespace(EAGER="eager")
    monkeypatch.setattr(gpu, "DynamicShapesKernelSpecializationStrategy", strategies, raising=False)
    told: list[str] = []
    config = SimpleNamespace(
        set_execution_context_allocation_strategy=told.append,
        create_runtime_cache=lambda: "a cache",
        set_runtime_cache=told.append,
    )
    monkeypatch.setattr(
        fake_gpu.FakeEngine, "create_runtime_config", lambda _: config, raising=False
    )
    with TensorRTEngine(*made) as engine:
        engine.resident(1, {})
        assert engine._engine.settings == [config] * 2  # what one compiles, the others find
    assert told == ["USER_MANAGED", "a cache"]
    assert config.dynamic_shapes_kernel_specialization_strategy == "eager"


@pytest.mark.parametrize("capturable", [True, False])
def test_rtx_says_whether_a_graph_may_hold_it(
    gpu: FakeTensorRT, monkeypatch: pytest.MonkeyPatch, capturable: bool
) -> None:
    monkeypatch.setattr(
        fake_gpu.FakeContext, "is_stream_capturable", lambda *_: capturable, raising=False
    )
    build()
    with Generator.load(runtime="tensorrt") as generator:
        generator.sample(1, steps=4)
    assert ("cudaGraphLaunch" in gpu.cuda.calls) == capturable


@pytest.mark.parametrize(
    ("asked", "clip", "loop"),
    [("device", 1.0, "device"), ("auto", 1.0, "device"), ("host", 1.0, "host"),
     ("auto", "99%", "host")],
)  # fmt: skip
def test_bench_measures_the_loop_that_runs(
    gpu: FakeTensorRT, asked: str, clip: float | str, loop: str
) -> None:
    build()
    report = bench(batches=[1, 2], runs=1, runtime="tensorrt", steps=4, clip=clip, loop=asked)
    assert report.loop == loop
    assert all(0 < batch.loop_us < batch.ms_a_step * 1e3 for batch in report.batches)
    if asked != "auto":
        assert ("cudaGraphLaunch" in gpu.cuda.calls) == (loop == "device")


def test_every_thread_chooses_the_device(generator: Generator, gpu: FakeTensorRT) -> None:
    gpu.cuda.calls.clear()
    thread = threading.Thread(target=lambda: generator.sample(1, steps=1))
    thread.start()
    thread.join()
    assert gpu.cuda.calls[0] == "cudaSetDevice"


def test_close_frees_everything(generator: Generator, gpu: FakeTensorRT) -> None:
    generator.sample(2, steps=1)
    assert any(gpu.cuda.blocks.values())
    generator.close()
    generator.close()
    assert gpu.cuda.blocks == {"device": {}, "host": {}}
    assert not gpu.cuda.streams
    with pytest.raises(ClosedError):
        generator.sample(1)


@pytest.mark.parametrize("call", ["cudaStreamSynchronize", "cudaMemcpyAsync", "cudaSetDevice"])
def test_a_lost_gpu(generator: Generator, gpu: FakeTensorRT, call: str) -> None:
    if call == "cudaMemcpyAsync" and gpu.cuda.integrated:
        pytest.skip("nothing is copied there")
    gpu.cuda.fail[call] = CudaError.cudaErrorIllegalAddress
    for _ in range(2):  # also once CUDA itself seems to work again
        with pytest.raises(
            EngineLostError, match=r"IllegalAddress, words of .*restart the process"
        ):
            generator.sample(1, steps=1)
        gpu.cuda.fail.clear()
    generator.close()


def test_a_gpu_that_is_found_lost_at_the_end(generator: Generator, gpu: FakeTensorRT) -> None:
    generator.sample(1, steps=1)
    gpu.cuda.fail["cudaFree"] = CudaError.cudaErrorIllegalAddress
    generator.close()  # in the place of what the app itself may be raising


def test_too_little_memory(generator: Generator, gpu: FakeTensorRT) -> None:
    generator.sample(1, steps=1)
    gpu.cuda.memory = 30_000
    with pytest.raises(OutOfMemoryError, match=r"8 samples at once .*cudaErrorMemoryAllocation"):
        generator.sample(8, steps=1, batch=8)
    assert len(generator.sample(1, steps=1)) == 1


def test_no_memory_for_pinned_buffers(generator: Generator, gpu: FakeTensorRT) -> None:
    gpu.cuda.fail["cudaHostAlloc"] = CudaError.cudaErrorMemoryAllocation
    with pytest.raises(OutOfMemoryError):
        generator.sample(1, steps=1)
    gpu.cuda.fail.clear()
    assert len(generator.sample(1, steps=1)) == 1
    generator.close()
    assert gpu.cuda.blocks == {"device": {}, "host": {}}


def test_no_memory_for_the_context(gpu: FakeTensorRT) -> None:
    engine = engine_bytes(gpu)
    gpu.context_fails = True
    with pytest.raises(OutOfMemoryError, match="no memory to run the engine: it does not say why"):
        TensorRTEngine(engine, flavour_for(cuda.gpu()), cuda.gpu())


def test_a_full_gpu_is_no_missing_engine(gpu: FakeTensorRT) -> None:
    build()

    def full(logger: Any) -> Any:
        def deserialize(_: bytes) -> None:
            logger.log(Severity.ERROR, "Error Code 1: Cuda Runtime (out of memory)")

        return SimpleNamespace(deserialize_cuda_engine=deserialize)

    gpu.Runtime = full  # type: ignore[method-assign]
    with pytest.raises(OutOfMemoryError, match=r"no memory to run the engine: .*out of memory"):
        Generator.load(runtime="tensorrt", build="missing")
    assert len(gpu.builds) == 1


def test_what_does_not_load_is_not_kept(gpu: FakeTensorRT) -> None:
    build(options=BuildOptions(max_batch=2))
    gpu.context_fails = True
    with pytest.raises(OutOfMemoryError):
        build(options=BuildOptions(max_batch=64))
    gpu.context_fails = False
    with Generator.load(runtime="tensorrt") as generator:
        assert len(generator.sample(1, steps=1)) == 1
    assert "1 engine, " in run("cache", "list").output


def test_an_engine_of_another_version(gpu: FakeTensorRT) -> None:
    engine = engine_bytes(gpu)
    gpu.__version__ = "10.4.0"
    with pytest.raises(EngineError, match=r"10.4.0 on Orin \(cuda:0, .*8.7\) refuses the eng"):
        TensorRTEngine(engine, flavour_for(cuda.gpu()), cuda.gpu())


# Which device, which TensorRT


@pytest.mark.parametrize(
    ("device", "message"),
    [("cpu", "no device 'cpu'"), ("cuda:x", "no device"), ("cuda:3", "there are Orin"),
     ("gpu", "no device 'gpu'")],
)  # fmt: skip
def test_devices(gpu: FakeTensorRT, device: str, message: str) -> None:
    with pytest.raises(RuntimeUnavailableError, match=message):
        build(device=device)
    with pytest.raises(RuntimeUnavailableError, match=message):
        Generator.load(runtime="tensorrt", device=device)


def test_no_gpu_is_found_before_tensorrt_is_touched(gpu: FakeTensorRT) -> None:
    gpu.cuda.names = ()
    gpu.Runtime = gpu.Builder = None  # type: ignore[assignment, method-assign]
    with pytest.raises(RuntimeUnavailableError, match=r"cudaErrorNoDevice.*ddpm-edge doctor"):
        build()
    with Generator.load() as generator:
        assert generator.runtime == "onnxruntime on cpu"


def test_a_gpu_that_another_process_has_for_itself(gpu: FakeTensorRT) -> None:
    build()
    gpu.cuda.fail["cudaSetDevice"] = CudaError.cudaErrorDevicesUnavailable
    with pytest.raises(RuntimeUnavailableError, match="DevicesUnavailable"):
        Generator.load(runtime="tensorrt")
    with Generator.load() as generator:
        assert generator.runtime == "onnxruntime on cpu"
    gpu.cuda.fail.clear()
    with Generator.load(runtime="tensorrt") as generator:
        generator.sample(1, seed=0, steps=1)


@pytest.mark.parametrize(
    ("name", "chosen"),
    [("Orin", "tensorrt"), ("NVIDIA GeForce RTX 4070", "tensorrt_rtx"), ("NVIDIA L4", "tensorrt"),
     ("NVIDIA RTX 6000 Ada Generation", "tensorrt_rtx"), ("NVIDIA H100", "tensorrt")],
)  # fmt: skip
def test_the_flavour_is_that_of_the_gpu(
    gpu: FakeTensorRT,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    chosen: str,
) -> None:
    card = cuda.GPU(0, name, "8.9", 1 << 33, False, 46)
    assert flavour_for(card).name == "tensorrt"  # the only one installed
    rtx = FakeTensorRT(gpu.cuda, "tensorrt_rtx", "1.7.1")
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", rtx)
    assert flavour_for(card).name == chosen


def test_too_old_a_tensorrt(gpu: FakeTensorRT) -> None:
    gpu.__version__ = "8.6.2"
    with pytest.raises(RuntimeUnavailableError, match=r"tensorrt 8.6.2 is too old; expected 10.3"):
        build()


# Building and the cache


def test_what_the_builder_is_told(gpu: FakeTensorRT) -> None:
    options = BuildOptions(max_batch=3, best_batch=2, workspace_mb=256, optimization_level=5)
    report = build(options=options)
    told = gpu.builds[-1]
    assert told["profile"] == tuple(report.profile) == (1, 2, 6)
    assert told["shapes"]["x"] == ((1, 1, 28, 28), (2, 1, 28, 28), (6, 1, 28, 28))
    assert told["shapes"]["t"] == ((1,), (2,), (6,))
    config = told["config"]
    assert (config.limits, config.cleared) == ({"WORKSPACE": 256 << 20}, ["TF32"])
    assert config.builder_optimization_level == 5
    assert (report.variant, str(report.flavour)) == ("fp32", "tensorrt 10.3.0")
    assert report.gpu.name == "Orin"


def test_built_once(gpu: FakeTensorRT, cache: Path) -> None:
    first, again = build(), build()
    assert not first.built.cached
    assert first.built.reason == "no engine of this model was built here"
    assert again.built == first.built._replace(cached=True, reason="")
    assert len(gpu.builds) == 1
    assert first.built.path is not None
    assert first.built.path.read_bytes() == first.built.engine
    build(rebuild=True)
    assert len(gpu.builds) == 2
    assert gpu.builds[-1]["config"].timing == b"+"  # what the first build measured


def test_other_options_are_another_engine(gpu: FakeTensorRT) -> None:
    build()
    report = build(options=BuildOptions(max_batch=2))
    assert report.built.reason.endswith("profile 1..1..32; asked for profile 1..1..4")
    gpu.__version__ = "10.5.0"
    assert "is for TensorRT 10.3.0; " in build().built.reason


def test_the_output_is_the_engine_alone(gpu: FakeTensorRT, tmp_path: Path) -> None:
    report = build(output=tmp_path / "model.plan")
    assert (tmp_path / "model.plan").read_bytes() == report.built.engine


def test_a_damaged_engine_is_built_again(gpu: FakeTensorRT) -> None:
    path = build().built.path
    assert path is not None
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(EngineMissingError, match=r"SHA-256 is not the one"):
        Generator.load(runtime="tensorrt")
    assert "SHA-256" in build().built.reason
    Generator.load(runtime="tensorrt").close()


def test_an_engine_that_does_not_load_is_built_again(gpu: FakeTensorRT) -> None:
    """As after a driver's update that the key does not see."""
    build()
    real, refused = gpu.Runtime, []

    def once(logger: Any) -> Any:
        if refused:
            return real(logger)
        refused.append(1)
        return type("Refuses", (), {"deserialize_cuda_engine": lambda *_: None})()

    gpu.Runtime = once  # type: ignore[method-assign]
    assert "does not load" in build().built.reason
    assert len(gpu.builds) == 2


def test_a_refused_network(gpu: FakeTensorRT, cache: Path) -> None:
    gpu.build_fails = True
    with pytest.raises(
        BuildError, match=r"tensorrt 10.3.0 cannot build the engine: no tactic fits"
    ):
        build()
    assert not list(cache.rglob("*.plan"))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_batch": 0}, "max_batch"), ({"max_batch": 2.5}, "max_batch"),
     ({"max_batch": 1, "best_batch": 3}, "best_batch must be a whole number <= 2"),
     ({"optimization_level": 6}, "0 to 5; got 6"), ({"optimization_level": True}, "0 to 5"),
     ({"workspace_mb": 0}, "workspace_mb")],
)  # fmt: skip
def test_bad_options(gpu: FakeTensorRT, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(options=BuildOptions(**options))
    assert not gpu.builds


# The policy


def test_a_missing_engine_says_the_command(gpu: FakeTensorRT, tmp_path: Path) -> None:
    bundle = tmp_path / "my bundle"
    shutil.copytree(Bundle.open().path, bundle)
    with pytest.raises(EngineMissingError) as error:
        Generator.load(bundle, runtime="tensorrt", variant="fp32", cache_dir=tmp_path / "c")
    line = f"ddpm-edge build '{bundle}' --variant fp32 --cache-dir {tmp_path / 'c'}"
    assert str(error.value).endswith(line)
    assert not gpu.builds


def test_the_command_that_is_said_works(gpu: FakeTensorRT) -> None:
    with pytest.raises(EngineMissingError, match=r"on this device: ddpm-edge build$"):
        Generator.load(runtime="tensorrt")
    assert CliRunner().invoke(main, ["build"]).exit_code == 0
    Generator.load(runtime="tensorrt").close()


def test_build_missing(gpu: FakeTensorRT, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ddpm_edge")
    for _ in range(2):
        with Generator.load(runtime="tensorrt", build="missing") as generator:
            assert generator.runtime == "tensorrt on cuda:0"
    assert len(gpu.builds) == 1
    assert "building the fp32 engine with tensorrt 10.3.0 for Orin" in caplog.text
    with pytest.raises(ConfigError, match="build must be one of never, missing; got 'always'"):
        Generator.load(build="always")


def test_build_missing_takes_what_is_there(gpu: FakeTensorRT) -> None:
    build(options=BuildOptions(max_batch=2))
    Generator.load(runtime="tensorrt", build="missing").close()
    assert len(gpu.builds) == 1


def test_auto_never_builds(gpu: FakeTensorRT, caplog: pytest.LogCaptureFixture) -> None:
    with Generator.load() as generator:
        assert generator.runtime == "onnxruntime on cpu"
    assert not gpu.builds
    assert "not tensorrt: no engine of this model was built here; ddpm-edge build" in caplog.text
    with pytest.raises(ConfigError, match="goes with runtime='tensorrt'; got runtime='auto'"):
        Generator.load(build="missing")
    build()
    with Generator.load() as generator:
        assert generator.runtime == "tensorrt on cuda:0"


def test_auto_goes_on_where_an_engine_does_not_load(
    gpu: FakeTensorRT, caplog: pytest.LogCaptureFixture
) -> None:
    build()
    gpu.context_fails = True
    with Generator.load() as generator:
        assert generator.runtime == "onnxruntime on cpu"
    assert "no memory to run the engine" in caplog.text
    gpu.context_fails = False
    gpu.Runtime = lambda _: SimpleNamespace(deserialize_cuda_engine=lambda _: None)  # type: ignore[method-assign]
    with Generator.load() as generator:
        assert generator.runtime == "onnxruntime on cpu"
    assert "the engine built on" in caplog.text
    assert "does not load: tensorrt 10.3.0 on Orin" in caplog.text


def test_build_missing_replaces_what_does_not_load(gpu: FakeTensorRT) -> None:
    build()
    real, refused = gpu.Runtime, []

    def twice(logger: Any) -> Any:
        if len(refused) == 2:
            return real(logger)
        refused.append(1)
        return SimpleNamespace(deserialize_cuda_engine=lambda _: None)

    gpu.Runtime = twice  # type: ignore[method-assign]
    with Generator.load(runtime="tensorrt", build="missing") as generator:
        assert generator.runtime == "tensorrt on cuda:0"
    assert len(gpu.builds) == 2


def test_build_missing_runs_what_could_not_be_kept(gpu: FakeTensorRT, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    where: dict[str, Any] = {"runtime": "tensorrt", "cache_dir": tmp_path / "file"}
    with (
        pytest.warns(CacheWarning, match="cannot be kept"),
        Generator.load(build="missing", **where) as generator,
    ):
        assert len(generator.sample(1, steps=1)) == 1


def test_gpus_of_one_name_are_told_apart(gpu: FakeTensorRT) -> None:
    """An Orin Nano and an AGX Orin are both "Orin"."""
    build()
    gpu.cuda.multiprocessors = 8
    with pytest.raises(EngineMissingError, match=r"is for Orin, 16 SMs .*this is Orin, 8 SMs"):
        Generator.load(runtime="tensorrt")


@pytest.mark.parametrize("earlier", [b"damaged", b"of another GPU"])
def test_timings_that_do_not_fit_are_left(gpu: FakeTensorRT, earlier: bytes) -> None:
    flavour = flavour_for(cuda.gpu())
    model = Bundle.open().model()[1]
    made = build_engine(model, flavour, Profile(1, 1, 1), timing_cache=earlier)
    assert made.timing_cache == b"+"


def test_a_build_is_cancelled(gpu: FakeTensorRT) -> None:
    gpu.slow = True

    def interrupt(fraction: float, phase: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(progress=interrupt)
    assert gpu.cancelled


# The command line


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_build_command(gpu: FakeTensorRT, cache: Path, tmp_path: Path) -> None:
    result = run("build", "--max-batch", 2, "-o", tmp_path / "m.plan")
    assert result.exit_code == 0, result.output
    assert "fp32 engine for Orin (cuda:0, compute capability 8.7) by tensorrt 10.3.0: built in" in (
        result.output
    )
    assert "batch 1 to 4, fastest at 1" in result.output
    assert "Next: ddpm-edge verify --runtime tensorrt --variant fp32\n" in result.output
    assert (tmp_path / "m.plan").is_file()
    assert "already there" in run("build", "--max-batch", 2).output
    report = json.loads(run("build", "--max-batch", 2, "--json").output)
    assert (report["cached"], report["profile"], report["gpu"]) == (True, [1, 1, 4], "Orin")
    assert run("verify", "--runtime", "tensorrt").exit_code == 0
    out = tmp_path / "x.png"
    result = run("sample", "-n", 2, "--steps", 2, "--runtime", "tensorrt", "-o", out)
    assert "fp32, tensorrt on cuda:0" in result.output


def test_cache_commands(gpu: FakeTensorRT, cache: Path) -> None:
    assert "0 engines, 0.0 MB in" in run("cache", "list").output
    build()
    listed = run("cache", "list").output
    assert "fp32  tensorrt 10.3.0  Orin, 16 SMs (8.7)  batch 1 to 32, best 1" in listed
    (row,) = json.loads(run("cache", "list", "--json").output)["engines"]
    assert row["device"] == "Orin, 16 SMs"
    assert run("cache", "clear").output.startswith("1 engine, 7.")
    assert "0 engines" in run("cache", "list").output


def test_export_to_tensorrt(gpu: FakeTensorRT, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    bundle = tmp_path / "b"
    result = run("export", Bundle.open().path, "-o", bundle, "--variants", "fp32,fp16",
                 "--format", "tensorrt")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert len(gpu.builds) == 2
    assert "fp16 engine for Orin" in result.output
    with Generator.load(bundle, runtime="tensorrt", variant="fp16") as generator:
        assert all(comparison.passed for comparison in generator.verify())


@pytest.mark.parametrize("option", ["-o", "--cache-dir"])
def test_the_bundle_is_left_alone(gpu: FakeTensorRT, tmp_path: Path, option: str) -> None:
    bundle = shutil.copytree(Bundle.open().path, tmp_path / "b")
    result = run("build", bundle, option, bundle / "engines")
    assert (result.exit_code, "whose list of files is closed" in result.output) == (2, True)
    assert not gpu.builds
    Bundle.open(bundle)


def test_no_memory_on_the_command_line(gpu: FakeTensorRT, tmp_path: Path) -> None:
    build()
    gpu.context_fails = True
    result = run("sample", "--runtime", "tensorrt", "-o", tmp_path / "x.png")
    assert (result.exit_code, "Error: tensorrt 10.3.0 on Orin" in result.output) == (1, True)


@pytest.mark.parametrize("output", ["no/such/m.plan", "."])
def test_an_output_that_cannot_be_is_refused_before_the_build(
    gpu: FakeTensorRT, tmp_path: Path, output: str
) -> None:
    result = run("build", "-o", tmp_path / output)
    assert (result.exit_code, "a directory that exists" in result.output) == (2, True)
    assert not gpu.builds
    assert run("build", "--workspace-mb", 10**16).exit_code == 2
    (tmp_path / "file").touch()
    assert run("cache", "list", "--cache-dir", tmp_path / "file").exit_code == 2


def test_build_errors_of_the_command_line(gpu: FakeTensorRT) -> None:
    assert run("build", "--max-batch", 0).exit_code == 2
    result = run("build", "--device", "cuda:7")
    assert (result.exit_code, "cuda:7" in result.output) == (1, True)
    result = run("build", "--variant", "fp8")
    assert (result.exit_code, "no variant 'fp8'" in result.output) == (1, True)


def test_flavour_is_shown() -> None:
    assert str(Flavour("tensorrt", "10.3.0", None)) == "tensorrt 10.3.0"
