"""The soak benchmark would notice: its slope is right, and it finds a leak that was planted."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("resource")  # not on Windows

from benchmarks import soak

SCRIPT = Path(soak.__file__)


def test_slope_of_a_line_and_of_none() -> None:
    calls = np.arange(1000)
    assert soak.slope(100_000_000 + 1500 * calls) == pytest.approx(1500)
    assert soak.slope(np.full(1000, 123_456_789)) == 0
    assert soak.slope(100_000_000 - 10 * calls) == pytest.approx(-10)


def test_slope_of_pages_and_noise_is_the_leak_beneath() -> None:
    rng = np.random.default_rng(0)
    calls = np.arange(10_000)
    leak = (
        100_000_000 + 1500 * calls + rng.normal(0, 500_000, len(calls))
    )  # the arena comes and goes
    pages = (leak // 4096 * 4096).astype(np.int64)
    # the slope's standard deviation: 500 kB sqrt(12 / 8000**3) = 2.4
    assert soak.slope(pages) == pytest.approx(1500, abs=12)


def test_slope_leaves_out_the_warm_up() -> None:
    readings = np.full(1000, 200_000_000)
    readings[:200] = np.linspace(50e6, 200e6, 200)
    assert soak.slope(readings) == 0


def test_a_piece_more_of_a_gpu_is_no_leak() -> None:
    readings = np.full(1000, 64 * soak.PIECE)
    readings[500:] += soak.PIECE
    assert soak.slope(readings) > soak.LIMIT
    assert not soak.grows(readings, soak.PIECE)
    assert soak.grows(readings, 0)
    readings[800:] += soak.PIECE
    assert soak.grows(readings, soak.PIECE)


def test_resident_memory_grows_with_what_is_held() -> None:
    before = soak.resident()
    held = np.ones(8_000_000)  # 64 MB
    assert 20_000_000 < before < soak.resident() - held.nbytes / 2


@pytest.mark.parametrize("leak", [0, 500_000])
def test_a_planted_leak_is_found(leak: int) -> None:
    pytest.importorskip("onnxruntime")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--calls", "150", "--leak", str(leak)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.stderr == ""
    match = re.match(r"150 calls in \d+ s: ([+-][\d.]+) bytes a call, limit 1024;", done.stdout)
    assert match, done.stdout
    growth = float(match[1])
    # so few calls still see the runtime settle: some KB a call, a hundredth of the leak
    assert abs(growth - leak) < 100_000
    assert done.returncode == (1 if growth >= soak.LIMIT else 0)
