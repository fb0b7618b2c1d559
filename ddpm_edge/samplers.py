"""Samplers: functions of a Schedule that return a Plan.

A sampler is one function here and its entry in `SAMPLERS`; the loop, the command line and the
Generator know it from then on. Between two timesteps t > s of a respaced chain the forward process
is again Gaussian, with alpha = alpha_bar_t / alpha_bar_s, beta = 1 - alpha.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from ddpm_edge import checks
from ddpm_edge.arrays import Float64, Int64
from ddpm_edge.errors import ConfigError
from ddpm_edge.plan import Plan
from ddpm_edge.schedule import Schedule

VARIANCES = ("beta", "beta-tilde")


def ddpm(
    schedule: Schedule,
    steps: int | None = None,
    variance: str = "beta",
    clip: float | None = None,
) -> Plan:
    """Algorithm 2 of Ho et al. 2020, on all T timesteps or respaced (Nichol and Dhariwal 2021).

    Args:
        schedule: the forward process.
        steps: 1..T; None = all T.
        variance: of each step, "beta" or "beta-tilde" (Ho et al., section 3.2).
        clip: clip x0 to [-clip, clip]; None = the algorithm as printed.
    """
    if variance not in VARIANCES:
        raise ConfigError(f"variance must be one of {', '.join(VARIANCES)}; got {variance!r}")
    t, s = spaced(schedule, schedule.T if steps is None else steps)
    ab_t, ab_s = schedule.alpha_bar[t], schedule.alpha_bar[s]
    alpha = _alpha_between(schedule, t, s)
    beta = 1.0 - alpha
    sigma2 = beta if variance == "beta" else beta * (1.0 - ab_s) / (1.0 - ab_t)
    if clip is None:  # line 4 of Algorithm 2
        a, b = 1.0 / np.sqrt(alpha), -beta / (np.sqrt(1.0 - ab_t) * np.sqrt(alpha))
    else:  # the same mean through x0: Eq 7
        a = np.sqrt(alpha) * (1.0 - ab_s) / (1.0 - ab_t)
        b = np.sqrt(ab_s) * beta / (1.0 - ab_t)
    sigma = np.where(s > 0, np.sqrt(sigma2), 0.0)  # z = 0 at the last step
    return _plan(schedule, f"ddpm(steps={len(t)}, variance={variance}", clip, t, a, b, sigma)


def ddim(schedule: Schedule, steps: int = 50, eta: float = 0.0, clip: float | None = None) -> Plan:
    """Denoising diffusion implicit models (Song et al. 2021, Eq 12 and 16).

    Args:
        schedule: the forward process.
        steps: 1..T.
        eta: 0 = deterministic .. 1 = as random as Algorithm 2 with beta-tilde.
        clip: clip x0 to [-clip, clip], with eps recomputed from it; None = not.
    """
    if not 0.0 <= checks.number("eta", eta) <= 1.0:
        raise ConfigError(f"eta must be in 0..1; got {eta!r}")
    t, s = spaced(schedule, steps)
    ab_t, ab_s = schedule.alpha_bar[t], schedule.alpha_bar[s]
    beta = 1.0 - _alpha_between(schedule, t, s)
    sigma = eta * np.sqrt((1.0 - ab_s) / (1.0 - ab_t) * beta)
    to_eps = np.sqrt(1.0 - ab_s - sigma**2)  # "direction pointing to x_t"
    if clip is None:  # x0 = (x - noise eps) / signal
        a = np.sqrt(ab_s / ab_t)
        b = to_eps - a * np.sqrt(1.0 - ab_t)
    else:  # eps = (x - signal x0) / noise
        a = to_eps / np.sqrt(1.0 - ab_t)
        b = np.sqrt(ab_s) - a * np.sqrt(ab_t)
    return _plan(schedule, f"ddim(steps={len(t)}, eta={eta:g}", clip, t, a, b, sigma)


SAMPLERS: dict[str, Callable[..., Plan]] = {"ddpm": ddpm, "ddim": ddim}


def make_plan(schedule: Schedule, sampler: str, /, **options: Any) -> Plan:
    """The plan of the sampler called `sampler`.

    Raises:
        ConfigError: no such sampler, an option that it does not have, or a bad value.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"unknown sampler {sampler!r}; samplers are {', '.join(SAMPLERS)}")
    known = list(inspect.signature(SAMPLERS[sampler]).parameters)[1:]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"sampler {sampler!r} has no option {name!r}; its options are {', '.join(known)}"
            )
    return SAMPLERS[sampler](schedule, **options)


def spaced(schedule: Schedule, steps: int) -> tuple[Int64, Int64]:
    """`steps` timesteps evenly down from T ("trailing"), and for each the one it leads to.

    The first is T, where the prior is; the last leads to 0. Trailing spacing is what Lin et al.
    2024 ("Common diffusion noise schedules and sample steps are flawed") recommend.
    """
    if checks.whole("steps", steps) > schedule.T:
        raise ConfigError(
            f"steps must be in 1..{schedule.T}, the timesteps the model was trained with; "
            f"got {steps}"
        )
    t = schedule.T - np.arange(steps) * schedule.T // steps
    return t, np.append(t[1:], 0)


def _alpha_between(schedule: Schedule, t: Int64, s: Int64) -> Float64:
    """alpha_bar_t / alpha_bar_s; from alpha itself where t = s + 1, which loses no digits."""
    ratio = schedule.alpha_bar[t] / schedule.alpha_bar[s]
    return np.where(t == s + 1, schedule.alpha[t], ratio)


def _plan(
    schedule: Schedule,
    call: str,
    clip: float | None,
    t: Int64,
    a: Float64,
    b: Float64,
    sigma: Float64,
) -> Plan:
    clip = None if clip is None else checks.number("clip", clip)
    return Plan(
        name=f"{call})" if clip is None else f"{call}, clip={clip:g})",
        form="eps" if clip is None else "x0",
        clip=clip,
        t=t.astype(np.int64),
        signal=schedule.signal[t],
        noise=schedule.noise[t],
        a=a,
        b=b[:, None],
        s=sigma,
    )
