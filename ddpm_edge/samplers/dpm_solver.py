"""DPM-Solver and DPM-Solver++, multistep (Lu et al. 2022, arXiv:2206.00927 and 2211.01095).

Both integrate the probability-flow ODE in lambda = ln(signal / noise), exactly but for the
network's answer m, which is extrapolated as a polynomial from the answers before:

    x_s = a x_t - c y (phi_1(y) D0 + phi_2(y) D1 + phi_3(y) D2)

with h = lambda_s - lambda_t and, where m is x0 (DPM-Solver++), a = noise_s / noise_t, c = signal_s,
y = -h; where m is eps (DPM-Solver), a = signal_s / signal_t, c = noise_s, y = h. D0 = m, D1 and D2
are divided differences of m.
"""

from __future__ import annotations

import numpy as np

from ddpm_edge import checks
from ddpm_edge.arrays import Float64
from ddpm_edge.plan import Plan
from ddpm_edge.samplers.grid import DEFAULT_SPACING, Grid, Spacing
from ddpm_edge.samplers.phi import y_phi
from ddpm_edge.schedule import Schedule

MAX_ORDER = 3
FEW_STEPS = 15  # with fewer, order 3 comes down to 2 before the last step


def dpmpp(
    schedule: Schedule,
    steps: int | None = None,
    order: int = 2,
    sde: bool = False,
    spacing: Spacing = DEFAULT_SPACING,
    clip: float | str | None = None,
) -> Plan:
    """DPM-Solver++ on x0: order 1 (which is ddim with eta 0), 2M, 3M, and their SDE forms.

    Order 3 is that of the authors' code and diffusers, whose D2 is half of the second derivative:
    it converges with order 2. diffusers' SDE of order 3 has phi_3 with the wrong sign of its 1/2
    and does not converge; here it is as in the ODE.

    Args:
        schedule: the forward process.
        steps: see `timesteps`.
        order: 1, 2 or 3.
        sde: solve the reverse SDE instead: draws noise at every step but the last.
        spacing: see `timesteps`.
        clip: of x0, see `Clip.parse`; None = not.
    """
    order = checks.whole("order", order, most=MAX_ORDER)
    grid = Grid.of(schedule, steps, spacing)
    a, b, s = data_columns(grid, order, checks.flag("sde", sde))
    return grid.plan("dpmpp", "x0", a, b, s, order=order, sde=sde, spacing=spacing, clip=clip)


def dpm(
    schedule: Schedule,
    steps: int | None = None,
    order: int = 2,
    sde: bool = False,
    spacing: Spacing = DEFAULT_SPACING,
    clip: float | str | None = None,
) -> Plan:
    """DPM-Solver on eps, multistep, of order 1 (ddim with eta 0), 2 or 3, or its SDE of 1 or 2.

    The last step, into the data, is of order 1 and draws no noise; diffusers' refuses it.

    Args:
        schedule: the forward process.
        steps: see `timesteps`.
        order: 1, 2 or 3; with sde 1 or 2.
        sde: solve the reverse SDE instead: draws noise at every step but the last.
        spacing: see `timesteps`.
        clip: of x0, see `Clip.parse`; None = not.
    """
    order = checks.whole("order", order, most=2 if checks.flag("sde", sde) else MAX_ORDER)
    grid = Grid.of(schedule, steps, spacing)
    a, b, s = noise_columns(grid, order, sde)
    return grid.plan("dpm", "eps", a, b, s, order=order, sde=sde, spacing=spacing, clip=clip)


def data_columns(grid: Grid, order: int, sde: bool) -> tuple[Float64, Float64, Float64]:
    """Columns a, b, s of DPM-Solver++ for m = x0."""
    h = grid.h
    noise_s, noise_t = grid.noise[1:], grid.noise[:-1]
    a = noise_s / noise_t * (np.exp(-h) if sde else 1.0)
    y = -2.0 * h if sde else -h
    b = -grid.signal[1:, None] * _weights(grid, y, order)
    s = noise_s * np.sqrt(-np.expm1(-2.0 * h)) if sde else np.zeros(len(grid))
    return a, b, s


def noise_columns(grid: Grid, order: int, sde: bool) -> tuple[Float64, Float64, Float64]:
    """Columns a, b, s of DPM-Solver for m = eps."""
    grid.require_signal("dpm")
    ends_in_data = grid.noise[-1] == 0
    inner = slice(0, -1 if ends_in_data else None)
    a = grid.signal[1:] / grid.signal[:-1]
    b, s = np.zeros((len(grid), order)), np.zeros(len(grid))
    h, noise_s = grid.h[inner], grid.noise[1:][inner]
    b[inner] = -noise_s[:, None] * _weights(grid, grid.h, order)[inner]
    if sde:
        b[inner] *= 2.0
        s[inner] = noise_s * np.sqrt(np.expm1(2.0 * h))
    if ends_in_data:  # noise_s expm1(h) as noise_s -> 0
        b[-1, 0] = -a[-1] * grid.noise[-2]
    return a, b, s


def _weights(grid: Grid, y: Float64, order: int) -> Float64:
    """Weights of m_i, m_{i-1}, ... in y (phi_1 D0 + phi_2 D1 + phi_3 D2); float64 (N, order)."""
    h = grid.h
    weights = np.zeros((len(grid), order))
    for i, now in enumerate(grid.orders(order, taper=len(grid) < FEW_STEPS)):
        phi_1 = y_phi(1, y[i])
        weights[i, 0] = phi_1
        if now == 2:  # the midpoint rule: phi_1 / 2 in place of phi_2
            weights[i, :2] += phi_1 / 2 * (h[i] / h[i - 1]) * np.array([1.0, -1.0])
        if now == 3:
            phi_2, phi_3 = y_phi(2, y[i]), y_phi(3, y[i])
            r0, r1 = h[i - 1] / h[i], h[i - 2] / h[i]
            newer = np.array([1.0, -1.0, 0.0]) / r0
            older = np.array([0.0, 1.0, -1.0]) / r1
            d1 = newer + r0 / (r0 + r1) * (newer - older)
            d2 = (newer - older) / (r0 + r1)
            weights[i] += phi_2 * d1 + phi_3 * d2
    return weights
