"""Timesteps: every spacing against its definition, diffusers, and bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ddpm_edge.errors import ConfigError
from ddpm_edge.samplers import SAMPLERS, SPACINGS, Grid, make_plan, timesteps
from ddpm_edge.schedule import Schedule

pytestmark = pytest.mark.filterwarnings("ignore::ddpm_edge.samplers.SamplerWarning")
quiet = pytest.mark.filterwarnings("ignore::ddpm_edge.schedule.ScheduleWarning")


@quiet
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_whole_descend_and_never_repeat(spacing: str) -> None:
    for schedule in (
        *(Schedule.constant(T, 0.5) for T in (1, 2, 7, 100)), Schedule.linear(), Schedule.cosine(),
        Schedule.linear(1000, 1e-4, 0.2),
    ):  # fmt: skip
        T = schedule.T
        for steps in {1, 2, 3, T // 3, T // 2, T - 1, T} & set(range(1, T + 1)):
            t = timesteps(schedule, steps, spacing)
            assert t.dtype == np.int64
            assert len(t) == steps
            assert (np.diff(t) < 0).all()
            assert t[-1] >= 1
            assert t[0] <= T
            if spacing not in ("leading", "logsnr", "karras"):
                assert t[0] == T


@pytest.mark.parametrize("steps", [3, 7, 37, 600, 999])
def test_trailing_steps_that_do_not_divide_t_are_spread_over_all_of_it(steps: int) -> None:
    t = timesteps(Schedule.linear(), steps)
    gaps = -np.diff(np.append(t, 0))
    assert gaps.sum() == 1000
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_spacings_that_diffusers_has(spacing: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(1000, timestep_spacing=spacing)
    for steps in (2, 7, 10, 15, 37, 50, 60, 250):
        scheduler.set_timesteps(steps)
        assert (
            timesteps(Schedule.linear(), steps, spacing) - 1 == scheduler.timesteps.numpy()
        ).all()


@pytest.mark.parametrize("steps", [5, 10, 20])
@pytest.mark.parametrize(
    ("spacing", "option"), [("karras", "use_karras_sigmas"), ("logsnr", "use_lu_lambdas")]
)
def test_karras_and_logsnr_are_diffusers(spacing: str, option: str, steps: int) -> None:
    """diffusers' rounded timesteps; the sigma beside them is ours on purpose, that of the timestep.

    Its table of sigmas is float32, so that a timestep near a half may round the other way.
    """
    diffusers = pytest.importorskip("diffusers")
    schedule = Schedule.linear()
    scheduler = diffusers.DPMSolverMultistepScheduler(1000, **{option: True})
    scheduler.set_timesteps(steps)
    t = timesteps(schedule, steps, spacing)
    theirs = scheduler.timesteps.numpy() + 1
    assert np.abs(t - theirs).max() <= 1
    sigma = schedule.noise[t] / schedule.signal[t]
    assert np.abs(np.log(sigma / scheduler.sigmas.numpy()[:-1])).max() < 0.3  # half a timestep's
    assert (np.abs(np.log(sigma / scheduler.sigmas.numpy()[:-1])) > 1e-4).any()  # and not the same


def test_even_in_what_they_say() -> None:
    """On a schedule with many timesteps rounding to one hardly matters: 1 % of a gap."""
    schedule = Schedule.linear(10_000, 1e-5, 2e-3)
    t = timesteps(schedule, 8, "quadratic")
    assert np.diff(np.sqrt(t)) == pytest.approx(np.full(7, np.diff(np.sqrt(t)).mean()), rel=0.02)
    t = timesteps(schedule, 8, "logsnr")[:6]  # near the data a gap is a few timesteps
    gaps = np.diff(np.log(schedule.signal[t] / schedule.noise[t]))
    assert gaps == pytest.approx(np.full(5, gaps.mean()), rel=0.02)
    t = timesteps(schedule, 8, "karras")[:6]
    gaps = np.diff((schedule.noise[t] / schedule.signal[t]) ** (1 / 7))
    assert gaps == pytest.approx(np.full(5, gaps.mean()), rel=0.02)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_takes_a_list(sampler: str) -> None:
    listed = [1000, 740, 600, 200, 30, 7]
    for spacing in (listed, tuple(listed), np.array(listed)):
        plan = make_plan(Schedule.linear(), sampler, spacing=spacing)
        assert sorted(set(plan.t.tolist()), reverse=True) == listed
        assert "spacing=list" in plan.name
    assert len(make_plan(Schedule.linear(), sampler, spacing=listed, steps=6)) >= 6


@quiet
def test_default_steps() -> None:
    assert len(timesteps(Schedule.linear(), None)) == 20
    short = Schedule.linear(10, 1e-2, 0.9)
    assert timesteps(short, None).tolist() == list(range(10, 0, -1))


def test_the_grid_ends_in_the_data() -> None:
    schedule = Schedule.linear()
    grid = Grid.of(schedule, 4, "trailing")
    assert grid.t.tolist() == [1000, 750, 500, 250]
    assert grid.signal.tolist() == [*schedule.signal[grid.t].tolist(), 1.0]
    assert grid.noise.tolist() == [*schedule.noise[grid.t].tolist(), 0.0]
    assert grid.lam[-1] == np.inf
    assert Grid.of(Schedule.rectified_flow(100), 4, "trailing").lam[0] == -np.inf


@pytest.mark.parametrize(
    ("steps", "taper", "orders"),
    [
        (1, False, [1]),
        (5, False, [1, 2, 3, 3, 1]),
        (5, True, [1, 2, 3, 2, 1]),
        (2, True, [1, 1]),
    ],
)
def test_orders(steps: int, taper: bool, orders: list[int]) -> None:
    grid = Grid.of(Schedule.linear(), steps, "trailing")
    assert grid.orders(3, taper) == orders
    open_end = Grid(grid.t, grid.signal[:-1], grid.noise[:-1])
    assert open_end.orders(3, taper)[: steps - 1] == [1, 2, 3, 3][: steps - 1]
    flow = Grid.of(Schedule.rectified_flow(100), 6, "trailing")
    assert flow.orders(2, taper=False) == [1, 1, 2, 2, 2, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be a whole number >= 1; got 0"),
        ({"steps": -3}, "got -3"),
        ({"steps": 1001}, "steps must be in 1..1000, the timesteps the model was tr.*; got 1001"),
        ({"steps": 2.0}, "steps must be a whole number >= 1; got 2.0"),
        ({"steps": True}, "got True"),
        ({"steps": 5, "spacing": "karas"}, "got 'karas'; did you mean 'karras'"),
        ({"steps": 5, "spacing": "even"}, "spacing must be one of trailing, leading, linspace"),
        ({"spacing": [1000, 400, 600]}, "must descend; got 600 after 400"),
        ({"spacing": [1000, 400, 400]}, "must descend; got 400 after 400"),
        ({"spacing": [1001, 400]}, "timestep of spacing must be a whole number <= 1000; got 1001"),
        ({"spacing": [400, 0]}, "a timestep of spacing must be a whole number >= 1; got 0"),
        ({"spacing": [400, 1.0]}, "got 1.0"),
        ({"spacing": ["400"]}, "got '400'"),
        ({"spacing": []}, "spacing is an empty list"),
        ({"spacing": {1000, 5}}, "spacing must be a name or a list of timesteps; got {"),
        ({"spacing": {1000: 1}}, "got {1000: 1}"),
        ({"spacing": np.ones((2, 2), int)}, "spacing must be a name or a list"),
        ({"spacing": 5}, "spacing must be a name or a list of timesteps; got 5"),
        ({"spacing": None}, "got None"),
        ({"steps": 3, "spacing": [9, 8]}, "steps is 3, but spacing lists 2 timesteps; give"),
    ],
)  # fmt: skip
def test_bad_timesteps(arguments: dict[str, Any], message: str) -> None:
    for call in (
        timesteps,
        lambda schedule, steps, **o: make_plan(schedule, "ddim", steps=steps, **o),
    ):
        with pytest.raises(ConfigError, match=message):
            call(Schedule.linear(), **({"steps": None} | arguments))


@quiet
@pytest.mark.parametrize("spacing", ["logsnr", "karras"])
def test_log_spacings_begin_where_there_is_signal(spacing: str) -> None:
    for schedule in (
        Schedule.rectified_flow(1000), Schedule.cosine(), Schedule.linear(1000, 1e-4, 0.2),
    ):  # fmt: skip
        t = timesteps(schedule, 10, spacing)
        lam = np.log(schedule.signal[t] / schedule.noise[t])
        assert -5.1 <= lam[0] < -4.4  # the last timesteps are far apart in lambda
        assert t[-1] == 1
    assert timesteps(Schedule.rectified_flow(5), 5, spacing).tolist() == [5, 4, 3, 2, 1]
