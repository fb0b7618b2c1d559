"""A training run on disk: `config.json, metrics.jsonl, samples/, checkpoints/`.

`record` wraps the trainer's generator and keeps the averaged weights, the metrics and the
checkpoints; `load_run` gives the averaged network back for export.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn

from ddpm_edge.arrays import UInt8
from ddpm_edge.bundle import Manifest
from ddpm_edge.errors import RunError
from ddpm_edge.files import write_bytes
from ddpm_edge.images import save_grid, to_images
from ddpm_edge.sampling import Network, sample_states
from ddpm_edge.schedule import Schedule
from ddpm_edge.train.data import Dataset
from ddpm_edge.train.torch_engine import TorchEngine
from ddpm_edge.train.trainer import (
    EMA,
    TIMESTEP_OFFSET,
    TrainOptions,
    TrainStep,
    resolve_device,
    resolve_precision,
    train,
)
from ddpm_edge.train.unet import UNet, UNetConfig

LOG_STEPS = 50
CHECKPOINT_SECONDS = 120.0
GRIDS = 10
GRID_STEPS = 20
RUN_FORMAT = 1


@dataclass(frozen=True)
class Run:
    """A training run read back: the averaged network and what it was trained with."""

    model: UNet
    schedule: Schedule
    config: dict[str, Any]
    step: int
    loss: float | None  # mean over the last logged steps

    @property
    def provenance(self) -> dict[str, Any]:
        """How the weights came to be, for the bundle."""
        keys = ("command", "data", "images", "preset", "options", "hardware", "software")
        return {k: self.config[k] for k in keys} | {"steps": self.step, "final_loss": self.loss}


def record(
    directory: Path,
    data: Dataset,
    config: UNetConfig,
    schedule: Schedule,
    options: TrainOptions,
    preset: str,
    command: str = "called from Python",
) -> Generator[TrainStep, None, None]:
    """Train a new network into `directory`, which must be new or empty; yields every step.

    The checkpoint is written every two minutes and when the iteration ends, however it ends; a
    grid of samples of the averaged weights ten times and at the end.

    Args:
        directory: the run.
        data: what to train on.
        config: of the network.
        schedule: the forward process.
        options: how to train.
        preset: name of the network's preset, for the record.
        command: what was typed, for the record.

    Raises:
        RunError: `directory` is not empty.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise RunError(f"{directory} exists and is not empty; give a new directory")
    device = resolve_device(options.device)
    torch.manual_seed(options.seed)
    model = UNet(config).to(device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = EMA(model, options.ema)
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "samples").mkdir()
    description = {
        "format": RUN_FORMAT,
        "name": data.name,
        "data": data.name,
        "images": len(data.images),
        "class_names": list(data.class_names),
        "preset": preset,
        "unet": config.to_dict(),
        "schedule": schedule.to_dict(),
        "prediction": "eps",
        "timestep_offset": TIMESTEP_OFFSET,
        "options": asdict(options),
        "command": command,
        "hardware": hardware(device, resolve_precision(options.precision, device)),
        "software": f"Python {platform.python_version()}, torch {torch.__version__}",
    }
    write_bytes(directory / "config.json", json.dumps(description, indent=2).encode() + b"\n")

    manifest = Manifest(
        name=data.name,
        sample_shape=data.sample_shape,
        schedule=schedule,
        prediction="eps",
        timestep_offset=TIMESTEP_OFFSET,
        class_names=data.class_names,
        plan={"sampler": "ddim", "steps": min(GRID_STEPS, schedule.T), "clip": 1.0},
        variants={},
    )
    engine = TorchEngine(ema.model, data.sample_shape, bool(data.class_names))
    network = Network(engine, manifest)
    grids = 0

    saved, losses, step = time.monotonic(), [], None
    with open(directory / "metrics.jsonl", "a", encoding="utf-8") as metrics:
        try:
            for step in train(model, data, schedule, options):
                ema.update(model)
                losses.append(step.loss)
                if step.step % LOG_STEPS == 0 or step.fraction >= 1:
                    metrics.write(json.dumps(metrics_line(step, losses)) + "\n")
                    metrics.flush()
                    losses.clear()
                if step.fraction * GRIDS >= grids + 1 or step.fraction >= 1:
                    grids = int(step.fraction * GRIDS)
                    save_grid(sample(network), directory / "samples" / f"{step.step:07d}.png")
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    save_checkpoint(directory, model, ema.model, step.step)
                    saved = time.monotonic()
                yield step
        finally:
            if step is not None:
                save_checkpoint(directory, model, ema.model, step.step)


def sample(network: Network) -> UInt8:
    """Sixteen images of a network as it is now, the labels in turn; uint8 (16, H, W, C)."""
    classes = len(network.manifest.class_names)
    labels = np.arange(16) % classes if classes else None
    *_, last = sample_states(network, network.manifest.make_plan(), 0, range(16), labels)
    return to_images(last.x)


def metrics_line(step: TrainStep, losses: list[torch.Tensor]) -> dict[str, float]:
    """One line of metrics.jsonl; the loss is the mean since the line before."""
    return {
        "step": step.step,
        "loss": round(float(torch.stack(losses).mean()), 6),
        "learning_rate": step.learning_rate,
        "images": step.images,
        "seconds": round(step.seconds, 2),
    }


def save_checkpoint(directory: Path, model: nn.Module, average: nn.Module, step: int) -> None:
    """Atomically write the weights and their average to `checkpoints/last.safetensors`."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in average.state_dict().items()}
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    data = safetensors.torch.save(tensors, {"step": str(step)})
    write_bytes(directory / "checkpoints" / "last.safetensors", data)


def load_run(directory: Path) -> Run:
    """The averaged network of a run, on the CPU, ready to evaluate.

    Raises:
        RunError: `directory` is not a run, or it has no checkpoint yet, or it is damaged.
    """
    config_path = directory / "config.json"
    checkpoint = directory / "checkpoints" / "last.safetensors"
    if not config_path.is_file():
        raise RunError(
            f"{directory} is not a training run: it has no config.json; give the directory that "
            "`ddpm-edge train -o` wrote"
        )
    if not checkpoint.is_file():
        raise RunError(f"{directory} has no {checkpoint.relative_to(directory)} yet; train longer")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        if config["format"] != RUN_FORMAT:
            raise RunError(
                f"{directory} has run format {config['format']}, this version reads {RUN_FORMAT}"
            )
        model = UNet(UNetConfig.from_dict(config["unet"])).eval()
        schedule = Schedule.from_dict(config["schedule"])
        with safetensors.safe_open(checkpoint, framework="pt") as file:
            step = int(file.metadata()["step"])
            names = [k for k in file.keys() if k.startswith("ema.")]  # noqa: SIM118
            model.load_state_dict({k.removeprefix("ema."): file.get_tensor(k) for k in names})
    except (KeyError, ValueError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{directory} is damaged: {type(error).__name__}: {error}") from error
    return Run(model, schedule, config, step, last_loss(directory))


def last_loss(directory: Path) -> float | None:
    """The newest loss in metrics.jsonl."""
    path = directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return float(json.loads(lines[-1])["loss"]) if lines else None


def hardware(device: torch.device, precision: str) -> str:
    """What trains, in words, for the record."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {precision}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return f"{torch.get_num_threads()} cores of {model}, {precision}"
