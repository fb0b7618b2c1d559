"""Time travel against RePaint's schedule in diffusers, closed forms, and what must not change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from toy import gaussian

from ddpm_edge import samplers
from ddpm_edge.errors import ConfigError
from ddpm_edge.noise import Stream
from ddpm_edge.plan import Plan, run_plan
from ddpm_edge.samplers import make_plan, time_travel
from ddpm_edge.schedule import Schedule

SCHEDULE = Schedule.linear()


@pytest.mark.parametrize(("steps", "length", "repeat"), [(10, 3, 2), (10, 1, 3), (9, 4, 4)])
def test_the_order_is_repaint_s(steps: int, length: int, repeat: int) -> None:
    """Where length divides steps - 1; RePaint counts its stretches from the data, we from T."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.RePaintScheduler(1000)
    scheduler.set_timesteps(steps, length, repeat)
    visited = scheduler.timesteps.tolist()  # goes back one timestep at a time
    down = [t + 1 for t, after in zip(visited, [*visited[1:], -1], strict=True) if after < t]
    plan = make_plan(SCHEDULE, "ddim", travel_length=length, travel_repeat=repeat, steps=steps,
                     spacing="leading")  # fmt: skip
    assert plan.t[plan.evaluate].tolist() == down
    assert plan.evaluations == steps + (repeat - 1) * (steps - 1)


def test_a_way_back_is_many_steps_of_q() -> None:
    plan = time_travel(samplers.ddpm(SCHEDULE, 1000), 400, 2)
    (first, second) = np.flatnonzero(~plan.evaluate)
    assert plan.t[[first, second]].tolist() == [600, 200]
    for row, s in ((first, 600), (second, 200)):
        factor = np.sqrt(SCHEDULE.alpha[s + 1 : s + 401].prod())
        assert plan.a[row] == pytest.approx(factor, rel=1e-12)
        assert plan.s[row] == pytest.approx(np.sqrt(1 - factor**2), rel=1e-12)
        assert (plan.b[row] == 0).all()
        assert plan.t[row + 1] == s + 400
    assert set(plan.stream[~plan.evaluate]) == {Stream.TRAVEL}
    assert len(set(zip(plan.stream.tolist(), plan.row.tolist(), strict=True))) == len(plan)


def test_with_the_exact_network_nothing_is_gained_or_lost() -> None:
    """Ancestral sampling keeps the marginals of Gaussian data but for its discretisation."""
    mean, variance, n = 0.4, 0.25, 4000
    deviations = []
    for repeat in (1, 3):
        plan = time_travel(samplers.ddpm(SCHEDULE, 200, "beta-tilde"), 40, repeat)
        rng = np.random.default_rng(0)
        *_, last = run_plan(
            plan, rng.standard_normal((n, 1)), gaussian(SCHEDULE, mean, variance),
            lambda stream, row, rng=rng: rng.standard_normal((n, 1)),
        )  # fmt: skip
        assert abs(last.x.mean() - mean) < 4 * np.sqrt(variance / n)
        deviations.append(last.x.std())
    assert deviations == pytest.approx([np.sqrt(variance)] * 2, rel=4 / np.sqrt(2 * n) + 0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "dpmpp", "order": 2}, {"sampler": "dpmpp", "order": 3},
        {"sampler": "dpmpp", "sde": True}, {"sampler": "unipc", "order": 3}, {"sampler": "ddpm"},
        {"sampler": "ddim", "eta": 1.0}, {"sampler": "euler"}, {"sampler": "consistency"},
        {"sampler": "pc"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::ddpm_edge.samplers.SamplerWarning")
def test_after_a_way_back_a_row_starts_anew(options: dict[str, Any]) -> None:
    base = make_plan(SCHEDULE, steps=12, **options)
    plan = make_plan(SCHEDULE, steps=12, **options, travel_length=4, travel_repeat=2)
    anew = np.flatnonzero(plan.restart)[1:]
    assert len(anew) == np.count_nonzero(~plan.evaluate) > 0
    assert (plan.b[anew, 1:] == 0).all()
    # An answer that never changes is a multiple of itself, whatever the order.
    constant = np.full((1, 2), 0.3)
    for whole in (base, plan):
        states = run_plan(whole, np.ones((1, 2)), lambda x, t: constant, lambda s, r: 0 * constant,
                          "x0")  # fmt: skip
        *_, last = states
        assert np.abs(last.x - constant).max() < 1e-12
    assert plan.name == f"{base.name[:-1]}, travel_length=4, travel_repeat=2)"


def test_the_plan_itself_where_there_is_nothing_to_repeat() -> None:
    plan = samplers.dpmpp(SCHEDULE, 10)
    assert time_travel(plan, 3, 1) is plan
    assert time_travel(samplers.dpm(SCHEDULE, 10), 3, 1).form == "eps"


def test_where_no_signal_is_left() -> None:
    """Rectified flow's T; warnings of NumPy would be errors here."""
    with np.errstate(all="raise"):
        plan = make_plan(Schedule.rectified_flow(100), "euler", steps=5, travel_length=2,
                         travel_repeat=2)  # fmt: skip
    back = np.flatnonzero(~plan.evaluate)
    assert plan.t[back].tolist() == [60, 20]
    assert plan.a[back[0]] == 0.0  # to T: all is noise
    assert plan.s[back[0]] == 1.0


def test_a_length_alone_does_nothing_and_is_refused() -> None:
    with pytest.raises(ConfigError, match="travel_length needs travel_repeat"):
        make_plan(SCHEDULE, "ddim", travel_length=5)


@pytest.mark.parametrize(
    ("plan", "length", "repeat", "message"),
    [
        (samplers.dpmpp(SCHEDULE, 10), 0, 2, "travel_length must be a whole number >= 1; got 0"),
        (samplers.dpmpp(SCHEDULE, 10), 2, 1.5, "travel_repeat must be a whole number >= 1; got 1"),
        (samplers.dpmpp(SCHEDULE, 10), 2, 10**5, "more than 100000 rows; give less"),
        (samplers.ddpm(SCHEDULE, 1000), 1, 99, "more than 100000 rows; give less"),
        (samplers.dpmpp(SCHEDULE, 10), 10, 2, "leaves nothing to repeat in 10 rows"),
        (samplers.dpm(SCHEDULE, 10), 2, 2, "needs a sampler on x0, and dpm.* is on eps; use dpmpp"),
        (samplers.ipndm(SCHEDULE, 10), 2, 2, "needs a sampler on x0"),
    ],
)
def test_travel_that_cannot_be(plan: Plan, length: Any, repeat: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        time_travel(plan, length, repeat)
