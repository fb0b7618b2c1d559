"""The processor that this process runs on."""

from __future__ import annotations

import contextlib
import os
import platform

CPUINFO = "/proc/cpuinfo"  # Linux


def name() -> str:
    """Its model, or at least its architecture."""
    said = _cpuinfo()
    return said.get("model name") or said.get("Model") or platform.processor() or platform.machine()


def instructions() -> frozenset[str]:
    """What it computes with, in Linux's words such as "avx512_vnni"; empty = not known."""
    said = _cpuinfo()
    return frozenset((said.get("flags") or said.get("Features", "")).split())


def cpus() -> int:
    """How many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux; elsewhere a process may use all of them
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpuinfo() -> dict[str, str]:
    """What Linux says of it; of each word the first, which is the first CPU's."""
    said: dict[str, str] = {}
    with contextlib.suppress(OSError), open(CPUINFO, encoding="utf-8") as file:
        for line in file:
            word, _, value = line.partition(":")
            said.setdefault(word.strip(), value.strip())
    return said
