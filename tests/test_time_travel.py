"""Time travel against RePaint's schedule in diffusers, closed forms, and what must not change."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from ddpm_edge import samplers
from ddpm_edge.errors import ConfigError
from ddpm_edge.noise import Stream
from ddpm_edge.plan import Plan, run_plan
from ddpm_edge.samplers import make_plan, time_travel
from ddpm_edge.schedule import Schedule

SCHEDULE = Schedule.linear()


@pytest.mark.parametrize(
    ("steps", "length", "repeat"),
    [(10, 3, 2), (10, 1, 3), (9, 4, 4), (10, 2, 2), (10, 4, 3), (12, 5, 2), (11, 10, 2)],
)
def test_where_repaint_turns_and_where_we_do(steps: int, length: int, repeat: int) -> None:
    """As often, and neither from the data; RePaint counts its stretches from t = 1 up, we from the
    top down, which is the same where length divides steps - 1. It goes up one level a step.
    """
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.RePaintScheduler(1000)
    scheduler.set_timesteps(steps, length, repeat)
    step = 1000 // steps
    theirs = (scheduler.timesteps // step).tolist()
    around = zip(theirs, theirs[1:], theirs[2:], strict=False)
    turns = [level for before, level, after in around if before == after == level + 1]
    plan = make_plan(SCHEDULE, "ddim", travel_length=length, travel_repeat=repeat, steps=steps,
                     spacing="leading")  # fmt: skip
    level = (plan.t - 1) // step
    ours = level[~plan.evaluate].tolist()
    assert turns == np.repeat(range(0, steps - length, length), repeat - 1)[::-1].tolist()
    assert ours == np.repeat(range(steps - 1 - length, -1, -length), repeat - 1).tolist()
    down = [v for v, after in zip(theirs, [*theirs[1:], -1], strict=True) if after < v]
    assert plan.evaluations == len(down)
    assert (level[plan.evaluate].tolist() == down) == ((steps - 1) % length == 0)


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


def moments(plan: Plan, mean: float, variance: float) -> tuple[float, float]:
    """Of x after the plan with the exact network on Gaussian data, through its own columns."""
    m, v = 0.0, 1.0
    for i in range(len(plan)):
        signal, noise = plan.signal[i], plan.noise[i]
        gain = signal * variance / (signal**2 * variance + noise**2) if plan.evaluate[i] else 0.0
        b = plan.b[i, 0]
        factor = plan.a[i] + b * gain
        m = factor * m + b * (1 - gain * signal) * mean
        v = factor**2 * v + plan.s[i] ** 2
    return m, v


def by_hand(order: list[int], mean: float, variance: float) -> tuple[float, float]:
    """The same from the paper's formulas over a list of timesteps, one step of q at a time up."""
    m, v, ab = 0.0, 1.0, SCHEDULE.alpha_bar
    for t, s in itertools.pairwise(order):
        if s > t:
            for u in range(t + 1, s + 1):
                m, v = np.sqrt(1 - SCHEDULE.beta[u]) * m, (1 - SCHEDULE.beta[u]) * v
                v += SCHEDULE.beta[u]
            continue
        alpha = ab[t] / ab[s]
        to_x0 = np.sqrt(ab[s]) * (1 - alpha) / (1 - ab[t])
        to_x = np.sqrt(alpha) * (1 - ab[s]) / (1 - ab[t])
        gain = np.sqrt(ab[t]) * variance / (ab[t] * variance + 1 - ab[t])
        m = (to_x + to_x0 * gain) * m + to_x0 * (1 - gain * np.sqrt(ab[t])) * mean
        v = (to_x + to_x0 * gain) ** 2 * v + (1 - ab[s]) / (1 - ab[t]) * (1 - alpha)
    return m, v


@pytest.mark.parametrize(("steps", "length", "repeat"), [(200, 40, 3), (50, 7, 2), (20, 1, 4)])
def test_moments_are_the_closed_form(steps: int, length: int, repeat: int) -> None:
    plan = time_travel(samplers.ddpm(SCHEDULE, steps, "beta-tilde"), length, repeat)
    base = [*samplers.ddpm(SCHEDULE, steps, "beta-tilde").t.tolist(), 0]
    order = base[: length + 1]
    for first in range(0, steps, length):
        if first:
            order += base[first + 1 : first + length + 1]
        if first + length < steps:
            order += base[first : first + length + 1] * (repeat - 1)
    got, expected = moments(plan, 0.4, 0.25), by_hand(order, 0.4, 0.25)
    assert got == pytest.approx(expected, abs=1e-10)  # float64
    without = moments(samplers.ddpm(SCHEDULE, steps, "beta-tilde"), 0.4, 0.25)
    # The mean only forgets its start; the variance has the discretisation's lack, not more than it
    assert abs(got[0] - 0.4) <= abs(without[0] - 0.4) + 1e-3
    assert abs(got[1] - 0.25) <= 1.2 * abs(without[1] - 0.25)


FIRST_ORDER: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"sampler": "dpmpp", "order": 2}, {"sampler": "dpmpp", "order": 1}),
    ({"sampler": "dpmpp", "order": 3}, {"sampler": "dpmpp", "order": 1}),
    ({"sampler": "dpmpp", "sde": True}, {"sampler": "dpmpp", "order": 1, "sde": True}),
    ({"sampler": "unipc", "order": 3}, {"sampler": "ddim"}),
]


@pytest.mark.parametrize(("multi", "single"), FIRST_ORDER, ids=lambda o: str(o))
def test_the_first_row_after_a_way_back_is_the_first_order_one(
    multi: dict[str, Any], single: dict[str, Any]
) -> None:
    """Its own step (a, s) with all weight on its own answer: that of the method of order 1."""
    plan = make_plan(SCHEDULE, steps=12, travel_length=4, travel_repeat=3, **multi)
    first = make_plan(SCHEDULE, steps=12, **single)
    anew = np.flatnonzero(plan.restart)[1:]
    assert len(anew) == 4
    for i in anew:
        j = int(np.flatnonzero(first.t == plan.t[i])[0])
        assert plan.a[i] == pytest.approx(first.a[j], abs=1e-12)
        assert plan.b[i, 0] == pytest.approx(first.b[j, 0], abs=1e-12)
        assert plan.s[i] == pytest.approx(first.s[j], abs=1e-12)
    # and what follows is what the plan does without travel, as soon as it has its history back
    base = make_plan(SCHEDULE, steps=12, **multi)
    last = plan.evaluate.nonzero()[0][-1]
    assert (plan.b[last] == base.b[-1]).all()


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
