"""What the system says of the processor."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ddpm_edge import processor

X86 = """processor\t: 0
model name\t: Quick CPU @ 3 GHz: new
flags\t\t: fpu avx2 avx512_vnni

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
JETSON = """processor\t: 0
Features\t: fp asimd asimddp
CPU part\t: 0xd42

Model\t\t: Jetson Orin
"""


@pytest.mark.parametrize(
    ("text", "name", "instructions"),
    [
        (X86, "Quick CPU @ 3 GHz: new", {"fpu", "avx2", "avx512_vnni"}),
        (JETSON, "Jetson Orin", {"fp", "asimd", "asimddp"}),
    ],
)
def test_linux(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, name: str, instructions: set[str]
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(processor, "CPUINFO", str(tmp_path / "cpuinfo"))
    assert processor.name() == name
    assert processor.instructions() == instructions


def test_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "CPUINFO", str(tmp_path / "nothing"))
    assert processor.name()
    assert processor.instructions() == frozenset()


def test_cpus() -> None:
    assert 1 <= processor.cpus() <= (os.cpu_count() or 1)


def test_power_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, governor = tmp_path / "status", tmp_path / "governor"
    monkeypatch.setattr(processor, "POWER_FILES", (str(status), str(governor)))
    assert processor.power_mode() == ""
    status.write_text("pmode:0002 fmode:cool\n")
    assert processor.power_mode() == "pmode:0002"
    governor.write_text("schedutil\n")
    assert processor.power_mode() == "pmode:0002 schedutil"
