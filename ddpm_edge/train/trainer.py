"""Algorithm 1 of Ho et al. 2020 and the optimiser around it.

`train` is a generator: it yields after every step, and whoever iterates decides about averages of
the weights, progress bars and files (`ddpm_edge.train.run` is the one that the command line uses).
The randomness of a step depends on (seed, step) alone, so that a `Training` goes on exactly where
it was left.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ddpm_edge.data import Dataset
from ddpm_edge.errors import ConfigError, TrainingError
from ddpm_edge.plan import PREDICTIONS
from ddpm_edge.schedule import Schedule
from ddpm_edge.train.draws import Draws, batches, number
from ddpm_edge.train.network import prediction_of
from ddpm_edge.train.workers import Workers, resolve_precision

WARMUP_FRACTION = 0.05
TIMESTEP_OFFSET = -1  # the network counts timesteps from 0, the mathematics from 1


@dataclass(frozen=True)
class TrainOptions:
    """How to train: `steps`, `minutes` or both; the first that is reached ends it.

    Args:
        steps: optimiser steps.
        minutes: wall-clock minutes; the learning rate decays over the time instead of the steps.
        batch: images a step and process.
        learning_rate: peak of Adam's learning rate, reached after `warmup` steps, then cosine to 0.
        warmup: steps of linear learning-rate warm-up; at most a twentieth of the training.
        ema: limit of the decay of the averaged weights, in [0, 1).
        clip: largest norm of the gradient.
        null_label: probability of training a labelled image without its label, in [0, 1].
        prediction: what the network learns to answer, one of PREDICTIONS.
        flip: mirror half of the images left to right, chosen anew at each step.
        seed: of the weights, the order of the images, t and eps.
        precision: "bf16", "fp32" or "auto" (bf16 where the device computes in it).
        device: "cpu", "cuda", "cuda:1" ... or "auto".
    """

    steps: int | None = None
    minutes: float | None = None
    batch: int = 128
    learning_rate: float = 1e-3
    warmup: int = 500
    ema: float = 0.9995
    clip: float = 1.0
    null_label: float = 0.1
    prediction: str = "eps"
    flip: bool = False
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if self.steps is None and self.minutes is None:
            raise ConfigError("training has no end: give steps or minutes")
        allowed = {
            "steps": (self.steps is None or self.steps >= 1, ">= 1"),
            "minutes": (self.minutes is None or 0 < self.minutes < math.inf, "> 0"),
            "batch": (self.batch >= 1, ">= 1"),
            "learning_rate": (0 < self.learning_rate < math.inf, "> 0"),
            "warmup": (self.warmup >= 0, ">= 0"),
            "ema": (0 <= self.ema < 1, "in [0, 1)"),
            "clip": (self.clip > 0, "> 0"),
            "null_label": (0 <= self.null_label <= 1, "in [0, 1]"),
            "prediction": (self.prediction in PREDICTIONS, ", ".join(PREDICTIONS)),
            "precision": (self.precision in ("auto", "bf16", "fp32"), "auto, bf16 or fp32"),
        }
        for name, (fine, expected) in allowed.items():
            if not fine:
                raise ConfigError(f"{name} must be {expected}; got {getattr(self, name)!r}")


@dataclass(frozen=True)
class TrainStep:
    """What `train` yields: `loss` is a scalar tensor on the device, so reading it may wait."""

    step: int
    loss: Tensor
    learning_rate: float
    images: int  # seen since the start
    seconds: float  # since the start
    fraction: float  # of the whole training, 0..1


class Algorithm1:
    """The training objective L_simple (Ho et al. 2020, Algorithm 1 and Eq 14).

    Args:
        schedule: the forward process.
        prediction: what the network answers, one of PREDICTIONS.
        null_label: probability of training a labelled image without its label.
        null: the label that means "none".
        device: of everything.
    """

    def __init__(
        self,
        schedule: Schedule,
        prediction: str,
        null_label: float,
        null: int,
        device: torch.device,
    ) -> None:
        self.T, self.prediction = schedule.T, prediction
        self.null_label, self.null = null_label, null
        self.signal = torch.tensor(schedule.signal, dtype=torch.float32, device=device)
        self.noise = torch.tensor(schedule.noise, dtype=torch.float32, device=device)

    def loss(self, model: nn.Module, x0: Tensor, label: Tensor | None, draws: Draws) -> Tensor:
        """Mean squared error of what the network predicts; x0 (B, C, H, W) in [-1, 1]."""
        t = draws.integers(1, self.T)  # (B,)
        eps = draws.normal(x0.shape)  # (B, C, H, W)
        signal, noise = self.signal[t, None, None, None], self.noise[t, None, None, None]
        x_t = signal * x0 + noise * eps  # Eq 4
        inputs = [x_t, t + TIMESTEP_OFFSET]
        if label is not None:  # classifier-free: sometimes without its label
            inputs.append(torch.where(draws.uniform() < self.null_label, self.null, label))
        target = {
            "eps": eps, "x0": x0, "v": signal * eps - noise * x0, "velocity": eps - x0
        }[self.prediction]  # fmt: skip
        return F.mse_loss(prediction_of(model(*inputs)).float(), target)  # Eq 14 for eps


class Training:
    """What changes while a network is trained, and is kept to go on later.

    Args:
        model: the network; must already be on its device.

    Attributes:
        optimizer: Adam, over the model's parameters.
        step: steps done.
        seconds: wall-clock time spent in them.
    """

    def __init__(self, model: nn.Module) -> None:
        fused = next(model.parameters()).device.type == "cuda"
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), fused=fused)
        self.step, self.seconds = 0, 0.0


def train(
    training: Training,
    data: Dataset,
    schedule: Schedule,
    options: TrainOptions,
    workers: Workers | None = None,
) -> Iterator[TrainStep]:
    """Train in place from where `training` is; yields after every optimiser step.

    Args:
        training: the network and its optimiser.
        data: what to train on; kept on the device, as uint8.
        schedule: the forward process.
        options: how to train.
        workers: the processes that train together; None = this one, where the model is.

    Raises:
        ConfigError: fewer images than processes.
        TrainingError: out of memory.
    """
    workers = workers or Workers(next(training.model.parameters()).device)
    device, seed = workers.device, options.seed
    bf16 = resolve_precision(options.precision, device) == "bf16"
    batch = min(options.batch, len(data.images) // workers.count)
    if not batch:
        raise ConfigError(f"{len(data.images)} images are too few for {workers.count} processes")
    null = len(data.class_names)
    objective = Algorithm1(schedule, options.prediction, options.null_label, null, device)
    model, optimizer = workers.share(training.model), training.optimizer
    with memory_remedy(batch):
        images = torch.from_numpy(data.images).to(device)  # uint8 (N, C, H, W)
    labels = None if data.labels is None else torch.from_numpy(data.labels).to(device)
    model.train()
    start = time.perf_counter() - training.seconds
    agree = workers.agree if options.minutes else float  # reading a clock waits for all processes
    fraction = progress(options, training.step, agree(training.seconds))
    for index in batches(len(images), batch, workers, seed, training.step):
        if fraction >= 1:
            return
        step = training.step + 1
        torch.manual_seed(number(seed, "dropout", step, workers.index))
        draws = Draws(batch, workers, seed, "train", step)
        rate = options.learning_rate * warmup_cosine(step, options.warmup, fraction)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with memory_remedy(batch):
            x0 = to_network(images[index])  # (B, C, H, W)
            if options.flip:
                x0 = torch.where(draws.uniform()[:, None, None, None] < 0.5, x0.flip(3), x0)
            label = None if labels is None else labels[index]
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = objective.loss(model, x0, label, draws)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            optimizer.step()
        training.step, training.seconds = step, time.perf_counter() - start
        fraction = progress(options, step, agree(training.seconds))
        seen = step * batch * workers.count
        yield TrainStep(step, workers.mean(loss.detach()), rate, seen, training.seconds, fraction)


def to_network(images: Tensor) -> Tensor:
    """Images uint8 (B, C, H, W) as the network takes them: float32 in [-1, 1], channels last."""
    x0 = images.float().div_(127.5).sub_(1.0)
    return x0.to(memory_format=torch.channels_last)


@contextlib.contextmanager
def memory_remedy(batch: int) -> Iterator[None]:
    """Say what to do when memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and (
            "can't allocate memory" not in str(error)  # the CPU allocator's RuntimeError
        ):
            raise
        raise TrainingError(
            f"out of memory with {batch} images a step; give a smaller --batch than {batch}, a "
            "smaller --preset or smaller images (--size)"
        ) from error


def progress(options: TrainOptions, step: int, seconds: float) -> float:
    """How much of the training is done, 0..1."""
    by_steps = step / options.steps if options.steps else 0.0
    by_time = seconds / (60 * options.minutes) if options.minutes else 0.0
    return min(max(by_steps, by_time), 1.0)


def warmup_cosine(step: int, warmup: int, fraction: float) -> float:
    """Factor of the learning rate: linear from 0 to 1 over `warmup` steps, then cosine to 0.

    A short training rises over its first twentieth instead: else it would be over before the peak.
    """
    rise = max(step / max(warmup, 1), fraction / WARMUP_FRACTION)
    return min(1.0, rise) * 0.5 * (1.0 + math.cos(math.pi * fraction))


class EMA:
    """Exponential moving average of a model's weights, quick at first: min(decay, (1+n)/(10+n))."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's weights now; buffers are taken over as they are."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(weight, 1 - decay)
        for old, new in zip(self.model.buffers(), model.buffers(), strict=True):
            old.copy_(new)
