"""The OpenVINO adapter, held against ONNX Runtime."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openvino", reason="pip install openvino")
pytest.importorskip("onnxruntime")
from ddpm_edge import Bundle, Generator
from ddpm_edge.errors import ClosedError, EngineError, RuntimeUnavailableError
from ddpm_edge.runtimes import Engine, open_engine
from ddpm_edge.runtimes.openvino_runtime import OpenVinoEngine
from ddpm_edge.samplers import SAMPLERS


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with open_engine(Bundle.open().model()[1], "openvino", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def ours() -> Iterator[Generator]:
    with Generator.load(runtime="openvino", threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def theirs() -> Iterator[Generator]:
    with Generator.load(runtime="onnxruntime", device="cpu", threads=1) as loaded:
        yield loaded


def arrays(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((batch, 1, 28, 28)).astype(np.float32),
        "t": rng.integers(0, 1000, batch),
        "label": rng.integers(0, 11, batch),
    }


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"euler"}))
def test_images_are_those_of_onnx_runtime(ours: Generator, theirs: Generator, sampler: str) -> None:
    arguments: dict[str, Any] = {"sampler": sampler, "steps": 6, "seed": 3, "label": [1, 2, 5]}
    arguments |= {"guidance": [1.0, 2.0, 3.0], "dtype": "float32"}
    if sampler == "ddpm":
        arguments["variance"] = "beta-tilde"
    assert ours.runtime == "openvino on cpu"
    difference = ours.sample(3, **arguments) - theirs.sample(3, **arguments)
    assert np.abs(difference).max() <= 1e-3  # float32 sums in another order, guided, six steps


def test_verify(ours: Generator) -> None:
    for comparison in ours.verify():
        assert comparison.passed, str(comparison)


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_half_precision(variant: str, tmp_path: Path) -> None:
    """bf16 too, which ONNX Runtime's CPU provider cannot run."""
    pytest.importorskip("onnx")
    from ddpm_edge.export import export_bundle

    bundle = export_bundle(Bundle.open().path, tmp_path / "b", variants=[variant])
    with Generator.load(bundle.path, runtime="openvino", variant=variant) as generator:
        for comparison in generator.verify():
            assert comparison.passed, str(comparison)
    with Generator.load(bundle.path, variant=variant) as generator:  # auto finds what runs it
        assert generator.runtime.startswith("onnxruntime" if variant == "fp16" else "openvino")


def test_answers_are_the_caller_s_to_keep(engine: Engine) -> None:
    first = engine(arrays(2))["prediction"]
    kept = first.copy()
    engine(arrays(2, seed=1))
    np.testing.assert_array_equal(first, kept)


def test_arrays_that_are_not_contiguous(engine: Engine) -> None:
    inputs = arrays(4)
    expected = engine(inputs)["prediction"]
    strided = {name: np.repeat(a, 2, axis=0)[::2] for name, a in inputs.items()}
    assert not strided["x"].flags.c_contiguous
    np.testing.assert_array_equal(engine(strided)["prediction"], expected)


def test_threads_run_at_once(engine: Engine) -> None:
    expected = [engine(arrays(2, seed))["prediction"] for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda seed: engine(arrays(2, seed))["prediction"], range(8)))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_close() -> None:
    engine = OpenVinoEngine(Bundle.open().model()[1])
    engine.close()
    engine.close()
    with pytest.raises(ClosedError):
        engine(arrays(1))


@pytest.mark.parametrize("device", ["cuda", "gpu", "cpu:1"])
def test_devices(device: str) -> None:
    with pytest.raises(RuntimeUnavailableError, match=f"no device '{device}'"):
        Generator.load(runtime="openvino", device=device)


def test_models_that_do_not_load() -> None:
    with pytest.raises(EngineError, match="OpenVINO cannot load the model: Unable to read"):
        open_engine(b"not a model", "openvino")


def test_inputs_are_checked(engine: Engine) -> None:
    with pytest.raises(EngineError, match="'x' must be float32"):
        engine(arrays(1) | {"x": np.zeros((1, 1, 28, 28))})


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install 'ddpm-edge\[openvino\]'"):
        Generator.load(runtime="openvino")


def test_a_run_that_fails(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def __init__(self, text: str) -> None:
            self.text = text

        def infer(self, *_: Any, **__: Any) -> None:
            raise RuntimeError(f"Exception from src/a.cpp:1:\n{self.text}")

    for text, error in (("no kernel", EngineError), ("std::bad_alloc", MemoryError)):
        engine._own.request = Failing(text)
        with pytest.raises(error, match=f"OpenVINO.*: {text}"):
            engine(arrays(1))
    assert engine(arrays(1))["prediction"].shape == (1, 1, 28, 28)
