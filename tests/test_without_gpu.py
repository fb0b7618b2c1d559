"""A machine without a GPU: what needs one says so at once, whatever is installed."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
from ddpm_edge import Generator
from ddpm_edge.errors import RuntimeUnavailableError
from ddpm_edge.runtimes import cuda


def has_gpu() -> bool:
    try:
        cuda.gpu()
    except RuntimeUnavailableError:
        return False
    return True


pytestmark = pytest.mark.skipif(has_gpu(), reason="there is a GPU")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["sample", "-o", "x.png", "--runtime", "tensorrt"], "ddpm-edge"),
        (["sample", "-o", "x.png", "--runtime", "tensorrt", "--build", "missing"], "ddpm-edge"),
        (["sample", "-o", "x.png", "--device", "cuda"], "use device='cpu'"),
        (["verify", "--runtime", "tensorrt", "--device", "cuda:1"], "ddpm-edge"),
        (["bench", "--device", "cuda:0"], "use device='cpu'"),
        (["build"], "ddpm-edge"),
        (["build", "--device", "cuda:1", "--json"], "ddpm-edge"),
        (["export", "-o", "b", "--variants", "fp32", "--format", "tensorrt"], "leave it out, and"),
    ],
)
def test_what_needs_a_gpu_fails_at_once(command: list[str], message: str, tmp_path: Path) -> None:
    """In a process of its own, where a crash of native code would show."""
    done = subprocess.run(
        [sys.executable, "-m", "ddpm_edge", *command],
        capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr
    said = "CUDA does not work here" if importlib.util.find_spec("cuda") else "cuda-bindings"
    assert said in done.stderr
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_auto_takes_the_cpu_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ddpm_edge")
    with Generator.load() as generator:
        assert generator.runtime == "onnxruntime on cpu"
        assert generator.run(1, steps=1).runtime == "onnxruntime on cpu"
    assert "not tensorrt: " in caplog.text
    assert "runtime onnxruntime on cpu" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
