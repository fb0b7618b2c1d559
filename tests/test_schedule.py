"""The forward process against published values, diffusers and Bayes' rule."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from ddpm_edge import samplers
from ddpm_edge.errors import ConfigError, ScheduleError
from ddpm_edge.noise import Draws, Stream
from ddpm_edge.plan import PREDICTIONS, run_plan
from ddpm_edge.samplers import SAMPLERS
from ddpm_edge.schedule import RULES, Schedule, ScheduleWarning

quiet = pytest.mark.filterwarnings("ignore::ddpm_edge.schedule.ScheduleWarning")

SCHEDULES: dict[str, Callable[[], Schedule]] = {  # none of them warns
    "linear": Schedule.linear,
    "linear 0.2": lambda: Schedule.linear(100, 1e-4, 0.2),
    "geometric": lambda: Schedule.geometric(200, 1e-4, 0.5),
    "cosine": Schedule.cosine,
    "sigmoid": lambda: Schedule.sigmoid(300, 1e-3, 0.1),
    "constant": lambda: Schedule.constant(50, 0.3),
    "betas": lambda: Schedule.from_betas([0.1, 0.9, 0.99, 0.2, 0.999]),
}


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return SCHEDULES[request.param]()


@pytest.fixture
def scheduler64(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """A function that makes diffusers' DDPMScheduler, whose tables are float32, in float64."""
    torch = pytest.importorskip("torch")
    ddpm = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")

    class Torch64:
        float32 = torch.float64

        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(ddpm, "torch", Torch64())
    yield ddpm.DDPMScheduler
    torch.set_default_dtype(before)


def test_every_rule_is_among_the_schedules_tested() -> None:
    tested = {SCHEDULES[name]().to_dict()["rule"] for name in SCHEDULES}
    assert tested == set(RULES) - {"rectified-flow"}  # it has no betas; see below


@quiet
@pytest.mark.parametrize(
    ("made", "alpha_bar", "half"),  # half of the last digit that is given
    [
        (lambda: Schedule.linear(1000, 1e-4, 0.02), 4.04e-5, 0.005e-5),
        (lambda: Schedule.linear(1000, 1e-4, 0.2), 2.1e-47, 0.05e-47),
        (lambda: Schedule.linear(100, 1e-4, 0.2), 2.14e-5, 0.005e-5),
        (lambda: Schedule.cosine(1000), 2.4e-9, 0.05e-9),
        (lambda: Schedule.geometric(1000, 1e-4, 0.02), 0.0228, 0.00005),
        (lambda: Schedule.geometric(1000, 1e-4, 0.2), 8.2e-13, 0.05e-13),
    ],
)
def test_alpha_bar_at_the_end(made: Callable[[], Schedule], alpha_bar: float, half: float) -> None:
    assert made().alpha_bar[-1] == pytest.approx(alpha_bar, rel=0, abs=half)


def test_the_defaults_are_those_of_ho_et_al() -> None:
    schedule = Schedule.linear()
    assert schedule.T == 1000
    assert schedule.beta[[1, 1000]].tolist() == [1e-4, 0.02]
    assert np.ptp(np.diff(schedule.beta[1:])) < 1e-16  # a line, to an ulp of 0.02


def test_the_ends_of_each_rule() -> None:
    geometric = Schedule.geometric(200, 1e-4, 0.5)
    # rtol 1e-13: a power of float64 is good to some ulps (2e-16) of its exponent, here ln 5000.
    np.testing.assert_allclose(geometric.beta[[1, 200]], [1e-4, 0.5], rtol=1e-13)
    np.testing.assert_allclose(geometric.beta[2:] / geometric.beta[1:-1], 5000 ** (1 / 199), 1e-13)
    assert (Schedule.constant(50, 0.3).beta[1:] == 0.3).all()
    assert Schedule.cosine(1000).beta[1000] == 0.999
    assert Schedule.cosine(100, max_beta=0.99).beta.max() == 0.99


@quiet
@pytest.mark.parametrize("T", [1, 2, 10, 100, 1000])
def test_cosine_is_equation_17(T: int) -> None:
    """Nichol and Dhariwal 2021: alpha_bar itself, where beta is below 0.999."""
    t = np.arange(T)
    f = np.cos((t / T + 0.008) / 1.008 * np.pi / 2) ** 2
    # atol 1e-13: a product of 1000 factors, each rounded to 1e-16
    np.testing.assert_allclose(Schedule.cosine(T).alpha_bar[:-1], f / f[0], rtol=0, atol=1e-13)


@quiet
@pytest.mark.parametrize("T", [1, 2, 50, 1000])
@pytest.mark.parametrize(
    ("rule", "name"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2"), ("sigmoid",) * 2]
)
def test_betas_are_those_of_diffusers(scheduler64: Callable, rule: str, name: str, T: int) -> None:
    theirs = scheduler64(num_train_timesteps=T, beta_schedule=name)
    ours = RULES[rule](T)
    assert str(theirs.betas.dtype) == "torch.float64"
    # Both float64; 1 - f / f and the logistic cancel digits, so the error is absolute: ulps of 1.
    np.testing.assert_allclose(ours.beta[1:], theirs.betas.numpy(), rtol=0, atol=1e-15)
    # T rounded factors
    np.testing.assert_allclose(ours.alpha_bar[1:], theirs.alphas_cumprod.numpy(), 1e-12, 1e-15)


def test_the_arrays_belong_together(schedule: Schedule) -> None:
    arrays = (schedule.beta, schedule.alpha, schedule.alpha_bar, schedule.signal, schedule.noise)
    for array in arrays:
        assert array.dtype == np.float64
        assert array.shape == (schedule.T + 1,)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0.5
    assert [array[0] for array in arrays] == [0, 1, 1, 1, 0]
    product = 1.0
    for t in range(1, schedule.T + 1):
        product *= 1.0 - schedule.beta[t]
        assert schedule.alpha_bar[t] == pytest.approx(product, rel=1e-12)  # order of rounding
    # to some ulps
    np.testing.assert_allclose(schedule.signal**2 + schedule.noise**2, 1.0, rtol=0, atol=1e-15)


def test_beta_is_copied() -> None:
    betas = np.full(20, 0.5)
    schedule = Schedule.from_betas(betas)
    betas[:] = 0.1
    assert (schedule.beta[1:] == 0.5).all()


def test_q_sample_has_the_mean_and_deviation_of_equation_4(schedule: Schedule) -> None:
    """By t single steps x <- sqrt(1 - beta) x + sqrt(beta) z, mean and variance followed."""
    x0, mean, variance = np.array([0.7, -1.0]), np.array([0.7, -1.0]), 0.0
    for t in range(schedule.T + 1):
        mean = mean * np.sqrt(1 - schedule.beta[t])
        variance = variance * (1 - schedule.beta[t]) + schedule.beta[t]
        # 1e-12: up to 1000 steps, each rounded to 1e-16
        np.testing.assert_allclose(schedule.q_sample(x0, t, np.zeros(2)), mean, 1e-12)
        deviation = schedule.q_sample(x0, t, np.ones(2)) - schedule.q_sample(x0, t, np.zeros(2))
        np.testing.assert_allclose(deviation, np.sqrt(variance), rtol=1e-12, atol=1e-15)


def test_q_sample_of_draws() -> None:
    schedule, n = Schedule.linear(), 100_000
    eps = np.random.default_rng(0).standard_normal(n)
    x_t = schedule.q_sample(np.full(n, 0.5), 300, eps)
    # four standard errors of a mean and of a deviation
    error = schedule.noise[300] / np.sqrt(n)
    assert abs(x_t.mean() - 0.5 * schedule.signal[300]) < 4 * error
    assert abs(x_t.std() - schedule.noise[300]) < 4 * error / np.sqrt(2)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_q_sample_takes_one_t_a_sample_and_keeps_the_dtype(dtype: type) -> None:
    schedule = Schedule.linear()
    random = np.random.default_rng(1)
    x0, eps = random.standard_normal((2, 4, 3, 5, 5)).astype(dtype)
    t = np.array([0, 1, 500, 1000])
    x_t = schedule.q_sample(x0, t, eps)
    assert x_t.dtype == dtype
    assert np.array_equal(x_t[0], x0[0])
    for i in range(4):
        assert np.array_equal(
            x_t[i], schedule.q_sample(x0[i : i + 1], int(t[i]), eps[i : i + 1])[0]
        )


def test_the_posterior_is_bayes_rule(schedule: Schedule) -> None:
    """q(x_{t-1} | x_t, x_0) as the product of two Gaussians in x_{t-1}, by their precisions."""
    random = np.random.default_rng(2)
    x0, x_t = random.standard_normal((2, 6))
    for t in np.unique(np.linspace(2, schedule.T, 25).astype(int)):
        prior_variance = 1 - np.prod(1 - schedule.beta[1:t])
        prior_mean = np.sqrt(1 - prior_variance) * x0
        step = np.sqrt(1 - schedule.beta[t])  # x_t = step x_{t-1} + sqrt(beta) z
        precision = 1 / prior_variance + step**2 / schedule.beta[t]
        mean = (prior_mean / prior_variance + step * x_t / schedule.beta[t]) / precision
        # 1e-9: 1 - alpha_bar keeps 12 of 16 digits where beta is 1e-4; terms of up to 1e4 cancel
        np.testing.assert_allclose(schedule.posterior_mean(x0, x_t, t), mean, rtol=0, atol=1e-9)
        assert schedule.posterior_variance(t) == pytest.approx(1 / precision, rel=1e-9)


def test_the_posterior_at_1_is_the_data(schedule: Schedule) -> None:
    x0 = np.array([[0.3, -0.4]])
    assert schedule.posterior_variance(1) == 0
    # exactly beta_1 / (1 - alpha_bar_1) = 1 but for the rounding of 1 - (1 - beta_1)
    np.testing.assert_allclose(schedule.posterior_mean(x0, 9 * x0, 1), x0, rtol=1e-11)


def test_the_posterior_takes_one_t_a_sample() -> None:
    schedule = Schedule.linear()
    random = np.random.default_rng(3)
    x0, x_t = random.standard_normal((2, 3, 2, 4)).astype(np.float32)
    t = np.array([1, 40, 1000])
    mean = schedule.posterior_mean(x0, x_t, t)
    assert mean.dtype == np.float32
    for i in range(3):
        one = schedule.posterior_mean(x0[i : i + 1], x_t[i : i + 1], int(t[i]))
        assert np.array_equal(mean[i], one[0])
    variance = schedule.posterior_variance(t)
    assert variance.dtype == np.float64
    assert variance.tolist() == [float(schedule.posterior_variance(int(i))) for i in t]


def test_from_dict_gives_an_equal_schedule(schedule: Schedule) -> None:
    again = Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert again.to_dict() == schedule.to_dict()
    assert again.T == schedule.T
    assert np.array_equal(again.beta, schedule.beta)
    assert np.array_equal(again.alpha_bar, schedule.alpha_bar)
    assert repr(again) == repr(schedule)


def test_from_dict_keeps_what_is_not_default() -> None:
    schedule = Schedule.cosine(60, s=0.02, max_beta=0.9)
    assert schedule.to_dict() == {"rule": "cosine", "T": 60, "s": 0.02, "max_beta": 0.9}
    assert np.array_equal(Schedule.from_dict(schedule.to_dict()).beta, schedule.beta)
    assert not np.array_equal(Schedule.cosine(60).beta, schedule.beta)


def test_a_schedule_made_of_numpy_numbers_is_json_ready() -> None:
    schedule = Schedule.linear(np.int64(100), np.float32(1e-4), np.float32(0.2))
    again = Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert np.array_equal(again.beta, schedule.beta)


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ({}, "None"),
        ({"rule": "quadratic"}, "rule must be one of linear, geometric, cosine"),
        ({"rule": ["linear"]}, "linear"),
        ({"rule": "linear", "T": "100"}, "'100'"),
        ({"rule": "linear", "T": 100.0}, "100.0"),
        ({"rule": "linear", "gamma": 1}, "gamma"),
        ({"rule": "linear", "beta_T": "x"}, "x"),
        ({"rule": "betas"}, "betas"),
        ({"rule": "betas", "betas": [0.1, 2]}, "beta_2 = 2.0"),
        ({"rule": "betas", "betas": ["x"]}, "x"),
    ],
)
def test_from_dict_refuses(definition: dict, message: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.from_dict(definition)
    assert message in str(caught.value)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.5, np.nan, np.inf, -np.inf])
def test_a_beta_outside_0_to_1_is_refused_with_its_place(value: float) -> None:
    with pytest.raises(ScheduleError, match="strictly between 0 and 1") as caught:
        Schedule.from_betas([0.1, 0.9, value, 0.5])
    assert f"beta_3 = {value} (t = 3 of 4)" in str(caught.value)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # infinity in NumPy's linspace
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, np.nan, np.inf])
@pytest.mark.parametrize("rule", ["linear", "geometric", "sigmoid", "constant"])
def test_every_rule_refuses_a_bad_beta(rule: str, value: float) -> None:
    arguments = {"beta": value} if rule == "constant" else {"beta_T": value}
    if rule == "sigmoid":  # it reaches neither end: 1 is only nearly reached
        arguments["beta_1"] = value
    with pytest.raises(ScheduleError) as caught:
        RULES[rule](100, **arguments)
    # The value, or the first NaN that an infinite end makes of the betas between.
    assert str(value) in str(caught.value) or (np.isinf(value) and "nan" in str(caught.value))


@pytest.mark.parametrize("value", [1.0, 1.5, np.nan])
def test_cosine_refuses_a_cap_that_is_none(value: float) -> None:
    with pytest.raises(ScheduleError, match="strictly between 0 and 1"):
        Schedule.cosine(100, max_beta=value)


@pytest.mark.parametrize(
    ("betas", "shape"),
    [([], "(0,)"), (0.5, "()"), ([[0.5]], "(1, 1)"), (np.ones((2, 0)), "(2, 0)")],
)
def test_betas_of_a_wrong_shape_are_refused(betas: object, shape: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.from_betas(betas)
    assert shape in str(caught.value)


@pytest.mark.parametrize("betas", [["a"], [[0.1], [0.2, 0.3]], [0.1, 1j], [{}]])
def test_betas_that_are_no_numbers_are_refused(betas: list) -> None:
    with pytest.raises(ScheduleError):
        Schedule.from_betas(betas)


@pytest.mark.parametrize("T", [0, -1, True, 1.5, 100.0, "100", None, np.nan])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "betas"])
def test_a_bad_t_count_is_refused(rule: str, T: object) -> None:
    with pytest.raises(ScheduleError, match="T must be a whole number >= 1") as caught:
        RULES[rule](T)
    assert repr(T) in str(caught.value)


@pytest.mark.parametrize(
    "t", [-1, 1001, 10**12, 1.0, 0.5, np.float64(3), True, "1", None, [1, 1001], [0.5, 1], [-1, 3]]
)
def test_a_bad_timestep_is_refused(t: object) -> None:
    schedule, x = Schedule.linear(), np.zeros((2, 3))
    for call in (
        lambda: schedule.check_t(t),
        lambda: schedule.q_sample(x, t, x),
        lambda: schedule.posterior_mean(x, x, t),
        lambda: schedule.posterior_variance(t),
    ):
        with pytest.raises(ScheduleError, match=r"whole numbers in [01]\.\.1000") as caught:
            call()
        assert repr(t) in str(caught.value)


def test_the_posterior_has_no_timestep_0() -> None:
    schedule, x = Schedule.linear(), np.zeros((1, 3))
    assert schedule.check_t(0) == 0
    for call in (schedule.posterior_variance, lambda t: schedule.posterior_mean(x, x, t)):
        for t in (0, [0, 1]):
            with pytest.raises(ScheduleError, match=r"1\.\.1000; got"):
                call(t)


def test_schedule_errors_are_config_errors() -> None:
    assert issubclass(ScheduleError, ConfigError)
    assert issubclass(ScheduleError, ValueError)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule.linear(100, 1e-4, 0.02), r"sqrt\(alpha_bar_T\) = 0\.6.* > 0\.01"),
        (lambda: Schedule.geometric(), r"sqrt\(alpha_bar_T\) = 0\.151 > 0\.01"),
        (lambda: Schedule.from_betas([0.5]), r"sqrt\(alpha_bar_T\) = 0\.707 > 0\.01"),
        (lambda: Schedule.linear(1000, 1e-4, 0.2), r"alpha_bar_T = 2\.09e-47 < 1e-12"),
        (lambda: Schedule.geometric(1000, 1e-4, 0.2), r"alpha_bar_T = 8\.\d*e-13 < 1e-12"),
    ],
)
def test_a_schedule_that_is_probably_not_meant_warns(make: Callable, message: str) -> None:
    with pytest.warns(ScheduleWarning, match=message) as caught:
        make()
    assert len(caught) == 1
    assert caught[0].filename == __file__  # the line that asked for it, not one inside


def test_the_limits_of_the_warnings() -> None:
    """No warning inside the limits: the configuration turns one into an error."""
    for signal in (0.0099, 1.01e-6):
        Schedule.from_betas([1 - signal**2])
    for signal in (0.0101, 0.99e-6):
        with pytest.warns(ScheduleWarning):
            Schedule.from_betas([1 - signal**2])


@pytest.mark.parametrize("make", [
    lambda: Schedule.constant(1000, 0.3), lambda: Schedule.linear(1000, 1e-4, 0.4),
    lambda: Schedule.constant(1000, 0.9),  # 0 in float64
])  # fmt: skip
def test_a_signal_too_small_for_float32_is_refused(make: Callable[[], Schedule]) -> None:
    with pytest.raises(ScheduleError, match=r"too small for float32.*lower T = 1000 or the betas"):
        make()


@pytest.mark.filterwarnings("ignore::ddpm_edge.samplers.SamplerWarning")
@quiet
@pytest.mark.parametrize("clip", [None, 1.0, "99%"])
@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        *((s, {"steps": 15}) for s in SAMPLERS if s not in ("dpm", "ipndm")),
        ("dpm", {"steps": 15, "spacing": "karras"}),
        ("ipndm", {"steps": 15, "spacing": "logsnr"}),
        ("dpmpp", {"steps": 7, "sde": True, "spacing": "karras"}),
        ("unipc", {"steps": 20, "order": 3, "spacing": "logsnr"}),
        ("ddpm", {"variance": "beta"}),
        ("ddpm", {"variance": "beta-tilde"}),
        ("ddpm", {"steps": 37}),
        ("ddim", {"steps": 1000}),
        ("ddim", {"steps": 1000, "eta": 1.0}),
        ("ddim", {"steps": 10, "eta": 0.5}),
        ("ddim", {"steps": 2, "eta": 1.0}),
        ("ddim", {"steps": 1}),
    ],
)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_nothing_overflows_where_alpha_bar_underflows_float32(
    sampler: str, options: dict, clip: float | str | None, prediction: str
) -> None:
    schedule = Schedule.linear(1000, 1e-4, 0.2)  # alpha_bar_T = 2e-47, below float32's 1e-45
    assert np.float32(schedule.alpha_bar[-1]) == 0
    plan = samplers.make_plan(schedule, sampler, clip=clip, **options)
    draw = Draws(seed=0, first=0, shape=(2, 8))
    x = draw(Stream.START, 0).copy()
    rows = 0
    with np.errstate(all="raise", under="ignore"):  # a NaN or infinity on the way, too
        for state in run_plan(plan, x, lambda x, t: np.tanh(x), draw, prediction):
            assert np.isfinite(state.x).all()
            assert np.isfinite(state.x0()).all()
            rows += 1
    assert rows == len(plan)
    assert state.x.dtype == np.float32
    if clip is not None and sampler != "ipndm":  # the last row gives x0 itself, up to rounding
        assert np.abs(state.x).max() <= 1.0 + 1e-6


def test_rectified_flow_is_a_line() -> None:
    schedule = Schedule.rectified_flow(4)
    assert schedule.signal.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert schedule.noise.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert schedule.alpha_bar == pytest.approx([1.0, 0.9, 0.5, 0.1, 0.0])
    assert schedule.alpha_bar == pytest.approx(np.cumprod(schedule.alpha))
    x0, eps = np.ones((1, 2)), np.full((1, 2), 3.0)
    assert schedule.q_sample(x0, 1, eps) == pytest.approx(0.75 * x0 + 0.25 * eps)
    again = Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert np.array_equal(again.signal, schedule.signal)
    assert repr(schedule) == "Schedule.rectified-flow(T=4)"
    for bad in (0, 1.5, True, "4"):
        with pytest.raises(ScheduleError, match="T must be a whole number"):
            Schedule.rectified_flow(bad)  # type: ignore[arg-type]


def test_the_posterior_of_rectified_flow_is_bayes_rule() -> None:
    """x_t = f x_s + sqrt(v) z with f, v from the two marginals; precisions add up."""
    schedule = Schedule.rectified_flow(10)
    x0, x_t = np.random.default_rng(2).standard_normal((2, 6))
    for t in range(2, 10):
        s = t - 1
        f = schedule.signal[t] / schedule.signal[s]
        v = schedule.noise[t] ** 2 - f**2 * schedule.noise[s] ** 2
        precision = 1 / schedule.noise[s] ** 2 + f**2 / v
        mean = (schedule.signal[s] * x0 / schedule.noise[s] ** 2 + f * x_t / v) / precision
        np.testing.assert_allclose(schedule.posterior_mean(x0, x_t, t), mean, atol=1e-12)
        assert schedule.posterior_variance(t) == pytest.approx(1 / precision)
    assert schedule.posterior_variance(10) == pytest.approx(0.01 * 9 * 9)  # of x_9, all noise


@pytest.mark.parametrize(
    "whole", [Schedule.linear(), Schedule.cosine(50), Schedule.rectified_flow(8)]
)
def test_until_is_the_beginning(whole: Schedule) -> None:
    part = whole.until(5)
    assert part.T == 5
    for name in ("signal", "noise", "alpha_bar", "alpha", "beta"):
        assert (getattr(part, name) == getattr(whole, name)[:6]).all()
    again = Schedule.from_dict(part.to_dict())
    assert again.T == 5
    assert (again.signal == part.signal).all()
    assert "until=5" in repr(part)
    assert (part.until(2).signal == whole.until(2).signal).all()
    assert Schedule.from_dict(part.until(2).to_dict()).T == 2
    for t in (0, whole.T + 1, 2.5, True):
        with pytest.raises(ScheduleError, match="t must be a whole number"):
            whole.until(t)  # type: ignore[arg-type]
