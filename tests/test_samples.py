"""Every program in samples/ runs as it stands and is short enough to copy."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_edge import Bundle, Generator
from ddpm_edge.bundle import write_bundle

SAMPLES = Path(__file__).parents[1] / "samples"


def run(name: str, *arguments: object, cwd: Path) -> str:
    command = [sys.executable, str(SAMPLES / name), *(str(a) for a in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_are_run_here_and_short() -> None:
    here = Path(__file__).read_text()
    for path in SAMPLES.glob("*.py"):
        assert f'"{path.name}"' in here
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


def bulk(total: int, folder: Path, bundle: Path, kill: bool = False) -> list[str]:
    """Run bulk_ray.py on a cluster of two workers; perhaps kill the first that makes a shard."""
    psutil = pytest.importorskip("psutil")
    words = [str(SAMPLES / "bulk_ray.py"), str(total), folder.name, bundle.name]
    code = (
        "import ray, runpy, sys; ray.init(num_cpus=2, include_dashboard=False); "
        f"sys.argv = {words}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    errors = folder.parent / "errors"
    with open(errors, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=file, text=True,
            cwd=folder.parent, env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
        )  # fmt: skip
    deadline = time.monotonic() + 120
    while kill and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                if "ray::_make" in " ".join(child.cmdline()):
                    child.kill()
                    kill = False
                    assert not list(folder.glob("*.npy"))  # none was done
                    break
    said, _ = process.communicate(timeout=300)
    assert not kill
    assert process.returncode == 0, errors.read_text()
    return said.splitlines()


def test_bulk_ray(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("ray")
    built_in, folder = Bundle.open(), tmp_path / "images"
    files = {name: built_in.read(name) for name in built_in.files}
    quick = replace(built_in.manifest, plan={"sampler": "ddim", "steps": 3, "clip": 1.0})
    bundle = write_bundle(tmp_path / "quick", quick, files)
    paths = [folder / f"{bundle.digest[:8]}-{i:09d}.npy" for i in (0, 480, 960)]
    assert bulk(970, folder, bundle.path, kill=True)[-1] == "3 of 3 shards"
    assert sorted(folder.glob("*.npy")) == paths
    with Generator.load(bundle.path, runtime="onnxruntime", threads=1) as generator:
        expected = generator.sample(970, seed=0)
    np.testing.assert_array_equal(np.concatenate([np.load(path) for path in paths]), expected)
    os.unlink(paths[0])
    before = paths[1].stat().st_mtime_ns
    said = bulk(975, folder, bundle.path)  # the last one is longer now
    assert said == ["2 of 3 shards", "3 of 3 shards"]
    assert paths[1].stat().st_mtime_ns == before
    assert [len(np.load(path)) for path in paths] == [480, 480, 15]
    np.testing.assert_array_equal(np.load(paths[0]), expected[:480])
    assert bulk(975, folder, bundle.path) == []
