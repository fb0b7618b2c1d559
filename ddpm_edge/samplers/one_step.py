"""Samplers without history.

All of them step from t to s by

    x_s = signal_s x0 + d eps + sigma z

and differ in how much of the predicted noise they keep (d) and how much they draw anew (sigma).
"""

from __future__ import annotations

import numpy as np

from ddpm_edge import checks
from ddpm_edge.arrays import Float64
from ddpm_edge.errors import ConfigError, warn
from ddpm_edge.plan import Plan
from ddpm_edge.samplers.grid import DEFAULT_SPACING, Grid, Spacing
from ddpm_edge.schedule import Schedule, transition

VARIANCES = ("beta", "beta-tilde")
FEW_STEPS = 200  # below which sigma^2 = beta is too much noise


class SamplerWarning(UserWarning):
    """A plan that runs, but will hardly give what was meant."""


def ddpm(
    schedule: Schedule,
    steps: int | None = None,
    variance: str = "beta",
    spacing: Spacing = DEFAULT_SPACING,
    clip: float | str | None = None,
) -> Plan:
    """Algorithm 2 of Ho et al. 2020, on all T timesteps or respaced (Nichol and Dhariwal 2021).

    The mean is that of the posterior q(x_s | x_t, x0) (Eq 7), written through x0; unclipped it is
    line 4 of the algorithm as printed. No noise is drawn in the last step (z = 0).

    Args:
        schedule: the forward process.
        steps: 1..T; None = all T, or as many as spacing lists.
        variance: of each step, "beta" or "beta-tilde" (Ho et al., section 3.2).
        spacing: see `timesteps`.
        clip: of x0, see `Clip.parse`; None = the algorithm as printed.

    Warns:
        SamplerWarning: sigma^2 = beta in fewer than 200 of more steps (Song et al. 2021, Table 1:
            FID 32.7 instead of 3.2 in 50).
    """
    checks.choice("variance", variance, VARIANCES)
    if steps is None and isinstance(spacing, str):
        steps = schedule.T
    grid = Grid.of(schedule, steps, spacing)
    if variance == "beta" and len(grid) < min(FEW_STEPS, schedule.T):
        warn(
            f"ddpm with variance 'beta' in {len(grid)} of {schedule.T} steps leaves the images "
            f"noisy; use {FEW_STEPS} or more, variance 'beta-tilde', or another sampler",
            SamplerWarning,
        )
    signal, noise, signal_s, noise_s = _ends(grid)
    factor, sigma2 = transition(signal, noise, signal_s, noise_s)
    if variance == "beta-tilde":
        sigma2 = sigma2 * (noise_s / noise) ** 2
    sigma = np.where(noise_s > 0, np.sqrt(sigma2), 0.0)
    a, b = _columns(grid, factor * noise_s**2 / noise)
    return grid.plan("ddpm", "x0", a, b, sigma, variance=variance, spacing=spacing, clip=clip)


def ddim(
    schedule: Schedule,
    steps: int | None = None,
    eta: float = 0.0,
    spacing: Spacing = DEFAULT_SPACING,
    clip: float | str | None = None,
) -> Plan:
    """Denoising diffusion implicit models (Song et al. 2021, Eq 12 and 16).

    With a clip, eps is computed anew from the clipped x0, so that both agree; diffusers' DDIM does
    so with `use_clipped_model_output=True`, which is not its default.

    Args:
        schedule: the forward process.
        steps: see `timesteps`.
        eta: 0 = deterministic .. 1 = as random as Algorithm 2 with beta-tilde.
        spacing: see `timesteps`.
        clip: of x0, see `Clip.parse`; None = not.
    """
    if not 0.0 <= checks.number("eta", eta) <= 1.0:
        raise ConfigError(f"eta must be in 0..1; got {eta!r}")
    grid = Grid.of(schedule, steps, spacing)
    signal, noise, signal_s, noise_s = _ends(grid)
    _, variance = transition(signal, noise, signal_s, noise_s)
    sigma = eta * np.sqrt(variance) * noise_s / noise
    toward_x_t = np.sqrt(np.maximum(noise_s**2 - sigma**2, 0.0))  # rounding may go below 0
    a, b = _columns(grid, toward_x_t)
    return grid.plan("ddim", "x0", a, b, sigma, eta=float(eta), spacing=spacing, clip=clip)


def euler(
    schedule: Schedule,
    steps: int | None = None,
    spacing: Spacing = DEFAULT_SPACING,
    clip: float | str | None = None,
) -> Plan:
    """Euler's method on the probability-flow ODE.

    On `Schedule.rectified_flow` it is x_s = x_t + (s - t) / T velocity (Liu et al. 2023, Eq 1). On
    any other schedule, where x / signal is what moves along a line, it equals `ddim` with eta 0.

    Args:
        schedule: the forward process.
        steps: see `timesteps`.
        spacing: see `timesteps`.
        clip: of x0, see `Clip.parse`; None = not.
    """
    grid = Grid.of(schedule, steps, spacing)
    a, b = _columns(grid, grid.noise[1:])
    return grid.plan("euler", "x0", a, b, spacing=spacing, clip=clip)


def consistency(
    schedule: Schedule,
    steps: int | None = None,
    spacing: Spacing = DEFAULT_SPACING,
    clip: float | str | None = None,
) -> Plan:
    """Multistep consistency sampling (Song et al. 2023, Algorithm 1): x0, noised anew, x0, ...

    For networks whose x0 at any t is a finished image; one step will do then. With others it is
    the most random sampler that there is.

    Args:
        schedule: the forward process.
        steps: see `timesteps`.
        spacing: see `timesteps`.
        clip: of x0, see `Clip.parse`; None = not.
    """
    grid = Grid.of(schedule, steps, spacing)
    a, b = _columns(grid, np.zeros(len(grid)))
    return grid.plan("consistency", "x0", a, b, grid.noise[1:], spacing=spacing, clip=clip)


def _ends(grid: Grid) -> tuple[Float64, Float64, Float64, Float64]:
    """signal_t, noise_t, signal_s, noise_s of each step."""
    return grid.signal[:-1], grid.noise[:-1], grid.signal[1:], grid.noise[1:]


def _columns(grid: Grid, d: Float64) -> tuple[Float64, Float64]:
    """Coefficients of x_t and x0 in signal_s x0 + d eps, with eps = (x_t - signal x0) / noise."""
    a = d / grid.noise[:-1]
    return a, grid.signal[1:] - a * grid.signal[:-1]
