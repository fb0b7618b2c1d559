"""What needs an NVIDIA GPU: every runtime that uses one, held against ONNX Runtime on the CPU.

    pytest -m gpu tests/test_gpu.py

They skip, with the reason, where there is no GPU or the runtime is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
from ddpm_edge import Bundle, Generator
from ddpm_edge.build import BuildOptions, build
from ddpm_edge.errors import EngineError, RuntimeUnavailableError
from ddpm_edge.runtimes import cuda
from ddpm_edge.samplers import SAMPLERS

pytestmark = pytest.mark.gpu

VARIANTS = ("fp32", "fp16", "bf16")
# Largest difference of float images in [-1, 1] after 20 steps: float32 sums in another order; half
# precision may turn a pixel of a fine pattern over, so there it is the root mean square.
FP32_TOLERANCE, HALF_TOLERANCE = 1e-3, {"fp16": 5e-3, "bf16": 4e-2}


@pytest.fixture(scope="module", params=["tensorrt", "onnxruntime"])
def runtime(request: pytest.FixtureRequest) -> str:
    try:
        cuda.gpu()
        if request.param == "onnxruntime":
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
    except (RuntimeUnavailableError, EngineError) as error:
        if request.param == "bf16":  # ONNX Runtime has no bf16 convolution for every GPU
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
