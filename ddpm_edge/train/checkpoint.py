"""Checkpoints: everything that a training needs to go on exactly, in one safetensors file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ddpm_edge.errors import RunError
from ddpm_edge.files import write_bytes
from ddpm_edge.train.trainer import EMA, Training


def checkpoint_path(run: Path) -> Path:
    """Where the checkpoint of a run is."""
    return run / "checkpoints" / "last.safetensors"


def save_checkpoint(run: Path, training: Training, ema: EMA, losses: Sequence[Tensor]) -> bool:
    """Atomically write the checkpoint of a run; whether it did.

    Weights that are not finite are of no use to anybody: the checkpoint before them then stays.

    Args:
        run: its directory.
        training: weights, optimiser, step and time.
        ema: the averaged weights.
        losses: of the steps since the last line of metrics, scalars.
    """
    if not all(bool(p.isfinite().all()) for p in training.model.parameters()):
        return False
    tensors = {f"model.{k}": v for k, v in training.model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.model.state_dict().items()}
    for name, parameter in training.model.named_parameters():
        for what, value in training.optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{what}"] = value
    tensors["losses"] = torch.stack([loss.cpu() for loss in losses]) if losses else torch.empty(0)
    metadata = {
        "step": str(training.step),
        "seconds": repr(training.seconds),
        "ema_updates": str(ema.updates),
    }
    # Copies, because safetensors refuses tensors that share memory, as tied weights do.
    copies = {
        k: v.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for k, v in tensors.items()
    }
    data = safetensors.torch.save(copies, metadata)
    write_bytes(checkpoint_path(run), data)
    return True


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back, on the CPU."""

    step: int
    seconds: float
    ema_updates: int
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors called `prefix.NAME`, by NAME."""
        start = f"{prefix}."
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}

    def restore(self, training: Training, ema: EMA) -> list[Tensor]:
        """Put a training where the checkpoint was taken; gives the losses since the last metrics.

        Raises:
            RunError: the checkpoint is of another network.
        """
        load_state(training.model, self.part("model"))
        load_state(ema.model, self.part("ema"))
        ema.updates, training.step, training.seconds = self.ema_updates, self.step, self.seconds
        moments = self.part("optimizer")
        state: dict[int, dict[str, Tensor]] = {}
        for i, (name, parameter) in enumerate(training.model.named_parameters()):
            start = f"{name}."
            mine = {k.removeprefix(start): v for k, v in moments.items() if k.startswith(start)}
            for what, value in mine.items():
                if value.shape == parameter.shape:  # fused Adam wants the parameter's strides
                    mine[what] = torch.empty_like(parameter).copy_(value)
            if mine:
                state[i] = mine
        groups = training.optimizer.state_dict()["param_groups"]
        training.optimizer.load_state_dict({"state": state, "param_groups": groups})
        return list(self.tensors["losses"])


def load_checkpoint(run: Path) -> Checkpoint:
    """Read the checkpoint of a run.

    Raises:
        RunError: there is none yet, or it is damaged.
    """
    path = checkpoint_path(run)
    if not path.is_file():
        raise RunError(
            f"{run} has no {path.relative_to(run)}: let it train for two minutes or to its end; if "
            "it was killed before, remove it and start again"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        return Checkpoint(
            step=int(metadata["step"]),
            seconds=float(metadata["seconds"]),
            ema_updates=int(metadata["ema_updates"]),
            tensors=tensors,
        )
    except (KeyError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise RunError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def load_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load all weights of a network, or raise RunError."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise RunError(f"the weights do not fit the network: {error}") from error
