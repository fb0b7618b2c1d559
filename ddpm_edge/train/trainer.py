"""Algorithm 1 of Ho et al. 2020 and the optimiser around it.

`train` is a generator: it yields after every step, and whoever iterates decides about averages of
the weights, progress bars and files (`ddpm_edge.train.run` is the one that the command line uses).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ddpm_edge.errors import ConfigError
from ddpm_edge.schedule import Schedule
from ddpm_edge.train.data import Dataset

TIMESTEP_OFFSET = -1  # the network counts timesteps from 0, the mathematics from 1


@dataclass(frozen=True)
class TrainOptions:
    """How to train: `steps`, `minutes` or both; the first that is reached ends it.

    Args:
        steps: optimiser steps.
        minutes: wall-clock minutes; the learning rate decays over the time instead of the steps.
        batch: images a step.
        learning_rate: peak of Adam's learning rate, reached after `warmup` steps, then cosine to 0.
        warmup: steps of linear learning-rate warm-up.
        ema: limit of the decay of the averaged weights, in [0, 1).
        clip: largest norm of the gradient.
        null_label: probability of training a labelled image without its label, in [0, 1].
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
    """The training objective L_simple (Ho et al. 2020, Algorithm 1 and Eq 14)."""

    def __init__(self, schedule: Schedule, null_label: float, device: torch.device) -> None:
        self.T, self.null_label = schedule.T, null_label
        self.signal = torch.tensor(schedule.signal, dtype=torch.float32, device=device)
        self.noise = torch.tensor(schedule.noise, dtype=torch.float32, device=device)

    def loss(self, model: nn.Module, x0: Tensor, label: Tensor | None, null: int) -> Tensor:
        """Mean squared error of the predicted noise; x0 (B, C, H, W) in [-1, 1]."""
        t = torch.randint(1, self.T + 1, (len(x0),), device=x0.device)
        eps = torch.randn_like(x0)
        signal, noise = self.signal[t, None, None, None], self.noise[t, None, None, None]
        x_t = signal * x0 + noise * eps  # Eq 4
        inputs = [x_t, t + TIMESTEP_OFFSET]
        if label is not None:  # classifier-free: sometimes without its label
            drop = torch.rand(len(x0), device=x0.device) < self.null_label
            inputs.append(torch.where(drop, null, label))
        return F.mse_loss(model(*inputs).float(), eps)  # Eq 14


def train(
    model: nn.Module, data: Dataset, schedule: Schedule, options: TrainOptions
) -> Iterator[TrainStep]:
    """Train `model` in place; yields after every optimiser step.

    The model must already be on its device. Random numbers come from torch's global generators,
    seeded by the caller (`torch.manual_seed`).
    """
    device = next(model.parameters()).device
    bf16 = resolve_precision(options.precision, device) == "bf16"
    objective = Algorithm1(schedule, options.null_label, device)
    optimizer = torch.optim.Adam(model.parameters(), fused=device.type == "cuda")
    images = torch.from_numpy(data.images).to(device)  # uint8 (N, C, H, W)
    labels = None if data.labels is None else torch.from_numpy(data.labels).to(device)
    null = len(data.class_names)
    model.train()
    start = time.perf_counter()
    for step, index in enumerate(batches(len(images), options.batch, device), start=1):
        seconds = time.perf_counter() - start
        fraction = progress(options, step - 1, seconds)
        rate = options.learning_rate * warmup_cosine(step, options.warmup, fraction)
        for group in optimizer.param_groups:
            group["lr"] = rate
        x0 = images[index].float().div_(127.5).sub_(1.0)  # (B, C, H, W) in [-1, 1]
        x0 = x0.to(memory_format=torch.channels_last)
        label = None if labels is None else labels[index]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = objective.loss(model, x0, label, null)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        seconds = time.perf_counter() - start
        fraction = progress(options, step, seconds)
        yield TrainStep(step, loss.detach(), rate, step * len(index), seconds, fraction)
        if fraction >= 1:
            return


def batches(count: int, batch: int, device: torch.device) -> Iterator[Tensor]:
    """Endless index batches (min(batch, count),): every epoch a new order, the rest dropped."""
    batch = min(batch, count)
    while True:
        order = torch.randperm(count, device=device)
        yield from torch.split(order[: count // batch * batch], batch)


def progress(options: TrainOptions, step: int, seconds: float) -> float:
    """How much of the training is done, 0..1."""
    by_steps = step / options.steps if options.steps else 0.0
    by_time = seconds / (60 * options.minutes) if options.minutes else 0.0
    return min(max(by_steps, by_time), 1.0)


def warmup_cosine(step: int, warmup: int, fraction: float) -> float:
    """Factor of the learning rate: linear from 0 to 1 over `warmup` steps, then cosine to 0."""
    return min(1.0, step / max(warmup, 1)) * 0.5 * (1.0 + math.cos(math.pi * fraction))


class EMA:
    """Exponential moving average of a model's weights, quick at first: min(decay, (1+n)/(10+n))."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's weights now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(weight, 1 - decay)


def resolve_device(name: str) -> torch.device:
    """The torch device called `name`; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"no device {name!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} was asked for, but torch sees no GPU; use cpu")
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """Resolve "auto" to "bf16" where the device computes in it, else to "fp32"."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
