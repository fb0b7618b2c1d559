"""The comparison with other libraries: same weights, sound statistics, and the README's figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "tests" / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (BENCHMARKS, BENCHMARKS / "peers"):
        monkeypatch.syspath_prepend(str(folder))


def test_diffusers_has_the_built_in_model_s_weights(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("onnx")
    import models

    from ddpm_edge import Bundle
    from ddpm_edge.runtimes.onnx_runtime import OnnxRuntimeEngine

    models.write("built-in", tmp_path)
    network = diffusers.UNet2DModel.from_pretrained(tmp_path, subfolder="unet").eval()
    x = np.random.default_rng(0).standard_normal((2, 1, 28, 28)).astype(np.float32)
    with OnnxRuntimeEngine(Bundle.open().model()[1], "cpu") as engine:
        for t in (0, 500, 999):
            no_label = {"t": np.full(2, t), "label": np.full(2, 10)}
            ours = engine({"x": x} | no_label)["prediction"]
            with torch.inference_mode():
                theirs = network(torch.from_numpy(x), t).sample.numpy()
            assert np.abs(ours - theirs).max() < 1e-4  # the parity gate's


def test_ratio_is_the_median_of_the_rounds() -> None:
    from compare_peers import ratio

    rng = np.random.default_rng(1)
    drift = rng.uniform(1, 2, 41)  # a machine that slows down and recovers, for both alike
    median, low, high = ratio(3 * drift, drift)
    assert (median, low, high) == pytest.approx((3, 3, 3))
    median, low, high = ratio(drift * rng.normal(3, 0.3, 41), drift)
    assert low < median < high
    assert low < 3 < high
    assert high - low < 0.5  # about 2 x 1.96 x 1.25 x 0.3 / sqrt(41) = 0.23


def test_table_and_picture(tmp_path: Path) -> None:
    from report import plot, table

    results = json.loads((BENCHMARKS / "compare_peers.json").read_text())
    text = table(results)
    for model, found in results["models"].items():
        assert f"**{model}**" in text
        for row in found["peers"]:
            assert f"| {row['contender']} | {row['batch']} | {row['ms_a_step']:.2f} |" in text
    pytest.importorskip("matplotlib")
    plot(results, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 10_000
