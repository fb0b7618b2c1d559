"""DPM-Solver and DPM-Solver++ against diffusers in float64, and their order of convergence."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from toy import diffusers_states, draws, flow_error, in_float64, run, start, toy

from ddpm_edge import samplers
from ddpm_edge.errors import ConfigError
from ddpm_edge.plan import Plan
from ddpm_edge.samplers.dpm_solver import data_columns, noise_columns
from ddpm_edge.schedule import Schedule

STEPS = [5, 10, 20, 50]


def theirs(plan: Plan, z: np.ndarray, algorithm: str, order: int, **config: Any) -> np.ndarray:
    """The states of diffusers' DPMSolverMultistepScheduler at our timesteps, in float64."""
    torch = pytest.importorskip("torch")
    kind = pytest.importorskip("diffusers").DPMSolverMultistepScheduler
    with in_float64(kind):
        scheduler = kind(1000, algorithm_type=algorithm, solver_order=order, **config)
        scheduler.set_timesteps(timesteps=(plan.t - 1).tolist())
        sigma = Schedule.linear().noise / Schedule.linear().signal
        last = 0 if scheduler.config.final_sigmas_type == "zero" else 1
        scheduler.sigmas = torch.from_numpy(sigma[np.append(plan.t, last)])
        return diffusers_states(scheduler, plan, z)


# Both sides in float64: 1e-6 is asked for, 1e-9 relative holds; wrong coefficients differ by 1e-3.


def assert_same(got: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(got - expected).max() < 1e-9 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("sde", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpmpp_is_diffusers(order: int, sde: bool, steps: int) -> None:
    plan, z = samplers.dpmpp(Schedule.linear(), steps, order, sde), draws(steps)
    expected = theirs(plan, z, "sde-dpmsolver++" if sde else "dpmsolver++", order)
    got = run(plan, start(), z)
    if sde and order == 3:  # pinned: diffusers' phi_3 has the wrong sign of its 1/2 (see below)
        assert_same(got[:2], expected[:2])
        assert np.abs(got[2] - expected[2]).max() > 1e-3
        return
    assert_same(got, expected)


@pytest.mark.parametrize("spacing", ["karras", "logsnr", "leading"])
def test_dpmpp_is_diffusers_with_any_spacing(spacing: str) -> None:
    plan = samplers.dpmpp(Schedule.linear(), 10, 3, spacing=spacing)
    assert_same(run(plan, start(), draws(10)), theirs(plan, draws(10), "dpmsolver++", 3))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    ("order", "sde"), [(1, False), (2, False), (3, False), (1, True), (2, True)]
)
def test_dpm_is_diffusers_but_for_the_last_step(order: int, sde: bool, steps: int) -> None:
    """diffusers ends at sigma of t = 1; with 1 as our last timestep ours comes by there."""
    t = [*samplers.timesteps(Schedule.linear(), steps).tolist(), 1]
    plan, z = samplers.dpm(Schedule.linear(), order=order, sde=sde, spacing=t), draws(steps + 1)
    most = samplers.dpm(Schedule.linear(), order=order, sde=sde, spacing=t[:-1])
    expected = theirs(
        most, z, "sde-dpmsolver" if sde else "dpmsolver", order,
        final_sigmas_type="sigma_min", lower_order_final=steps + 1 < 15 and order == 3,
    )  # fmt: skip
    got = run(plan, start(), z)
    if order == 3 and steps + 1 < 15:  # their last step is then of order 1, ours of order 2
        expected, got = expected[:-2], got[:-1]
    assert_same(got[: len(expected)], expected)


def test_the_last_step_of_dpm_gives_x0() -> None:
    plan = samplers.dpm(Schedule.linear(), 10, 3)
    states = run(plan, start(), draws(10))
    x, t = states[-2], int(plan.t[-1])
    signal, noise = Schedule.linear().signal[t], Schedule.linear().noise[t]
    assert np.abs(states[-1] - (x - noise * toy(x, t)) / signal).max() < 1e-12


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize("sampler", [samplers.dpmpp, samplers.dpm])
def test_order_1_is_ddim(sampler: Any, steps: int) -> None:
    got = run(sampler(Schedule.linear(), steps, order=1), start(), draws(steps))
    expected = run(samplers.ddim(Schedule.linear(), steps), start(), draws(steps))
    assert np.abs(got - expected).max() < 1e-10


# Order of convergence: Gaussian data with exact eps, evenly in lambda, no step into the data.


@pytest.mark.parametrize(("columns", "form"), [(data_columns, "x0"), (noise_columns, "eps")])
@pytest.mark.parametrize(("order", "ratio"), [(1, 2.0), (2, 4.0), (3, 4.0)])
def test_order_of_convergence(columns: Any, form: str, order: int, ratio: float) -> None:
    """Halving the step divides the error by 2^order.

    Order 3 converges with order 2, as its authors' code and diffusers do: D2 is half of the second
    derivative that phi_3 belongs to, and the first steps are of lower order.
    """
    errors = [
        flow_error(steps, form, lambda grid: columns(grid, order, sde=False))
        for steps in (80, 160, 320)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(ratio, rel=0.08)  # the next order's share at 80 steps


def test_phi_3_of_diffusers_sde_does_not_vanish() -> None:
    """Why order 3 of the SDE differs: as h -> 0 the weight of D2 must vanish; theirs is -signal."""
    for h in (1e-1, 1e-2, 1e-3):
        y = 2 * h
        theirs = (1 - np.exp(-y) - y) / y**2 - 0.5
        ours = -((np.expm1(-y) + y) / y**2 - 0.5)
        assert theirs == pytest.approx(-1.0, abs=y)
        assert ours == pytest.approx(0.0, abs=y)


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        ("dpmpp", {"order": 4}, "order must be a whole number <= 3; got 4"),
        ("dpmpp", {"order": 0}, "order must be a whole number >= 1; got 0"),
        ("dpm", {"order": 3, "sde": True}, "order must be a whole number <= 2; got 3"),
        ("dpm", {"sde": 1}, "sde must be True or False; got 1"),
        ("dpmpp", {"sde": "no"}, "sde must be True or False; got 'no'"),
    ],
)
def test_bad_options(sampler: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        samplers.make_plan(Schedule.linear(), sampler, **options)


def test_dpm_needs_signal() -> None:
    for schedule in (Schedule.rectified_flow(100), Schedule.cosine()):
        with pytest.raises(ConfigError, match=r"dpm needs a signal of 0.001 .* use .* 'logsnr'"):
            samplers.dpm(schedule, 5)
        assert len(samplers.dpm(schedule, 5, spacing="logsnr")) == 5
