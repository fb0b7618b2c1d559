"""UniPC against diffusers in float64, and its order of convergence."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from toy import diffusers_states, draws, flow_error, in_float64, run, start

from ddpm_edge import samplers
from ddpm_edge.errors import ConfigError
from ddpm_edge.plan import Plan
from ddpm_edge.samplers.unipc import columns
from ddpm_edge.schedule import Schedule


def theirs(plan: Plan, order: int) -> np.ndarray:
    """The states of diffusers' UniPCMultistepScheduler at our timesteps, in float64."""
    torch = pytest.importorskip("torch")
    kind = pytest.importorskip("diffusers").UniPCMultistepScheduler
    schedule = Schedule.linear()
    with in_float64(kind):
        scheduler = kind(1000, solver_order=order)
        scheduler.set_timesteps(len(plan))
        scheduler.timesteps = torch.from_numpy(plan.t - 1)
        scheduler.sigmas = torch.from_numpy(
            (schedule.noise / schedule.signal)[np.append(plan.t, 0)]
        )
        return diffusers_states(scheduler, plan, draws(len(plan)))


@pytest.mark.parametrize("spacing", ["trailing", "karras"])
@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20, 50])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_diffusers(order: int, steps: int, spacing: str) -> None:
    """Float64 on both sides: 1e-6 is asked for, 1e-9 relative holds."""
    plan = samplers.unipc(Schedule.linear(), steps, order, spacing)
    got, expected = run(plan, start(), draws(steps)), theirs(plan, order)
    assert np.abs(got - expected).max() < 1e-9 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize(("order", "ratio"), [(1, 4.0), (2, 8.0), (3, 16.0)])
def test_order_of_convergence(order: int, ratio: float) -> None:
    """Halving the step divides the error by 2^(p + 1): UniPC-p has order p + 1 (the paper's 3.2).

    The last state has not been corrected: one step of the predictor's order p, whose error is of
    order p + 1 too.
    """
    errors = [
        flow_error(steps, "x0", lambda grid: columns(grid, order)) for steps in (160, 320, 640)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(ratio, rel=0.08)  # the next order's share at 160


def test_rectified_flow_is_finite() -> None:
    for order in (1, 2, 3):
        plan = samplers.unipc(Schedule.rectified_flow(100), 7, order)
        states = run(plan, start(), draws(7), lambda x, t: np.tanh(x), "velocity")
        assert np.isfinite(states).all()


def test_bad_order() -> None:
    with pytest.raises(ConfigError, match="order must be a whole number <= 3; got 4"):
        samplers.unipc(Schedule.linear(), 5, 4)
