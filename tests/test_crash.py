"""Kill -9 after every single file-system call, and disks that are full: old or new, never mixed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_edge.bundle import Bundle

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and kills the children")

# Runs `act` in forked children, of which the n-th is killed after its n-th file-system call, until
# one ends by itself. `look` says after each what a reader sees; `reset` makes the old state again.
KILLER = """
import ctypes, io, json, os, shutil, signal, sys
from pathlib import Path

folder = Path(sys.argv[1])

def kill_after(calls):
    def count():
        nonlocal calls
        calls -= 1
        if calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function):
        def call(*arguments, **options):
            result = function(*arguments, **options)
            count()
            return result
        return call

    class File(io.FileIO):  # unbuffered: half of the data, then the other half
        def write(self, data):
            data = bytes(data)
            for part in (data[:len(data) // 2], data[len(data) // 2:]):
                view = memoryview(part)
                while view:
                    view = view[super().write(view):]
                count()
            return len(data)

    libc = ctypes.CDLL(None, use_errno=True)

    class Libc:
        renameat2 = staticmethod(counted(libc.renameat2))

    for name in ("open", "fsync", "close", "replace", "rename", "mkdir", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    os.fdopen = lambda handle, mode: File(handle, mode)
    ctypes.CDLL = lambda *_, **__: Libc

def killed_runs(act, look, reset):
    outcomes = []
    while True:
        child = os.fork()
        if child == 0:
            try:
                kill_after(len(outcomes) + 1)
                act()
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(3)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        outcomes.append((status, look()))
        if status != -signal.SIGKILL:
            print(json.dumps(outcomes))
            return
        reset()
"""

EXPORT = """
from dataclasses import replace
from ddpm_edge.bundle import BUILT_IN, Bundle, write_bundle

built_in, path = Bundle.open(), folder / "bundle"
files = {name: built_in.read(name) for name in built_in.files}
files |= {"unet.onnx": b"new" * 1000}

def write(name):
    write_bundle(path, replace(built_in.manifest, name=name), files)

def look():
    if not path.exists():
        return "none"
    opened = Bundle.open(path)
    for name in opened.files:
        opened.read(name)
    return opened.manifest.name

def reset():
    shutil.rmtree(folder)
    folder.mkdir()
    OLD

reset()
killed_runs(lambda: write("new"), look, reset)
"""

CHECKPOINT = """
import torch
from ddpm_edge.train.checkpoint import load_checkpoint, save_checkpoint
from ddpm_edge.train.trainer import EMA, Training

training = Training(torch.nn.Linear(50, 50))
ema = EMA(training.model, 0.9)
(folder / "checkpoints").mkdir()

def save(step):
    training.step = step
    torch.nn.init.constant_(training.model.weight, float(step))
    assert save_checkpoint(folder, training, ema, [])

def look():
    found = load_checkpoint(folder)
    assert (found.part("model")["weight"] == found.step).all()
    return found.step

save(1)
killed_runs(lambda: save(2), look, lambda: save(1))
"""


def outcomes(script: str, folder: Path) -> list[tuple[int, object]]:
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLER + script, str(folder)],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [tuple(outcome) for outcome in json.loads(done.stdout)]


@pytest.mark.parametrize("old", ["old", "none"])
def test_an_export_killed_after_any_call_leaves_the_old_bundle_or_the_new(
    tmp_path: Path, old: str
) -> None:
    prepared = 'write("old")' if old == "old" else "pass"
    *killed, last = outcomes(EXPORT.replace("OLD", prepared), tmp_path / "folder")
    assert last == (0, "new")
    assert len(killed) > 20
    seen = [state for _, state in killed]
    assert set(seen) == {old, "new"}
    assert seen == sorted(seen, key=[old, "new"].index)  # once new, it stays so
    assert os.listdir(tmp_path / "folder") == ["bundle"]  # what runs to its end leaves nothing else


def test_a_checkpoint_killed_after_any_call_is_the_old_one_or_the_new(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    *killed, last = outcomes(CHECKPOINT, tmp_path / "folder")
    assert last == (0, 2)
    assert len(killed) >= 6
    seen = [state for _, state in killed]
    assert seen == sorted(seen)
    assert set(seen) == {1, 2}


# Full disks: a limit on the size of files makes the system's own writes fail

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.argv[1:] = sys.argv[2:]
from ddpm_edge.cli import main
main(prog_name="ddpm-edge")
"""


def limited(limit: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-B", "-c", LIMITED, str(limit), *(str(a) for a in arguments)],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def test_samples_on_a_full_disk(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    target = tmp_path / "a.npy"
    done = limited(2000, "sample", "-n", 4, "--steps", 1, "-o", target)
    assert done.returncode == 1
    assert f"File too large: '{target}'" in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


def test_a_bundle_on_a_full_disk(tmp_path: Path) -> None:
    script = (
        "import resource, sys\nfrom dataclasses import replace\n"
        "from ddpm_edge.bundle import Bundle, write_bundle\n"
        "old = Bundle.open()\nfiles = {name: old.read(name) for name in old.files}\n"
        "write_bundle(sys.argv[1], replace(old.manifest, name='old'), files)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try:\n    write_bundle(sys.argv[1], replace(old.manifest, name='new'), files)\n"
        "except OSError as error:\n    print(error)\n"
    )
    target = tmp_path / "b"
    done = subprocess.run(
        [sys.executable, "-c", script, str(target)], capture_output=True, text=True, check=False
    )
    assert "File too large" in done.stdout, done.stderr
    assert "unet.onnx" in done.stdout
    assert Bundle.open(target).manifest.name == "old"
    assert os.listdir(tmp_path) == ["b"]


def test_a_training_run_on_a_full_disk_keeps_its_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import numpy as np

    np.save(tmp_path / "set.npy", np.random.default_rng(0).integers(0, 256, (8, 8, 8), np.uint8))
    run = tmp_path / "run"
    new = ["train", "--data", tmp_path / "set.npy", "--preset", "tiny", "--batch", 4, "-o", run]
    done = limited(1 << 30, *new, "--steps", 2)
    assert done.returncode == 0, done.stderr
    before = (run / "checkpoints" / "last.safetensors").read_bytes()
    done = limited(20_000, "train", "-o", run, "--resume", "--steps", 4)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "last.safetensors" in done.stderr
    assert (run / "checkpoints" / "last.safetensors").read_bytes() == before
    assert os.listdir(run / "checkpoints") == ["last.safetensors"]
    done = limited(1 << 30, "train", "-o", run, "--resume", "--steps", 4)
    assert "done after 4 steps" in done.stdout, done.stderr
