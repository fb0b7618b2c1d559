"""The forward process against published values, diffusers and Bayes' rule."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from ddpm_edge.errors import ScheduleError
from ddpm_edge.schedule import Schedule, ScheduleWarning

RULES = [
    Schedule.linear(),
    Schedule.linear(100, 1e-4, 0.2),
    Schedule.cosine(),
    Schedule.sigmoid(2000),
    Schedule.constant(1000, 0.01),
    Schedule.from_betas(np.linspace(1e-4, 0.03, 700)),
]


@pytest.mark.filterwarnings("ignore::ddpm_edge.schedule.ScheduleWarning")
@pytest.mark.parametrize(
    ("make", "alpha_bar_T"),
    [
        (lambda: Schedule.linear(), 4.04e-5),
        (lambda: Schedule.linear(1000, 1e-4, 0.2), 2.1e-47),
        (lambda: Schedule.linear(100, 1e-4, 0.2), 2.14e-5),
        (lambda: Schedule.cosine(), 2.4e-9),
        (lambda: Schedule.geometric(), 0.0228),
        (lambda: Schedule.geometric(1000, 1e-4, 0.2), 8.2e-13),
    ],
)
def test_published_values(make: object, alpha_bar_T: float) -> None:
    got = make().alpha_bar[-1]  # type: ignore[operator]
    digits = len(f"{alpha_bar_T:e}".partition("e")[0].rstrip("0")) - 2  # as many as are published
    assert got == pytest.approx(alpha_bar_T, rel=0.5 * 10.0**-digits)


@pytest.mark.parametrize("T", [10, 1000])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Schedule.linear, "linear"),
        (Schedule.sigmoid, "sigmoid"),
        (lambda T, *_: Schedule.cosine(T), "squaredcos_cap_v2"),
    ],
)
@pytest.mark.filterwarnings("ignore::ddpm_edge.schedule.ScheduleWarning")
def test_betas_are_those_of_diffusers(make: object, name: str, T: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(T, beta_start=1e-4, beta_end=0.02, beta_schedule=name)
    ours = make(T, 1e-4, 0.02)  # type: ignore[operator]
    # their tables are float32; its relative rounding on 1 - f / f of the cosine is the largest
    assert np.abs(ours.beta[1:] - theirs.betas.numpy()).max() < 1e-7
    assert np.abs(ours.alpha_bar[1:] - theirs.alphas_cumprod.numpy()).max() < 1e-6


@pytest.mark.filterwarnings("ignore::ddpm_edge.schedule.ScheduleWarning")
def test_geometric_is_a_constant_factor() -> None:
    schedule = Schedule.geometric(5, 0.1, 0.9)
    assert np.allclose(schedule.beta[2:] / schedule.beta[1:-1], 9 ** (1 / 4), rtol=1e-14)
    assert schedule.beta[[1, 5]].tolist() == pytest.approx([0.1, 0.9], rel=1e-14)


@pytest.mark.parametrize("schedule", RULES, ids=repr)
def test_arrays_follow_from_beta(schedule: Schedule) -> None:
    assert len(schedule.alpha_bar) == schedule.T + 1
    assert schedule.beta[0] == 0.0
    assert schedule.alpha_bar[0] == schedule.signal[0] == 1.0
    assert schedule.noise[0] == 0.0
    product = 1.0
    for t in range(1, schedule.T + 1):
        product *= 1.0 - schedule.beta[t]
        assert schedule.alpha_bar[t] == pytest.approx(product, rel=1e-12)
    assert np.allclose(schedule.signal**2 + schedule.noise**2, 1.0, atol=1e-15)
    with pytest.raises(ValueError, match="read-only"):
        schedule.beta[1] = 0.5


@pytest.mark.parametrize("schedule", RULES, ids=repr)
def test_dict_round_trip(schedule: Schedule) -> None:
    again = Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert (again.beta == schedule.beta).all()
    assert repr(again) == repr(schedule)


def test_q_sample_is_eq_4() -> None:
    schedule = Schedule.linear()
    rng = np.random.default_rng(0)
    x0, eps = rng.standard_normal((2, 3, 1, 4, 4))
    t = np.array([0, 500, 1000])
    x_t = schedule.q_sample(x0, t, eps)
    for i in range(3):
        ab = schedule.alpha_bar[t[i]]
        expected = math.sqrt(ab) * x0[i] + math.sqrt(1 - ab) * eps[i]
        assert np.abs(x_t[i] - expected).max() < 1e-15
    assert (schedule.q_sample(x0, 0, eps) == x0).all()
    assert schedule.q_sample(x0.astype(np.float32), 7, eps.astype(np.float32)).dtype == np.float32


@pytest.mark.parametrize("t", [1, 2, 500, 1000])
def test_posterior_is_bayes_rule(t: int) -> None:
    """q(x_{t-1} | x_t, x_0) from the product of q(x_t | x_{t-1}) and q(x_{t-1} | x_0)."""
    schedule = Schedule.linear()
    x0, x_t = np.array([[0.7]]), np.array([[-0.3]])
    mean, variance = schedule.posterior_mean(x0, x_t, t), schedule.posterior_variance(t)
    if t == 1:
        assert variance == 0.0
        assert mean == pytest.approx(x0)
        return
    ab, alpha, beta = schedule.alpha_bar[t - 1], schedule.alpha[t], schedule.beta[t]
    precision = alpha / beta + 1 / (1 - ab)  # of the product of the two Gaussians in x_{t-1}
    weighted = math.sqrt(alpha) * x_t / beta + math.sqrt(ab) * x0 / (1 - ab)
    assert variance == pytest.approx(1 / precision, rel=1e-10)
    assert mean == pytest.approx(weighted / precision, rel=1e-10)


def test_posterior_takes_one_t_a_sample() -> None:
    schedule = Schedule.cosine()
    x0, x_t = np.random.default_rng(0).standard_normal((2, 3, 1, 2, 2))
    t = np.array([1, 10, 999])
    together = schedule.posterior_mean(x0, x_t, t)
    for i in range(3):
        single = schedule.posterior_mean(x0[i : i + 1], x_t[i : i + 1], int(t[i]))
        assert (together[i : i + 1] == single).all()


@pytest.mark.parametrize(
    "bad", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf], ids=lambda value: str(value)
)
def test_betas_outside_0_1(bad: float) -> None:
    with pytest.raises(ScheduleError, match=rf"between 0 and 1; got beta_2 = {bad} \(t = 2 of 3\)"):
        Schedule.from_betas([0.1, bad, 0.1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule.from_betas([]), r"T >= 1 numbers; got an array of shape \(0,\)"),
        (lambda: Schedule.from_betas([[0.1]]), r"shape \(1, 1\)"),
        (lambda: Schedule.linear(0), "T must be a whole number >= 1; got 0"),
        (lambda: Schedule.linear(-3), "got -3"),
        (lambda: Schedule.cosine(10.0), "got 10.0"),  # type: ignore[arg-type]
        (lambda: Schedule.constant(True), "got True"),
        (lambda: Schedule.linear(10, 0.1, 1.0), "beta_10 = 1.0"),
        (lambda: Schedule.geometric(10, 0.0, 0.1), "beta_1 and beta_T must be above 0"),
        (lambda: Schedule.from_dict({"rule": "mine"}), "unknown schedule rule 'mine'; known: lin"),
        (lambda: Schedule.from_dict({"rule": ["linear"]}), "unknown schedule rule"),
        (
            lambda: Schedule.from_dict({"rule": "cosine", "beta_1": 0.1}),
            "'cosine' has no beta_1; it has T, s, max",
        ),
        (lambda: Schedule.from_dict({"rule": "linear", "beta_1": "x"}), "'beta_1': 'x'"),
        (lambda: Schedule.from_dict({"rule": "betas"}), "betas"),
        (lambda: RULES[0].q_sample(np.zeros(1), 1001, np.zeros(1)), r"in 0..1000; got 1001"),
        (lambda: RULES[0].q_sample(np.zeros(1), 1.0, np.zeros(1)), r"in 0..1000; got 1.0"),
        (lambda: RULES[0].posterior_variance(0), r"in 1..1000; got 0"),
        (lambda: RULES[0].posterior_mean(np.zeros(1), np.zeros(1), [0]), r"in 1..1000; got \[0\]"),
    ],
)
def test_bad_input(make: object, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        make()  # type: ignore[operator]


def test_warnings() -> None:
    with pytest.warns(ScheduleWarning, match=r"sqrt\(alpha_bar_T\) = 0.151 > 0.01"):
        Schedule.geometric()
    with pytest.warns(ScheduleWarning, match="alpha_bar_T = 2.09e-47 < 1e-12"):
        Schedule.linear(1000, 1e-4, 0.2)
