"""From a folder of images to a bundle to samples: the three commands of the README."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageDraw

pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from ddpm_edge import Bundle, Generator
from ddpm_edge.cli import main
from ddpm_edge.train import run as runs

CLASSES = {
    "blue-square": (2, "rectangle"),
    "green-disc": (1, "ellipse"),
    "red-disc": (0, "ellipse"),
}


def draw_shapes(folder: Path, count: int) -> None:
    """Shapes 32 x 32 of random place, size and brightness on black, one folder a class."""
    rng = np.random.default_rng(0)
    names = list(CLASSES)
    for name in names:
        (folder / name).mkdir(parents=True)
    for i in range(count):
        name = names[i % len(names)]
        channel, shape = CLASSES[name]
        image = Image.new("RGB", (32, 32))
        size = int(rng.integers(12, 20))
        left, top = rng.integers(0, 32 - size, 2).tolist()
        colour = [30, 30, 30]
        colour[channel] = int(rng.integers(160, 256))
        box = (left, top, left + size, top + size)
        getattr(ImageDraw.Draw(image), shape)(box, fill=tuple(colour))
        image.save(folder / name / f"{i:04d}.png")


def cli(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_folder_of_shapes_becomes_samples_in_three_commands(tmp_path: Path) -> None:
    draw_shapes(tmp_path / "shapes", 500)
    run, bundle, sheet = (tmp_path / name for name in ("run", "bundle", "samples.npy"))
    # x0 learns where and in which colour first; the schedule is the lecture's, T = 100 to 0.2.
    output = cli("train", "--data", tmp_path / "shapes", "--preset", "tiny", "--steps", 300,
                 "--batch", 32, "--lr", 5e-3, "--warmup", 20, "--ema", 0.98, "--val", 0.1,
                 "--prediction", "x0", "-T", 100, "--beta-T", 0.2, "-o", run)  # fmt: skip
    assert "32 x 32, 3 channels, 3 labels" in output
    assert "held out" in output
    cli("export", run, "-o", bundle)
    labels = [x for name in CLASSES for x in ("--label", name)]
    cli("sample", bundle, "-n", 24, *labels, "--seed", 0, "--steps", 20, "-o", sheet)

    config = json.loads((run / "config.json").read_text())
    assert len(config["validation"]) + config["images"] == 500
    assert all((tmp_path / "shapes" / name).is_file() for name in config["validation"])
    losses = [line["validation_loss"] for line in runs.read_metrics(run) if len(line) > 5]
    assert losses[-1] < 0.6 * losses[0]  # unseen images; 0.074 from 0.155, other CPUs differ
    manifest = Bundle.open(bundle).manifest
    assert (manifest.class_names, manifest.prediction) == (tuple(CLASSES), "x0")
    images = np.load(sheet)
    assert images.shape == (24, 32, 32, 3)
    strongest = images.reshape(24, -1, 3).mean(axis=1).argmax(axis=1)
    wanted = np.array([channel for channel, _ in CLASSES.values()] * 8)
    assert (strongest == wanted).mean() >= 0.75  # all 24, when written; by chance a third
    with Generator.load(bundle) as generator:
        assert all(comparison.passed for comparison in generator.verify())
