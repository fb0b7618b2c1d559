"""The comparison with other libraries: same weights, sound statistics, and the README's figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "tests" / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (BENCHMARKS, BENCHMARKS / "peers"):
        monkeypatch.syspath_prepend(str(folder))


@pytest.fixture
def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((BENCHMARKS / "compare_peers.json").read_text())
    return found


def test_diffusers_has_the_built_in_model_s_weights(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("onnx")
    import models

    from ddpm_edge import Bundle
    from ddpm_edge.runtimes.onnx_runtime import OnnxRuntimeEngine

    models.pipeline_of("built-in").save_pretrained(tmp_path)
    network = diffusers.UNet2DModel.from_pretrained(tmp_path, subfolder="unet").eval()
    x = np.random.default_rng(0).standard_normal((2, 1, 28, 28)).astype(np.float32)
    with OnnxRuntimeEngine(Bundle.open().model()[1], "cpu") as engine:
        for t in (0, 500, 999):
            no_label = {"t": np.full(2, t), "label": np.full(2, 10)}
            ours = engine({"x": x} | no_label)["prediction"]
            with torch.inference_mode():
                theirs = network(torch.from_numpy(x), t).sample.numpy()
            assert np.abs(ours - theirs).max() < 1e-4  # the parity gate's


def test_ratio_is_of_one_sitting() -> None:
    pytest.importorskip("scipy")
    from compare_peers import ratio

    drift = np.array([1.0, 2.0, 1.5, 1.2, 1.9])  # a machine that slows down, for both alike
    assert ratio(3 * drift, drift) == pytest.approx([3, 3, 3])
    # By hand: logs of mean ln 3 and deviation 0.1; t(0.975, 4) = 2.776.
    off = np.array([-0.1, 0.1, -0.1, 0.1, 0.0])
    mean, low, high = ratio(3 * np.exp(off) * drift, drift)
    assert mean == pytest.approx(3)
    half = 2.776 * 0.1 / 5**0.5
    assert (low, high) == pytest.approx((3 * np.exp(-half), 3 * np.exp(half)), rel=1e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="stops processes, reads /proc")
def test_a_contender_that_cannot_run_says_why(tmp_path: Path) -> None:
    from compare_peers import CannotRunError, Contender

    with (
        Contender("ddpm-edge, ONNX Runtime fp32", tmp_path / "nowhere", 1) as contender,
        pytest.raises(CannotRunError, match="nowhere"),
    ):
        contender.turn(1)


@pytest.mark.skipif(sys.platform != "linux", reason="stops processes, reads /proc")
def test_a_contender_samples(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from compare_peers import Contender

    from ddpm_edge.bundle import BUILT_IN

    (tmp_path / "bundle").symlink_to(BUILT_IN)
    images = tmp_path / "images.npy"
    with Contender("ddpm-edge, ONNX Runtime fp32", tmp_path, 2) as contender:
        for _ in range(2):  # stopped between turns
            found = contender.turn(3, images=images)
    assert found["seconds"] > 0
    assert found["peak_memory_mb"] > 10
    made = np.load(images)
    assert made.shape == (2, 28, 28, 1)
    assert made.dtype == np.float32


def test_table_and_picture(results: dict[str, Any], tmp_path: Path) -> None:
    from compare_peers import PARTS
    from report import plot, table

    assert set(results) == set(PARTS)
    text = table(results)
    for part, found in results.items():
        assert f"### {part}" in text
        assert found["machine"]["date"] in text
    pytest.importorskip("matplotlib")
    plot(results, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 10_000


def test_the_readme_has_these_figures(results: dict[str, Any]) -> None:
    from report import readme, where

    text = (ROOT / "README.md").read_text()
    assert readme(results) in text
    assert where(results["built-in"]["machine"]) in " ".join(text.split())
