"""A training run on disk: `config.json, metrics.jsonl, samples/, checkpoints/`.

`record` and `resume` wrap the trainer's generator and keep the averaged weights, the metrics and
the checkpoints; `load_run` gives the averaged network back for export.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import platform
import shutil
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_edge import processor
from ddpm_edge.arrays import UInt8
from ddpm_edge.data import Dataset
from ddpm_edge.errors import ConfigError, RunError, TrainingError
from ddpm_edge.files import write_bytes
from ddpm_edge.images import save_grid, to_images
from ddpm_edge.manifest import Manifest
from ddpm_edge.plan import check_prediction
from ddpm_edge.samplers import default_plan
from ddpm_edge.sampling import Network, sample_states
from ddpm_edge.schedule import Schedule
from ddpm_edge.train.checkpoint import (
    checkpoint_path,
    load_checkpoint,
    load_state,
    save_checkpoint,
)
from ddpm_edge.train.draws import Draws, number
from ddpm_edge.train.network import build, check_network, initialise, load_weights
from ddpm_edge.train.torch_engine import TorchEngine
from ddpm_edge.train.trainer import (
    EMA,
    TIMESTEP_OFFSET,
    Algorithm1,
    Training,
    TrainOptions,
    TrainStep,
    memory_remedy,
    progress,
    to_network,
    train,
)
from ddpm_edge.train.unet import UNetConfig
from ddpm_edge.train.workers import Workers, resolve_precision

LOG_STEPS = 50
CHECKPOINT_SECONDS = 120.0
GRIDS = 10
VALIDATION_IMAGES = 1000
JUDGE_BATCH = 16  # images at once, or fewer where training takes fewer
RUN_FORMAT = 1

log = logging.getLogger("ddpm_edge")

Recording = Generator[TrainStep, None, None]


@dataclass(frozen=True)
class Run:
    """A training run read back: the averaged network and what it was trained with."""

    model: nn.Module
    schedule: Schedule
    config: dict[str, Any]
    step: int
    loss: float | None  # of the last line of metrics

    @property
    def provenance(self) -> dict[str, Any]:
        """How the weights came to be, for the bundle."""
        keys = ("command", "data", "images", "preset", "init_from", "options", "hardware",
                "software")  # fmt: skip
        return {k: self.config[k] for k in keys} | {"steps": self.step, "final_loss": self.loss}


def record(
    directory: Path,
    data: Dataset,
    network: UNetConfig | str,
    schedule: Schedule,
    options: TrainOptions,
    *,
    validation: Dataset | None = None,
    init_from: Path | None = None,
    preset: str = "",
    source: dict[str, Any] | None = None,
    command: str = "called from Python",
) -> Recording:
    """Train a new network into `directory`, which must be new or empty; yields every step.

    The checkpoint is written every two minutes and when the iteration ends or is closed (an
    exception in the midst of a step leaves the one before it); a grid of samples of the averaged
    weights, and their loss on `validation`, ten times and at the end.

    Args:
        directory: the run.
        data: what to train on.
        network: a U-Net, or "package.module:function" that returns a network of your own.
        schedule: the forward process.
        options: how to train.
        validation: images held out, to measure the loss on.
        init_from: a run or a .safetensors file to take the first weights from.
        preset: name of the network's preset, for the record.
        source: how `data` was read, for the record: `resume` on the command line reads it again.
        command: what was typed, for the record.

    Raises:
        RunError: `directory` is not empty, or `init_from` does not fit.
        TrainingError: out of memory, or the loss is not finite.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise RunError(
            f"{directory} exists and is not empty; give a new directory, or go on with --resume"
        )
    check_prediction(options.prediction, schedule)
    workers = Workers.join(options.device)
    model_description = (
        {"factory": network} if isinstance(network, str) else {"unet": network.to_dict()}
    )
    description = {
        "format": RUN_FORMAT,
        "name": data.name,
        "data": data.name,
        "images": len(data.images),
        "data_sha256": data.sha256(),
        "sample_shape": list(data.sample_shape),
        "class_names": list(data.class_names),
        "validation": list(validation.names) if validation is not None else [],
        "source": source,
        "preset": preset,
        "network": model_description,
        "schedule": schedule.to_dict(),
        "prediction": options.prediction,
        "timestep_offset": TIMESTEP_OFFSET,
        "options": asdict(options),
        "processes": workers.count,
        "init_from": str(init_from) if init_from is not None else None,
        "command": command,
        "hardware": hardware(workers, resolve_precision(options.precision, workers.device)),
        "software": f"Python {platform.python_version()}, torch {torch.__version__}",
    }
    torch.manual_seed(number(options.seed, "weights"))
    model = build(model_description)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("the network has no parameter to train: none requires a gradient")
    check_network(copy.deepcopy(model).eval(), data.sample_shape, bool(data.class_names))
    if init_from is not None:
        fitted, misfits = initialise(model, load_weights(init_from))
        log.info("%d tensors begin as in %s", fitted, init_from)
        for line in misfits:
            log.info("not taken: %s", line)
    training, ema = _on_device(model, options, workers)
    there = directory.exists()
    try:
        if workers.index == 0:
            (directory / "checkpoints").mkdir(parents=True)
            (directory / "samples").mkdir()
            _write_config(directory, description)
        recording = _recorded(directory, description, training, ema, [], data, validation, workers)
        yield from _with_remedy(directory, recording)
    finally:
        if workers.index == 0 and not checkpoint_path(directory).is_file():
            _remove_run(directory, keep=there)  # nothing to go on from: the name is free again


def _remove_run(directory: Path, keep: bool) -> None:
    """Remove the files of a run, and its directory if it is not to be kept."""
    for name in ("checkpoints", "samples"):
        shutil.rmtree(directory / name, ignore_errors=True)
    for name in ("config.json", "metrics.jsonl"):
        (directory / name).unlink(missing_ok=True)
    if not keep:
        with contextlib.suppress(OSError):  # somebody put a file of his own there
            directory.rmdir()


def resume(
    directory: Path,
    data: Dataset,
    *,
    validation: Dataset | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    device: str | None = None,
) -> Recording:
    """Go on with a run exactly where its checkpoint was taken; yields every further step.

    With the same `steps` the run ends with the losses and weights that it would have had without
    the interruption (on one kind of device; on a GPU some sums have no fixed order).

    Args:
        directory: the run.
        data: the same images as before.
        validation: the same images held out.
        steps: a new end, counted from the beginning. Given this or `minutes`, the old end no
            longer counts; a later one stretches the decay of the learning rate.
        minutes: a new end in minutes of training altogether.
        device: None = as before.

    Raises:
        RunError: not a run, other data, nothing left to do.
        TrainingError: see `record`.
    """
    config = read_config(directory)
    if data.sha256() != config["data_sha256"]:
        raise RunError(
            f"the data are not those that {directory} was trained on ({config['images']} images "
            f"then, {len(data.images)} now, SHA-256 {config['data_sha256'][:12]} then, "
            f"{data.sha256()[:12]} now; another version of Pillow may decode JPEG differently); "
            "give the same data, or start a new run with --init-from"
        )
    options = TrainOptions(**config["options"])
    if steps is not None or minutes is not None:
        options = replace(options, steps=steps, minutes=minutes)
    if device is not None:
        options = replace(options, device=device)
    workers = Workers.join(options.device)
    if workers.count != config["processes"]:
        raise RunError(
            f"{directory} was trained by {config['processes']} processes, now there are "
            f"{workers.count}; start as many, or start a new run with --init-from"
        )
    training, ema = _on_device(build(config["network"]), options, workers)
    losses = [loss.to(workers.device) for loss in load_checkpoint(directory).restore(training, ema)]
    if progress(options, training.step, training.seconds) >= 1:
        raise RunError(
            f"{directory} is already trained to its end ({training.step} steps); give more "
            "--steps or --minutes, or start a new run with --init-from"
        )
    config |= {
        "options": asdict(options),
        "resumed_at": [*config.get("resumed_at", []), training.step],
    }
    if workers.index == 0:
        for torn in (directory / "checkpoints").glob(".*.tmp"):  # a kill in the middle of writing
            torn.unlink()
        keep_metrics(directory, training.step)
        _write_config(directory, config)
    recording = _recorded(directory, config, training, ema, losses, data, validation, workers)
    yield from _with_remedy(directory, recording)


def _on_device(model: nn.Module, options: TrainOptions, workers: Workers) -> tuple[Training, EMA]:
    model = model.to(workers.device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Training(model), EMA(model, options.ema)


def _recorded(
    directory: Path,
    config: dict[str, Any],
    training: Training,
    ema: EMA,
    losses: list[Tensor],
    data: Dataset,
    validation: Dataset | None,
    workers: Workers,
) -> Recording:
    """Train, and let process 0 keep the run's files."""
    options = TrainOptions(**config["options"])
    schedule = Schedule.from_dict(config["schedule"])
    steps = train(training, data, schedule, options, workers)
    if workers.index:
        for step in steps:
            ema.update(training.model)
            yield step
        return
    judge = Judge(ema.model, config, data, validation, workers.device)
    grids = int(progress(options, training.step, training.seconds) * GRIDS)
    saved, whole = time.monotonic(), False
    with open(directory / "metrics.jsonl", "a", encoding="utf-8") as metrics:
        try:
            for step in steps:
                ema.update(training.model)
                losses.append(step.loss)
                whole = True
                due = int(step.fraction * GRIDS) > grids or step.fraction >= 1
                grids = int(step.fraction * GRIDS)
                if due or step.step % LOG_STEPS == 0:
                    check_finite(losses, step.step, options)
                    line = metrics_line(step, losses)
                    if due:
                        with memory_remedy(judge.batch):
                            line |= judge(directory / "samples" / f"{step.step:07d}.png")
                    metrics.write(json.dumps(line) + "\n")
                    metrics.flush()
                    losses.clear()
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    save_checkpoint(directory, training, ema, losses)
                    saved = time.monotonic()
                yield step
                whole = False  # weights, average and losses are of one step only between steps
            whole = True
        finally:
            if whole:
                save_checkpoint(directory, training, ema, losses)


def _with_remedy(directory: Path, recording: Recording) -> Recording:
    """Say, when training fails, what is left to go on from."""
    try:
        yield from recording
    except TrainingError as error:
        left = "no checkpoint was written before that"
        if checkpoint_path(directory).is_file():
            left = (
                f"the last good checkpoint is of step {load_checkpoint(directory).step}; start a "
                f"new run from it with --init-from {directory}"
            )
        raise TrainingError(f"{error}; {left}") from error


def check_finite(losses: Sequence[Tensor], step: int, options: TrainOptions) -> None:
    """Raise TrainingError if one of the losses up to `step` is not a number."""
    wrong = (~torch.stack(list(losses)).isfinite()).nonzero()
    if len(wrong):
        first = step - len(losses) + 1 + int(wrong[0])
        raise TrainingError(
            f"the loss of step {first} is {float(losses[int(wrong[0])])}; give a lower --lr than "
            f"{options.learning_rate:g}, or --precision fp32"
        )


class Judge:
    """Looks at the averaged weights now and then: a grid of samples, the loss on other images."""

    def __init__(
        self,
        model: nn.Module,
        config: dict[str, Any],
        data: Dataset,
        validation: Dataset | None,
        device: torch.device,
    ) -> None:
        schedule = Schedule.from_dict(config["schedule"])
        self.model, self.device = model, device
        self.validation = validation
        self.seed = config["options"]["seed"]
        self.batch = min(JUDGE_BATCH, config["options"]["batch"])
        manifest = Manifest(
            name=data.name,
            sample_shape=data.sample_shape,
            schedule=schedule,
            prediction=config["prediction"],
            timestep_offset=TIMESTEP_OFFSET,
            class_names=data.class_names,
            plan=default_plan(schedule),
            variants={},
        )
        engine = TorchEngine(model, data.sample_shape, bool(data.class_names))
        self.network = Network(engine, manifest)
        classes = len(data.class_names)
        self.objective = Algorithm1(schedule, config["prediction"], 0.0, classes, device)

    def __call__(self, grid: Path) -> dict[str, float]:
        """Write the grid; gives {"validation_loss": ...} where there is validation."""
        save_grid(self.sample(), grid)
        if self.validation is None:
            return {}
        return {"validation_loss": round(self.validation_loss(self.validation), 6)}

    def sample(self) -> UInt8:
        """Sixteen images, the labels in turn; uint8 (16, H, W, C)."""
        classes = len(self.network.manifest.class_names)
        labels = np.arange(16) % classes if classes else None
        plan, images = self.network.manifest.make_plan(), []
        for first in range(0, 16, self.batch):
            part = range(first, min(first + self.batch, 16))
            chosen = None if labels is None else labels[part.start : part.stop]
            *_, last = sample_states(self.network, plan, 0, part, chosen)
            images.append(to_images(last.x))
        return np.concatenate(images)

    @torch.no_grad()
    def validation_loss(self, data: Dataset) -> float:
        """Mean loss of at most a thousand images, at the same t and eps every time."""
        total, count = 0.0, min(len(data.images), VALIDATION_IMAGES)
        for first in range(0, count, self.batch):
            part = slice(first, min(first + self.batch, count))
            x0 = to_network(torch.from_numpy(data.images[part]).to(self.device))
            label = None
            if data.labels is not None:
                label = torch.from_numpy(data.labels[part]).to(self.device)
            draws = Draws(len(x0), Workers(self.device), self.seed, "validation", first)
            total += len(x0) * float(self.objective.loss(self.model, x0, label, draws))
        return total / count


def metrics_line(step: TrainStep, losses: list[Tensor]) -> dict[str, float]:
    """One line of metrics.jsonl; the loss is the mean since the line before."""
    return {
        "step": step.step,
        "loss": round(float(torch.stack(losses).mean()), 6),
        "learning_rate": step.learning_rate,
        "images": step.images,
        "seconds": round(step.seconds, 2),
    }


def keep_metrics(directory: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after `step`, which will be trained again."""
    kept = [json.dumps(line) + "\n" for line in read_metrics(directory) if line["step"] <= step]
    write_bytes(directory / "metrics.jsonl", "".join(kept).encode())


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, up to one that a kill cut short."""
    path, lines = directory / "metrics.jsonl", []
    if path.is_file():
        with contextlib.suppress(ValueError), open(path, encoding="utf-8") as file:
            for line in file:
                lines.append(json.loads(line))  # noqa: PERF401  (keeps those before a bad one)
    return lines


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a run.

    Raises:
        RunError: `directory` is not a run of this version, or is damaged.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise RunError(
            f"{directory} is not a training run: it has no config.json; give the directory that "
            "`ddpm-edge train -o` wrote"
        )
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = config["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if version != RUN_FORMAT:
        raise RunError(f"{directory} has run format {version!r}, this version reads {RUN_FORMAT}")
    return config


def _write_config(directory: Path, config: dict[str, Any]) -> None:
    write_bytes(directory / "config.json", json.dumps(config, indent=2).encode() + b"\n")


def load_run(directory: Path) -> Run:
    """The averaged network of a run, on the CPU, ready to evaluate.

    Raises:
        RunError: `directory` is not a run, or it has no checkpoint yet, or it is damaged.
        ConfigError: the run's own network cannot be imported here.
    """
    config = read_config(directory)
    checkpoint = load_checkpoint(directory)
    try:
        network = config["network"]
        if "unet" in network:
            UNetConfig.from_dict(network["unet"])
        schedule = Schedule.from_dict(config["schedule"])
    except (KeyError, TypeError, ConfigError) as error:
        raise RunError(f"{directory} is damaged: {type(error).__name__}: {error}") from error
    model = build(network).eval()
    load_state(model, checkpoint.part("ema"))
    metrics = read_metrics(directory)
    return Run(model, schedule, config, checkpoint.step, metrics[-1]["loss"] if metrics else None)


def hardware(workers: Workers, precision: str) -> str:
    """What trains, in words, for the record."""
    several = f"{workers.count} processes, each " if workers.count > 1 else ""
    if workers.device.type == "cuda":
        return f"{several}{torch.cuda.get_device_name(workers.device)}, {precision}"
    return f"{several}{torch.get_num_threads()} cores of {processor.name()}, {precision}"
