"""Where a chain of steps stops: timesteps spaced by a rule, and the signal and noise there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddpm_edge import checks
from ddpm_edge.arrays import Array, Float64, Int64
from ddpm_edge.errors import ConfigError
from ddpm_edge.plan import Plan
from ddpm_edge.schedule import Schedule

DEFAULT_STEPS = 20
DEFAULT_SPACING = "trailing"
LEAST_SIGNAL = 1e-3  # float32 keeps four digits of what is divided by it
RHO = 7.0  # of Karras et al. 2022
LEAST_LAMBDA = -5.1  # what DPM-Solver's authors clip at; the linear schedule ends at -5.06

Spacing = str | Sequence[int]


@dataclass(frozen=True, eq=False)
class Grid:
    """The points of a chain of N steps from noise to data.

    Attributes:
        t: timestep at the start of each step, in 1..T, descending; int64 (N,).
        signal, noise: at the N starts and at the end of the last step; float64 (N + 1,).
    """

    t: Int64
    signal: Float64
    noise: Float64

    @classmethod
    def of(cls, schedule: Schedule, steps: int | None, spacing: Spacing) -> Grid:
        """The chain over `timesteps(schedule, steps, spacing)` that ends in the data, t = 0."""
        t = timesteps(schedule, steps, spacing)
        stops = np.append(t, 0)
        return cls(t, schedule.signal[stops], schedule.noise[stops])

    def __len__(self) -> int:
        return len(self.t)

    @property
    def lam(self) -> Float64:
        """Half of the log signal-to-noise ratio, lambda = ln(signal / noise); float64 (N + 1,).

        Infinite in the data, and minus infinity where no signal is left.
        """
        with np.errstate(divide="ignore"):
            lam: Float64 = np.log(self.signal) - np.log(self.noise)
        return lam

    @property
    def h(self) -> Float64:
        """How far each step goes in lambda; float64 (N,)."""
        return np.diff(self.lam)

    def orders(self, order: int, taper: bool) -> list[int]:
        """The order of a multistep method at each step.

        It rises as the history grows, in which an answer where no signal was left does not count.
        The step that ends in the data, where lambda is infinite, is of order 1; with `taper` the
        steps before it come down to it one by one.
        """
        n = len(self)
        rise = np.arange(1, n + 1)
        if not self.signal[0]:
            rise = np.maximum(rise - 1, 1)
        fall = np.full(n, order)
        if self.noise[-1] == 0:
            fall = np.minimum(fall, np.arange(n, 0, -1)) if taper else fall
            fall[-1] = 1
        orders: list[int] = np.minimum(rise, fall).clip(max=order).tolist()
        return orders

    def require_signal(self, sampler: str) -> None:
        """Raise ConfigError where a sampler of form "eps" would divide by next to nothing."""
        if self.signal[0] < LEAST_SIGNAL:
            raise ConfigError(
                f"{sampler} needs a signal of {LEAST_SIGNAL:g} or more at its first timestep, and "
                f"at t = {self.t[0]} it is {self.signal[0]:.2g}; use spacing 'logsnr' or 'karras', "
                "or dpmpp or unipc"
            )

    def plan(
        self,
        call: str,
        form: str,
        a: Float64,
        b: Float64,
        s: Float64 | None = None,
        *,
        spacing: Spacing = DEFAULT_SPACING,
        clip: float | str | None = None,
        **options: Any,
    ) -> Plan:
        """The plan with these columns, one row a step (see `Plan`); its name is `call(options)`."""
        return Plan(
            name=call_name(call, len(self), spacing, clip, options),
            form=form,
            clip=clip,
            t=self.t,
            signal=self.signal[:-1],
            noise=self.noise[:-1],
            a=a,
            b=b.reshape(len(self), -1),
            s=np.zeros(len(self)) if s is None else s,
        )


def call_name(
    call: str, steps: int, spacing: Spacing, clip: float | str | None, options: dict[str, Any]
) -> str:
    """What made a plan, for people: "ddim(steps=50, eta=0, clip=1)"; flags that are off are not."""
    shown = {"steps": steps} | {k: v for k, v in options.items() if v is not False}
    if not isinstance(spacing, str):
        shown["spacing"] = "list"
    elif spacing != DEFAULT_SPACING:
        shown["spacing"] = spacing
    if clip is not None:
        shown["clip"] = clip
    texts = (f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items())
    return f"{call}({', '.join(texts)})"


def timesteps(schedule: Schedule, steps: int | None, spacing: Spacing = DEFAULT_SPACING) -> Int64:
    """The timesteps at which a chain asks the network: whole, descending, none twice.

    Args:
        schedule: the forward process.
        steps: how many, 1..T; None = 20, or T where that is less.
        spacing: a name in SPACINGS, or the timesteps themselves, descending in 1..T (then steps is
            None or their number).

    Raises:
        ConfigError: anything else.
    """
    if not isinstance(spacing, str):
        return _listed(schedule, steps, spacing)
    rule = SPACINGS[checks.choice("spacing", spacing, SPACINGS)]
    if steps is None:
        steps = min(DEFAULT_STEPS, schedule.T)
    if checks.whole("steps", steps) > schedule.T:
        raise ConfigError(
            f"steps must be in 1..{schedule.T}, the timesteps the model was trained with; "
            f"got {steps}"
        )
    i = np.arange(steps)
    # Rounding may give a timestep twice, which would ask twice for nothing: the later one yields.
    t = np.minimum.accumulate(np.rint(rule(schedule, steps)) + i) - i
    return np.maximum(t, steps - i).astype(np.int64)  # and leaves room for those after it


def trailing(schedule: Schedule, steps: int) -> Array:
    """Evenly down from T, a whole interval above the data (Lin et al. 2024, Table 2)."""
    return schedule.T - np.arange(steps) * schedule.T / steps


def leading(schedule: Schedule, steps: int) -> Array:
    """Evenly up from 1 by T // steps, so that the chain begins below T (Ho et al.'s code)."""
    return 1 + np.arange(steps)[::-1] * (schedule.T // steps)


def linspace(schedule: Schedule, steps: int) -> Array:
    """Evenly from T to 1, both included."""
    return 1 + np.rint(np.linspace(schedule.T - 1, 0, steps))  # rounded as diffusers does, from 0


def quadratic(schedule: Schedule, steps: int) -> Array:
    """Evenly in sqrt(t) from T to 1: closer near the data (Song et al. 2021, appendix D.2)."""
    return np.linspace(np.sqrt(schedule.T), 1, steps) ** 2


def logsnr(schedule: Schedule, steps: int) -> Array:
    """Evenly in lambda = ln(signal / noise) from T to 1 (Lu et al. 2022, DPM-Solver).

    Where a schedule goes below lambda = -5.1 (0.6 % signal), it begins there: what is before is
    noise, and would take up most of the steps.
    """
    log_sigma = _log_sigma(schedule)
    return _t_at(np.linspace(log_sigma[-1], log_sigma[0], steps), log_sigma)


def karras(schedule: Schedule, steps: int) -> Array:
    """Evenly in sigma^(1/7), sigma = noise / signal, from T to 1 (Karras et al. 2022, Eq 5).

    It begins where `logsnr` does. The network is asked at the nearest timestep, and sigma is that
    timestep's; diffusers keeps the sigma of the formula beside the rounded timestep.
    """
    log_sigma = _log_sigma(schedule)
    first, last = np.exp(log_sigma[[-1, 0]] / RHO)
    return _t_at(RHO * np.log(np.linspace(first, last, steps)), log_sigma)


SPACINGS: dict[str, Callable[[Schedule, int], Array]] = {
    function.__name__: function
    for function in (trailing, leading, linspace, quadratic, logsnr, karras)
}


def _log_sigma(schedule: Schedule) -> Float64:
    """ln(noise / signal) = -lambda at t = 1, 2, ... as far as it is worth asking, ascending."""
    signal = np.maximum(schedule.signal[1:], np.finfo(np.float64).tiny)  # 0 in rectified flow's T
    log_sigma: Float64 = np.log(schedule.noise[1:]) - np.log(signal)
    return log_sigma[: max(1, np.searchsorted(log_sigma, -LEAST_LAMBDA, side="right"))]


def _t_at(wanted: Float64, log_sigma: Float64) -> Float64:
    """Timesteps, not rounded, at which ln(noise / signal) has these values."""
    return np.interp(wanted, log_sigma, np.arange(1, len(log_sigma) + 1))


def _listed(schedule: Schedule, steps: int | None, spacing: Any) -> Int64:
    """The timesteps that a caller wrote down."""
    if not isinstance(spacing, (list, tuple, range, np.ndarray)) or np.ndim(spacing) != 1:
        raise ConfigError(
            f"spacing must be a name or a list of timesteps; got {checks.shown(spacing)}"
        )
    t = [checks.whole("a timestep of spacing", value, most=schedule.T) for value in spacing]
    if not t:
        raise ConfigError("spacing is an empty list; give at least one timestep")
    for before, after in itertools.pairwise(t):
        if after >= before:
            raise ConfigError(f"the timesteps of spacing must descend; got {after} after {before}")
    if steps is not None and checks.whole("steps", steps) != len(t):
        raise ConfigError(f"steps is {steps}, but spacing lists {len(t)} timesteps; give no steps")
    return np.array(t, np.int64)
