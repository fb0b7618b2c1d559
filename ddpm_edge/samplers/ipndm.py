"""iPNDM (Zhang and Chen 2023, arXiv:2204.13902, appendix): Adams and Bashforth on eps."""

from __future__ import annotations

import numpy as np

from ddpm_edge import checks
from ddpm_edge.arrays import Float64
from ddpm_edge.plan import Plan
from ddpm_edge.samplers.grid import DEFAULT_SPACING, Grid, Spacing
from ddpm_edge.schedule import Schedule

ADAMS_BASHFORTH = (
    np.array([1.0]),
    np.array([3.0, -1.0]) / 2.0,
    np.array([23.0, -16.0, 5.0]) / 12.0,
    np.array([55.0, -59.0, 37.0, -9.0]) / 24.0,
)
MAX_ORDER = len(ADAMS_BASHFORTH)


def ipndm(
    schedule: Schedule,
    steps: int | None = None,
    order: int = 4,
    spacing: Spacing = DEFAULT_SPACING,
    clip: float | str | None = None,
) -> Plan:
    """Improved PNDM: ddim with eps extrapolated by fixed weights, as if steps were all equal.

    diffusers' IPNDM has a noise schedule and a spacing of its own, and takes v; given these as a
    schedule and a list it does the same.

    Args:
        schedule: the forward process.
        steps: see `timesteps`.
        order: 1..4.
        spacing: see `timesteps`.
        clip: of x0, see `Clip.parse`; None = not.
    """
    order = checks.whole("order", order, most=MAX_ORDER)
    grid = Grid.of(schedule, steps, spacing)
    a, b = columns(grid, order)
    return grid.plan("ipndm", "eps", a, b, order=order, spacing=spacing, clip=clip)


def columns(grid: Grid, order: int) -> tuple[Float64, Float64]:
    """Columns a, b: x_s = signal_s x0 + noise_s e with x0 = (x - noise e) / signal."""
    grid.require_signal("ipndm")
    a = grid.signal[1:] / grid.signal[:-1]
    b = np.zeros((len(grid), order))
    for i in range(len(grid)):
        weights = ADAMS_BASHFORTH[min(i + 1, order) - 1]
        b[i, : len(weights)] = (grid.noise[i + 1] - a[i] * grid.noise[i]) * weights
    return a, b
