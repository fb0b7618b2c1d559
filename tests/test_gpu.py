"""What needs an NVIDIA GPU: every runtime that uses one, held against ONNX Runtime on the CPU.

    pytest -m gpu tests/test_gpu.py

They skip, with the reason, where there is no GPU or the runtime is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
from ddpm_edge import Bundle, Generator
from ddpm_edge.build import BuildOptions, build
from ddpm_edge.errors import BuildError, EngineError, RuntimeUnavailableError
from ddpm_edge.restoration import Mask
from ddpm_edge.runtimes import cuda
from ddpm_edge.runtimes.flavour import flavour_for
from ddpm_edge.samplers import SAMPLERS
from ddpm_edge.tasks import Restore

pytestmark = pytest.mark.gpu

VARIANTS = ("fp32", "fp16", "bf16")
# Largest difference of float images in [-1, 1] after 20 steps: float32 sums in another order; half
# precision may turn a pixel of a fine pattern over, so there it is the root mean square.
FP32_TOLERANCE, HALF_TOLERANCE = 1e-3, {"fp16": 5e-3, "bf16": 4e-2}


@pytest.fixture(scope="module", params=["tensorrt", "onnxruntime"])
def runtime(request: pytest.FixtureRequest) -> str:
    try:
        if request.param == "tensorrt":
            flavour_for(cuda.gpu())
        else:
            Generator.load(runtime="onnxruntime", device="cuda").close()
    except RuntimeUnavailableError as error:
        pytest.skip(str(error))
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model in all precisions."""
    pytest.importorskip("onnx")
    from ddpm_edge.export import export_bundle

    path = tmp_path_factory.mktemp("bundle") / "b"
    return export_bundle(Bundle.open().path, path, variants=VARIANTS).path


@pytest.fixture(scope="module", params=VARIANTS)
def generator(
    request: pytest.FixtureRequest,
    runtime: str,
    bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Generator]:
    where: dict[str, Any] = {"variant": request.param, "device": "cuda"}
    where["cache_dir"] = tmp_path_factory.mktemp("cache")
    try:
        if runtime == "tensorrt":
            build(bundle, **where)
        loaded = Generator.load(bundle, runtime=runtime, **where)
    except (RuntimeUnavailableError, EngineError, BuildError) as error:
        # No GPU before Ampere has bf16, and ONNX Runtime no such convolution for every GPU.
        old = float(cuda.gpu().compute_capability) < 8
        if request.param == "bf16" and (old or runtime == "onnxruntime"):
            pytest.skip(str(error))
        raise
    with loaded:
        yield loaded


@pytest.fixture(scope="module")
def on_cpu() -> Iterator[Generator]:
    with Generator.load(runtime="onnxruntime", device="cpu") as generator:
        yield generator


def test_it_runs_where_it_says(generator: Generator, runtime: str) -> None:
    assert generator.runtime.startswith(runtime)
    assert generator.runtime.endswith("on cuda:0")


def test_verify(generator: Generator) -> None:
    for comparison in generator.verify():
        assert comparison.passed, str(comparison)


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"euler"}))
def test_samplers(generator: Generator, on_cpu: Generator, sampler: str) -> None:
    arguments: dict[str, Any] = {"seed": 1, "label": [0, 3, 7, 9], "guidance": 2.0, "steps": 20}
    arguments |= {"sampler": sampler, "dtype": "float32"}
    if sampler == "ddpm":
        arguments["variance"] = "beta-tilde"
    ours, theirs = (g.sample(4, **arguments) for g in (generator, on_cpu))
    if generator.variant == "fp32":
        assert np.abs(ours - theirs).max() <= FP32_TOLERANCE
    else:
        error = np.sqrt(np.mean((ours - theirs) ** 2))
        assert error <= HALF_TOLERANCE[generator.variant]


LOOPS = [
    {"sampler": "ddpm", "variance": "beta-tilde"},
    {"sampler": "unipc", "guidance": 2.0, "guidance_interval": (200, 700)},
    {"sampler": "ipndm", "guidance": [1.0, 2.0, -1.0, 3.0]},
    {"sampler": "ddim", "clip": None, "travel_length": 3, "travel_repeat": 2},
    {"sampler": "dpmpp", "sde": True, "task": "a mask"},
    {"sampler": "ddim", "eta": 1.0, "task": "a noisy mask"},
]


@pytest.mark.parametrize("arguments", LOOPS, ids=str)
def test_the_loop_on_the_device(
    generator: Generator, runtime: str, arguments: dict[str, Any]
) -> None:
    arguments = {"seed": 3, "steps": 12, "label": [0, 3, 7, None], "dtype": "float32"} | arguments
    if "task" in arguments:
        mask = np.zeros((28, 28), bool)
        mask[8:20, 8:20] = True
        sigma = 0.1 if "noisy" in arguments["task"] else 0.0
        arguments["task"] = Restore(np.full((28, 28, 1), 90, np.uint8), Mask(mask), sigma)
    result = generator.run(4, **arguments)
    assert result.loop == "device"
    on_host = Generator(generator.bundle, generator._open().engine, generator.variant, loop="host")
    theirs = on_host.run(4, **arguments)
    assert theirs.loop == "host"
    # The same engine; guidance may ask it in another batch, whose sums are in another order.
    tolerance = FP32_TOLERANCE if generator.variant == "fp32" else 0.1
    assert np.abs(result.images - theirs.images).max() <= tolerance
    again = generator.run(4, **arguments)  # now a replay from the first step on
    np.testing.assert_array_equal(again.images, result.images)


def test_a_step_is_one_launch(generator: Generator, runtime: str) -> None:
    if runtime != "tensorrt":
        pytest.skip("no graph holds a step of ONNX Runtime")
    call: dict[str, Any] = {"label": 3, "guidance": 2.0, "guidance_interval": (200, 700)}
    generator.sample(3, seed=0, steps=20, **call)
    graphs = generator._open()._loops._idle[-1]._graphs  # type: ignore[union-attr]
    assert set(graphs) == {3, 6}
    assert all(graphs.values()), "a capture failed: see the warning"


def test_steps_of_the_loop_on_the_device(generator: Generator) -> None:
    on_host = Generator(generator.bundle, generator._open().engine, generator.variant, loop="host")
    tolerance = FP32_TOLERANCE if generator.variant == "fp32" else 0.1
    pairs = zip(*(g.stream(2, seed=1, steps=9) for g in (generator, on_host)), strict=True)
    for ours, theirs in pairs:
        assert np.abs(ours.x - theirs.x).max() <= tolerance
        assert np.abs(ours.x0 - theirs.x0).max() <= tolerance
    stopped = generator.run(2, seed=1, steps=9, callback=lambda step: step.index == 3)
    assert stopped.stopped
    assert generator.run(1, seed=1, deadline_ms=60_000).loop == "device"


def test_threads(generator: Generator) -> None:
    expected = [generator.sample(2, seed=seed, steps=5) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda seed: generator.sample(2, seed=seed, steps=5), range(4)))
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(got, expected, strict=True)) <= 1


def test_batches(generator: Generator) -> None:
    whole = generator.sample(16, seed=2, steps=3, dtype="float32")
    parts = [generator.sample(1, seed=2, first=i, steps=3, dtype="float32") for i in range(16)]
    tolerance = FP32_TOLERANCE if generator.variant == "fp32" else 0.1
    assert np.abs(whole - np.concatenate(parts)).max() <= tolerance


def test_a_batch_outside_the_profile_is_refused(runtime: str, tmp_path: Path) -> None:
    if runtime != "tensorrt":
        pytest.skip("only TensorRT's engines have a profile")
    build(cache_dir=tmp_path, options=BuildOptions(max_batch=2))
    with Generator.load(runtime="tensorrt", cache_dir=tmp_path) as generator:
        with pytest.raises(EngineError, match="batches of 1 to 4; got 5"):
            generator.sample(5, batch=5, steps=1)
        assert len(generator.sample(5, steps=1)) == 5
