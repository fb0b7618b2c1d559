"""Langevin rows: their stationary variance, the paper's step on average, and their own noise."""

from __future__ import annotations

import numpy as np
import pytest
from toy import gaussian

from ddpm_edge import samplers
from ddpm_edge.errors import ConfigError
from ddpm_edge.noise import Draws, Stream
from ddpm_edge.plan import run_plan
from ddpm_edge.samplers.predictor_corrector import langevin
from ddpm_edge.schedule import Schedule


@pytest.mark.parametrize("snr", [0.16, 0.5])
def test_stationary_variance(snr: float) -> None:
    """x <- (1 - h/V) x + sqrt(2 h) z, Langevin on N(0, V), has variance V / (1 - h/2V)."""
    schedule, variance, n = Schedule.linear(), 0.25, 20_000
    t = 300
    plan = samplers.pc(schedule, corrections=400, snr=snr, spacing=[301, t])
    rows = np.flatnonzero(plan.stream == Stream.LANGEVIN)
    assert len(rows) == 400
    assert set(plan.t[rows].tolist()) == {t}
    draws = Draws(0, 0, (1, n))
    states = run_plan(
        plan, np.zeros((1, n)), gaussian(schedule, 0.0, variance),
        lambda stream, row: draws(stream, row).astype(np.float64),
    )  # fmt: skip
    measured = next(float(s.x.var()) for s in states if s.index == rows[-1])
    total = schedule.signal[t] ** 2 * variance + schedule.noise[t] ** 2
    step = 2 * (snr * schedule.noise[t]) ** 2
    expected = total / (1 - step / (2 * total))
    assert measured == pytest.approx(expected, rel=4 * np.sqrt(2 / n))  # four standard errors
    if snr == 0.5:  # the bias of the step is seen
        assert abs(measured - total) > 8 * total * np.sqrt(2 / n)


def test_the_step_is_the_papers_in_expectation() -> None:
    """Song et al.'s Algorithm 4, step = 2 (snr |z| / |score|)^2, for score = -eps / noise."""
    snr, noise, n = 0.16, 0.7, 1_000_000
    rng = np.random.default_rng(0)
    z, score = rng.standard_normal(n), -rng.standard_normal(n) / noise
    step = 2 * (snr * np.linalg.norm(z) / np.linalg.norm(score)) ** 2
    of_x, of_x0, of_z = langevin(np.array([0.714]), np.array([noise]), snr)
    assert of_z[0] ** 2 / 2 == pytest.approx(step, rel=0.01)
    x, x0 = 0.4, -0.2
    eps = (x - 0.714 * x0) / noise
    assert of_x[0] * x + of_x0[0] * x0 == pytest.approx(x - of_z[0] ** 2 / 2 * eps / noise)


def test_rows() -> None:
    plan = samplers.pc(Schedule.linear(), 4, corrections=2)
    assert plan.t.tolist() == [1000, 750, 750, 750, 500, 500, 500, 250, 250, 250]
    step, langevin = Stream.STEP, Stream.LANGEVIN
    assert plan.stream.tolist() == [step, *[langevin, langevin, step] * 3]
    assert plan.evaluations == 4 + 2 * 3
    assert plan.s[-1] == 0
    assert "corrections=2, snr=0.16" in plan.name


def test_without_corrections_it_is_algorithm_2_with_beta_tilde() -> None:
    for steps in (1, 7):
        a = samplers.pc(Schedule.linear(), steps, corrections=0)
        b = samplers.ddpm(Schedule.linear(), steps, "beta-tilde")
        for column in ("t", "signal", "noise", "a", "b", "s", "stream", "row"):
            assert np.array_equal(getattr(a, column), getattr(b, column))
    assert len(samplers.pc(Schedule.linear(), 1, corrections=3)) == 1  # nowhere to correct


def test_streams_do_not_make_each_other_draw_again() -> None:
    draws, made = Draws(0, 0, (2, 3)), []
    original = draws.rows
    draws.rows = lambda stream, rows: made.append(stream) or original(stream, rows)  # type: ignore
    z = {(s, r): draws(s, r).copy() for r in range(5) for s in (Stream.STEP, Stream.LANGEVIN)}
    assert made == [Stream.STEP, Stream.LANGEVIN]
    assert not np.array_equal(z[Stream.STEP, 1], z[Stream.LANGEVIN, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corrections": -1}, "corrections must be a whole number >= 0; got -1"),
        ({"corrections": 1.5}, "got 1.5"),
        ({"corrections": 2**62}, "corrections must be a whole number <= 1000; got 46116"),
        ({"steps": 1000, "corrections": 1000}, "more than 100000 rows; give fewer"),
        ({"snr": 0}, "snr must be a number above 0; got 0"),
        ({"snr": float("nan")}, "snr must be a number above 0; got nan"),
        ({"snr": "a"}, "snr must be a number; got 'a'"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        samplers.pc(Schedule.linear(), **({"steps": 5} | options))
