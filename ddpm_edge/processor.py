"""The processor that this process runs on."""

from __future__ import annotations

import contextlib
import functools
import os
import platform

CPUINFO = "/proc/cpuinfo"  # Linux


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


@functools.cache  # with many CPUs Linux takes milliseconds to write it, and every engine asks
def _cpuinfo(path: str) -> dict[str, str]:
    """What Linux says of it; of each word the first, which is the first CPU's."""
    said: dict[str, str] = {}
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
        for line in file:
            word, _, value = line.partition(":")
            said.setdefault(word.strip(), value.strip())
    return said
