"""The processor that this process runs on."""

from __future__ import annotations

import contextlib
import functools
import os
import platform

CPUINFO = "/proc/cpuinfo"  # Linux
# What sets the clocks: the mode of a Jetson, by number, and Linux's governor of the first CPU.
POWER_FILES = ("/var/lib/nvpmodel/status", "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def name() -> str:
    """Its model, or at least its architecture."""
    said = _cpuinfo(CPUINFO)
    return said.get("model name") or said.get("Model") or platform.processor() or platform.machine()


def instructions() -> frozenset[str]:
    """What it computes with, in Linux's words such as "avx512_vnni"; empty = not known."""
    said = _cpuinfo(CPUINFO)
    return frozenset((said.get("flags") or said.get("Features", "")).split())


def cpus() -> int:
    """How many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux; elsewhere a process may use all of them
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def power_mode() -> str:
    """What the system says of it, such as "pmode:0002 schedutil"; empty = nothing."""
    said = []
    for path in POWER_FILES:
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            said += file.readline(200).split()
    return " ".join(word for word in said if not word.startswith("fmode:"))  # that is the fan


@functools.cache  # with many CPUs Linux takes milliseconds to write it, and every engine asks
def _cpuinfo(path: str) -> dict[str, str]:
    """What Linux says of it; of each word the first, which is the first CPU's."""
    said: dict[str, str] = {}
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
        for line in file:
            word, _, value = line.partition(":")
            said.setdefault(word.strip(), value.strip())
    return said
