"""Which TensorRT: the one of servers and Jetsons, or TensorRT for RTX of desktop GPUs.

Both have the same API, so that whoever holds a `Flavour` need not know which it is.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ddpm_edge.errors import RuntimeUnavailableError
from ddpm_edge.runtimes.cuda import GPU, REMEDY

MODULES = ("tensorrt", "tensorrt_rtx")
TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}
OLDEST = {"tensorrt": (10, 3), "tensorrt_rtx": (1, 0)}
RTX = re.compile(r"\b(GeForce|RTX)\b")  # GPUs that TensorRT for RTX is made for


@dataclass(frozen=True)
class Flavour:
    """An importable TensorRT.

    Attributes:
        name: "tensorrt" or "tensorrt_rtx".
        version: of the library, such as "10.3.0".
        trt: the module.
    """

    name: str
    version: str
    trt: Any

    @property
    def keeps_timings(self) -> bool:
        """Whether a build measures what a later one can take over; TensorRT for RTX does not."""
        return self.name == MODULES[0]

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def flavour(name: str) -> Flavour:
    """Import a TensorRT. Ask `cuda.gpu` first where a GPU is needed.

    Raises:
        RuntimeUnavailableError: it is not installed, does not load, or is too old.
    """
    try:
        trt = importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: a library that it loads itself
        raise RuntimeUnavailableError(f"{name} cannot be imported ({error}); {REMEDY}") from error
    version = str(trt.__version__)
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST[name]:
        raise RuntimeUnavailableError(
            f"{name} {version} is too old; expected {'.'.join(map(str, OLDEST[name]))} or later "
            "(JetPack 6.1 on a Jetson)"
        )
    return Flavour(name, version, trt)


def installed() -> Iterator[Flavour | RuntimeUnavailableError]:
    """Every flavour, or why it cannot be used."""
    for name in MODULES:
        try:
            yield flavour(name)
        except RuntimeUnavailableError as error:
            yield error


def flavour_for(gpu: GPU) -> Flavour:
    """The flavour to use with a GPU: TensorRT for RTX with the GPUs it is made for.

    Where only one is installed, that one.

    Raises:
        RuntimeUnavailableError: none is installed.
    """
    found = list(installed())
    usable = {f.name: f for f in found if isinstance(f, Flavour)}
    if not usable:
        raise RuntimeUnavailableError("; ".join(map(str, found)))
    wanted = MODULES[1] if RTX.search(gpu.name) else MODULES[0]
    return usable.get(wanted) or next(iter(usable.values()))
