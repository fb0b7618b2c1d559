"""Every program in samples/ runs as it stands and is short enough to copy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_edge import Generator

SAMPLES = Path(__file__).parents[1] / "samples"


def run(name: str, *arguments: object, cwd: Path) -> str:
    command = [sys.executable, str(SAMPLES / name), *(str(a) for a in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_are_run_here_and_short() -> None:
    here = Path(__file__).read_text()
    for path in SAMPLES.glob("*.py"):
        assert f'run("{path.name}"' in here
        assert len(path.read_text().splitlines()) <= 40


def test_generate(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    assert run("generate.py", cwd=tmp_path) == "sneakers.png: 8 images\n"
    with Image.open(tmp_path / "sneakers.png") as image:
        assert image.getextrema()[0] == 0  # not a white sheet


def test_live_preview(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    lines = run("live_preview.py", 10, cwd=tmp_path).splitlines()
    assert lines[0] == "step 10 of 10, t = 1"
    assert len(lines) == 15
    assert "@" in "".join(lines[1:])


def test_repair_camera_frame(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    assert run("repair_camera_frame.py", cwd=tmp_path) == "repaired.png: 69 pixels painted\n"
    with Image.open(tmp_path / "repaired.png") as image:
        frame = np.asarray(image)
    assert frame.shape == (480, 640, 3)
    assert (frame.max(axis=2) == frame.min(axis=2)).all()  # nothing is left of the magenta
    assert (frame[212:221, 309:318] > 60).mean() > 0.5  # leather, no hole


def test_anomaly(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("scipy")
    with Generator.load() as generator:
        garments = generator.sample(24, label=[i % 10 for i in range(24)], seed=0)
    noise = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1)).astype(np.uint8)
    np.save(tmp_path / "known.npy", garments[:20])
    np.save(tmp_path / "new.npy", np.concatenate([garments[20:], noise]))
    lines = run("anomaly.py", "known.npy", "new.npy", cwd=tmp_path).splitlines()
    assert len(lines) == 8
    assert all(line.endswith(", foreign") for line in lines[4:7])
    assert sum(line.endswith(", foreign") for line in lines[:4]) <= 2


def test_bounded_latency(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    assert run("bounded_latency.py", 60_000, 3, cwd=tmp_path).endswith("0 stopped early\n")
    assert run("bounded_latency.py", 0.001, 3, cwd=tmp_path).endswith("3 stopped early\n")


def test_train_export_sample(tmp_path: Path) -> None:
    for package in ("torch", "onnx", "onnxruntime"):
        pytest.importorskip(package)
    output = run("train_export_sample.py", tmp_path / "out", 5, cwd=tmp_path)
    assert "20-step DDIM" in output
    assert (tmp_path / "out" / "squares.png").is_file()
