"""The processes that train together: one, or those that `accelerate launch` started.

Gradients are averaged over the processes (torch's DistributedDataParallel, set up by Hugging Face
Accelerate), so n processes with batch B train as one with batch n B.
"""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_edge.errors import ConfigError, RuntimeUnavailableError


@dataclass(frozen=True)
class Workers:
    """This process among `count`; `index` 0 is the one that writes files.

    Attributes:
        device: what this process computes on.
        index: 0..count - 1.
        count: how many train together.
    """

    device: torch.device
    index: int = 0
    count: int = 1
    _accelerator: Any = None

    @classmethod
    def join(cls, device: str = "auto") -> Workers:
        """This process alone, or among those of `accelerate launch`.

        Args:
            device: "cpu", "cuda", "cuda:1" ... or "auto". Several processes take a GPU each.

        Raises:
            ConfigError: no such device.
            RuntimeUnavailableError: started as one of several, without accelerate installed.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(resolve_device(device))
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise RuntimeUnavailableError(
                f"several processes train through Hugging Face Accelerate ({error}); "
                "pip install 'ddpm-edge[train]'"
            ) from error
        if ":" in device:
            raise ConfigError(f"device {device!r} is for one process; several take cuda or cpu")
        accelerator = Accelerator(
            cpu=resolve_device(device).type == "cpu", mixed_precision="no", log_with=None
        )
        atexit.register(_leave, accelerator)
        return cls(
            accelerator.device, accelerator.process_index, accelerator.num_processes, accelerator
        )

    def share(self, model: nn.Module) -> nn.Module:
        """The model whose `backward` averages gradients over all processes."""
        if self._accelerator is None:
            return model
        shared: nn.Module = self._accelerator.prepare_model(model)
        return shared

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        if self._accelerator is None:
            return value
        mean: Tensor = self._accelerator.reduce(value, "mean")
        return mean

    def agree(self, value: float) -> float:
        """The number that process 0 has: clocks differ, and all must stop at the same step."""
        if self._accelerator is None:
            return value
        own = torch.tensor(value if self.index == 0 else 0.0, dtype=torch.float64).to(self.device)
        return float(self._accelerator.reduce(own, "sum"))

    def rows(self, whole: Tensor) -> Tensor:
        """The rows of a whole batch, (count B, ...), that are this process's: (B, ...)."""
        return whole if self.count == 1 else whole.chunk(self.count)[self.index]


def _leave(accelerator: Any) -> None:
    """End the process group, and its threads, while there is an interpreter.

    A thread that still holds a tensor of the last sum when Python ends aborts the process.
    The group ends only when no model refers to it.
    """
    accelerator.free_memory()
    accelerator.end_training()


def resolve_device(name: str) -> torch.device:
    """The torch device called `name`; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if name != "cpu" and not (kind == "cuda" and (name == kind or number.isdecimal())):
        raise ConfigError(f"no device {name!r}; use auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(number or 0) >= (there := torch.cuda.device_count()):
        raise ConfigError(
            f"device {name!r} was asked for, but torch sees {there or 'no'} GPUs; use cpu, or "
            "install the torch that fits the driver"
        )
    return torch.device(name)


def resolve_precision(name: str, device: torch.device) -> str:
    """Resolve "auto" to "bf16" where the device computes in it, else to "fp32"."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    computes = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)  # torch has no public word
    return "bf16" if computes() else "fp32"
