"""UniPC (Zhao et al. 2023, arXiv:2302.04867), the B_2(h) = expm1(h) variant, on x0."""

from __future__ import annotations

import math

import numpy as np

from ddpm_edge import checks
from ddpm_edge.arrays import Float64
from ddpm_edge.plan import Plan
from ddpm_edge.samplers.grid import DEFAULT_SPACING, Grid, Spacing
from ddpm_edge.samplers.phi import y_phi
from ddpm_edge.schedule import Schedule

MAX_ORDER = 3


def unipc(
    schedule: Schedule,
    steps: int | None = None,
    order: int = 2,
    spacing: Spacing = DEFAULT_SPACING,
    clip: float | str | None = None,
) -> Plan:
    """UniPC: a predictor of this order, and a corrector that needs no evaluation of its own.

    The corrector moves the state by what the next answer reveals. Both are linear, so that it is
    folded into the row that asks for this answer; a state between two rows is the predicted one.

    Args:
        schedule: the forward process.
        steps: see `timesteps`.
        order: 1, 2 or 3.
        spacing: see `timesteps`.
        clip: of x0, see `Clip.parse`; None = not.
    """
    order = checks.whole("order", order, most=MAX_ORDER)
    grid = Grid.of(schedule, steps, spacing)
    a, b = columns(grid, order)
    return grid.plan("unipc", "x0", a, b, order=order, spacing=spacing, clip=clip)


def columns(grid: Grid, order: int) -> tuple[Float64, Float64]:
    """Columns a, b: the correction of the step before, carried through this step's prediction."""
    lam, h, signal = grid.lam, grid.h, grid.signal
    a = grid.noise[1:] / grid.noise[:-1]
    b = np.zeros((len(grid), order + 1))
    correction = np.zeros(order + 1)  # of the first state: none
    for i, now in enumerate(grid.orders(order, taper=True)):
        b[i] = a[i] * correction
        r = (lam[i - now + 1 : i][::-1] - lam[i]) / h[i]  # (now - 1,)
        moments, b_h = _moments(-h[i], now), np.expm1(-h[i])
        predict = _rho(r, moments, now - 1) if now != 2 else np.array([0.5])
        correct = _rho(np.append(r, 1.0), moments, now) if now != 1 else np.array([0.5])
        # D_k = (m_{i-k} - m_i) / r_k as weights of m_i, m_{i-1}, ...
        differences = np.zeros((now - 1, order + 1))
        differences[:, 0] = -1.0 / r
        differences[np.arange(now - 1), np.arange(1, now)] = 1.0 / r
        b[i, 0] -= signal[i + 1] * b_h
        b[i] -= signal[i + 1] * b_h * predict @ differences
        # With the next answer: rho_c D_k instead of rho_p D_k, and its own difference.
        moved = np.zeros(order + 1)
        moved[1:] = ((correct[:-1] - predict) @ differences)[:-1]
        moved[:2] += correct[-1] * np.array([1.0, -1.0])
        correction = -signal[i + 1] * b_h * moved
    return a, b


def _moments(y: float, order: int) -> Float64:
    """The paper's Eq 8 for k = 1..order: k! y phi_{k+1}(y) / B(y), with B(y) = expm1(y)."""
    orders = range(1, order + 1)
    moments: Float64 = np.array([math.factorial(k) * y_phi(k + 1, y) for k in orders])
    moments /= np.expm1(y)
    return moments


def _rho(r: Float64, moments: Float64, order: int) -> Float64:
    """Weights of the differences: sum_k rho_k r_k^(j-1) = moment_j for j = 1..order."""
    rho: Float64 = np.linalg.solve(np.vander(r, order, increasing=True).T, moments[:order])
    return rho
