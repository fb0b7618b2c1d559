"""Networks in one line of NumPy, and diffusers' schedulers in float64, to hold samplers against."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from ddpm_edge.noise import Stream
from ddpm_edge.plan import Plan, run_plan
from ddpm_edge.samplers.grid import Grid
from ddpm_edge.schedule import Schedule

SHAPE = (2, 1, 4, 4)
Model = Callable[[np.ndarray, int], np.ndarray]


def toy(x: np.ndarray, t: int) -> np.ndarray:
    """An eps-network: nonlinear in x, different at every t."""
    return np.tanh(0.9 * x + 0.3 * np.sin(t / 50.0) + 0.2 * np.roll(x, 1, axis=-1))


def gaussian(schedule: Schedule, mean: float, variance: float) -> Model:
    """E[eps | x_t] for data of this mean and variance in every pixel."""

    def eps(x: np.ndarray, t: int) -> np.ndarray:
        signal, noise = float(schedule.signal[t]), float(schedule.noise[t])
        return noise * (x - signal * mean) / (signal**2 * variance + noise**2)

    return eps


def draws(plan_rows: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((plan_rows, *SHAPE))


def start() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SHAPE)


def run(
    plan: Plan, x: np.ndarray, z: np.ndarray, model: Model = toy, prediction: str = "eps"
) -> np.ndarray:
    """All states of the loop, (rows, *x.shape), with z[row] as the draws of every stream."""
    z = z.astype(x.dtype)

    def draw(stream: Stream, row: int) -> np.ndarray:
        return z[row]

    states = run_plan(plan, x.copy(), model, draw, prediction)
    return np.stack([state.x.copy() for state in states])


class Float64Torch:
    """The module torch, with a float32 that is float64."""

    def __getattr__(self, name: str) -> Any:
        import torch

        return torch.float64 if name == "float32" else getattr(torch, name)


@contextlib.contextmanager
def in_float64(scheduler: type) -> Iterator[None]:
    """While a scheduler of diffusers is made and used, compute in float64.

    Its tables are float32, and its steps round to float32 whatever they get.
    """
    import torch

    module: ModuleType = __import__(scheduler.__module__, fromlist=["torch"])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    module.torch = Float64Torch()
    try:
        yield
    finally:
        module.torch = torch
        torch.set_default_dtype(before)


def diffusers_states(
    scheduler: Any, plan: Plan, z: np.ndarray, model: Model = toy, **step_options: Any
) -> np.ndarray:
    """All states of a scheduler whose timesteps are set, asked at our t with our noise."""
    import torch

    x, states = torch.from_numpy(start()), []
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    for i, t in enumerate(scheduler.timesteps):
        answer = torch.from_numpy(model(x.numpy(), int(plan.t[i])))
        noise = torch.from_numpy(z[i])
        saved = getattr(module, "randn_tensor", None)
        module.randn_tensor = lambda *_, n=noise, **__: n
        try:
            x = scheduler.step(answer, t, x, **step_options).prev_sample
        finally:
            module.randn_tensor = saved
        states.append(x.numpy().copy())
    return np.stack(states)


VARIANCE = 0.25  # of the data whose flow is known


def flow_error(steps: int, form: str, columns: Callable[[Grid], tuple[np.ndarray, ...]]) -> float:
    """How far a chain ends from the exact probability flow of Gaussian data, with the exact eps.

    Its steps are even in lambda = ln(signal / noise) from -3 to 3: none leads into the data, where
    lambda is infinite. Along the flow x / sqrt(signal^2 variance + noise^2) does not change.
    """
    lam = np.linspace(-3.0, 3.0, steps + 1)
    signal, noise = 1 / np.sqrt(1 + np.exp(-2 * lam)), 1 / np.sqrt(1 + np.exp(2 * lam))
    total = signal**2 * VARIANCE + noise**2
    grid = Grid(np.arange(steps, 0, -1), signal, noise)

    def eps(x: np.ndarray, t: int) -> np.ndarray:
        return x * float(noise[steps - t] / total[steps - t])

    plan = grid.plan("test", form, *columns(grid))
    end = run(plan, start(), np.zeros((steps, 1)), eps)[-1]
    return float(np.abs(end - start() * math.sqrt(total[-1] / total[0])).max())
