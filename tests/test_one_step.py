"""ddpm and ddim against diffusers, closed forms, and their own float32 rounding."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from toy import diffusers_states, draws, gaussian, in_float64, run, start, toy

from ddpm_edge import samplers
from ddpm_edge.plan import Plan, run_plan
from ddpm_edge.samplers import make_plan
from ddpm_edge.schedule import Schedule

pytestmark = pytest.mark.filterwarnings("ignore::ddpm_edge.samplers.SamplerWarning")


def theirs(
    name: str, schedule: Schedule, plan: Plan, z: np.ndarray, clip: bool = False, **options: object
) -> np.ndarray:
    """All states of diffusers' scheduler with float64 tables, our timesteps and our noise."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    kinds = {"ddpm": diffusers.DDPMScheduler, "ddim": diffusers.DDIMScheduler}
    config = {"variance_type": options.pop("variance_type")} if name == "ddpm" else {}
    scheduler = kinds[name](schedule.T, clip_sample=clip, **config)
    scheduler.betas = torch.from_numpy(schedule.beta[1:].copy())
    scheduler.alphas = 1.0 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.num_inference_steps = len(plan)
    scheduler.timesteps = torch.from_numpy(plan.t - 1)
    return diffusers_states(scheduler, plan, z, **options)


# diffusers as the oracle: float64 on both sides, so only rounding is left. 1e-9 is the promise; a
# wrong coefficient differs by 1e-4 or more.


@pytest.mark.parametrize("steps", [1000, 100, 20])
@pytest.mark.parametrize(
    ("variance", "type_"), [("beta", "fixed_large"), ("beta-tilde", "fixed_small")]
)
def test_ddpm_is_diffusers(steps: int, variance: str, type_: str) -> None:
    schedule = Schedule.linear()
    plan, z = samplers.ddpm(schedule, steps, variance), draws(steps)
    z[-1] = 0.0  # Algorithm 2 ends without noise; diffusers adds it in a respaced chain's last step
    expected = theirs("ddpm", schedule, plan, z, variance_type=type_)
    assert np.abs(run(plan, start(), z) - expected).max() < 1e-9


@pytest.mark.parametrize("steps", [1000, 100, 20])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_diffusers(steps: int, eta: float) -> None:
    schedule = Schedule.cosine() if steps == 100 else Schedule.linear()
    plan, z = samplers.ddim(schedule, steps, eta), draws(steps)
    got, expected = run(plan, start(), z), theirs("ddim", schedule, plan, z, eta=eta)
    # without clipping the cosine schedule's states grow to 1e4: relative to them
    assert np.abs(got - expected).max() < 1e-9 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "options", "plan_options"),
    [
        ("ddpm", {"variance_type": "fixed_small"}, {"variance": "beta-tilde"}),
        ("ddpm", {"variance_type": "fixed_large"}, {"variance": "beta"}),
        ("ddim", {"eta": 0.5, "use_clipped_model_output": True}, {"eta": 0.5}),
    ],
)
def test_clipping_is_diffusers(
    name: str, options: dict[str, object], plan_options: dict[str, object]
) -> None:
    schedule = Schedule.linear()
    plan = make_plan(schedule, name, steps=50, clip=1.0, **plan_options)
    z = draws(50)
    z[-1] = 0.0
    expected = theirs(name, schedule, plan, z, clip=True, **options)
    assert np.abs(run(plan, start(), z) - expected).max() < 1e-9
    unclipped = run(make_plan(schedule, name, steps=50, **plan_options), start(), z)
    assert np.abs(unclipped - expected).max() > 1e-2  # the clip was at work


@pytest.mark.parametrize("variance", ["beta", "beta-tilde"])
def test_ddpm_table_is_algorithm_2_as_printed(variance: str) -> None:
    schedule = Schedule.linear()
    plan = samplers.ddpm(schedule, variance=variance)
    for i in (0, 1, 500, 998, 999):
        t = 1000 - i
        beta, alpha, ab = schedule.beta[t], schedule.alpha[t], schedule.alpha_bar[t]
        assert plan.t[i] == t
        # The table is in x0 = (x - sqrt(1 - ab) eps) / sqrt(ab); here are its x and its eps.
        x, eps = plan.a[i] + plan.b[i, 0] / math.sqrt(ab), -plan.b[i, 0] * math.sqrt(1 / ab - 1)
        assert x == pytest.approx(1 / math.sqrt(alpha), rel=1e-11)
        assert eps == pytest.approx(-(1 - alpha) / math.sqrt(1 - ab) / math.sqrt(alpha), rel=1e-10)
        sigma2 = beta if variance == "beta" else schedule.posterior_variance(t)
        assert plan.s[i] == pytest.approx(math.sqrt(sigma2) if t > 1 else 0.0, rel=1e-10)


@pytest.mark.parametrize(
    "plan",
    [
        samplers.ddpm(Schedule.linear()),
        samplers.ddpm(Schedule.linear(), clip=1.0),
        samplers.ddim(Schedule.linear(), 100, eta=0.5, clip=1.0),
    ],
    ids=lambda plan: f"{plan.name} {plan.form}",
)
def test_the_float32_loop_differs_by_its_rounding(plan: Plan) -> None:
    z, x = draws(len(plan)), start().astype(np.float32)
    exact = run(plan, x.astype(np.float64), z.astype(np.float32).astype(np.float64))
    rounded = run(plan, x, z)
    assert rounded.dtype == np.float32
    # a few roundings of 6e-8 a step that add up as a random walk over 1000 steps: 2e-6 to 6e-6
    assert np.abs(rounded - exact).max() < 1e-5 * np.abs(exact).max()


@pytest.mark.filterwarnings("ignore::ddpm_edge.schedule.ScheduleWarning")
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_lecture_s_schedule_stays_finite_in_float32(sampler: str, clip: float | None) -> None:
    schedule = Schedule.linear(1000, 1e-4, 0.2)  # alpha_bar_T = 2e-47
    plan = make_plan(schedule, sampler, steps=1000, clip=clip)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        states = run(plan, start().astype(np.float32), draws(1000),
                     lambda x, t: x * np.float32(schedule.noise[t]))  # fmt: skip
    assert np.isfinite(states).all()


# Gaussian data: the exact network is linear, so mean and variance follow in closed form.


def moments(
    schedule: Schedule, steps: list[tuple[int, int]], mean: float, variance: float,
    rule: Callable[[float, float, float], tuple[float, float, float]],
) -> tuple[float, float]:  # fmt: skip
    """Mean and variance after a chain, by hand: x' = p x + q eps(x) + s z at each (t, s)."""
    m, v = 0.0, 1.0
    for t, s in steps:
        ab, ab_s = schedule.alpha_bar[t], schedule.alpha_bar[s]
        p, q, sigma = rule(ab, ab_s, s)
        slope = math.sqrt(1 - ab) / (ab * variance + 1 - ab)
        factor = p + q * slope
        m = factor * m - q * slope * math.sqrt(ab) * mean
        v = factor**2 * v + sigma**2
    return m, v


def algorithm_2(tilde: bool) -> Callable[[float, float, float], tuple[float, float, float]]:
    def rule(ab: float, ab_s: float, s: float) -> tuple[float, float, float]:
        alpha = ab / ab_s
        sigma2 = (1 - alpha) * ((1 - ab_s) / (1 - ab) if tilde else 1.0)
        q = -(1 - alpha) / math.sqrt(1 - ab) / math.sqrt(alpha)
        return 1 / math.sqrt(alpha), q, math.sqrt(sigma2) if s else 0.0

    return rule


def song_eq_12(eta: float) -> Callable[[float, float, float], tuple[float, float, float]]:
    def rule(ab: float, ab_s: float, s: float) -> tuple[float, float, float]:
        sigma = eta * math.sqrt((1 - ab_s) / (1 - ab)) * math.sqrt(1 - ab / ab_s)
        p = math.sqrt(ab_s / ab)
        return p, math.sqrt(1 - ab_s - sigma**2) - p * math.sqrt(1 - ab), sigma

    return rule


def chain(plan: Plan) -> list[tuple[int, int]]:
    return list(zip(plan.t.tolist(), [*plan.t.tolist()[1:], 0], strict=True))


@pytest.mark.parametrize("steps", [100, 25])
@pytest.mark.parametrize(
    ("name", "options", "rule"),
    [
        ("ddpm", {"variance": "beta"}, algorithm_2(tilde=False)),
        ("ddpm", {"variance": "beta-tilde"}, algorithm_2(tilde=True)),
        ("ddim", {"eta": 0.0}, song_eq_12(0.0)),
        ("ddim", {"eta": 0.7}, song_eq_12(0.7)),
    ],
)
def test_gaussian_data(
    name: str, options: dict[str, object], rule: Callable[..., tuple[float, float, float]],
    steps: int,
) -> None:  # fmt: skip
    schedule, mean, variance = Schedule.linear(100, 1e-4, 0.2), 0.3, 0.25
    plan = make_plan(schedule, name, steps=steps, **options)
    rng, n = np.random.default_rng(0), 200_000
    x = rng.standard_normal((n,))
    *_, last = run_plan(
        plan, x, gaussian(schedule, mean, variance), lambda stream, row: rng.standard_normal((n,))
    )
    m, v = moments(schedule, chain(plan), mean, variance, rule)
    assert abs(last.x.mean() - m) < 4 * math.sqrt(v / n)  # 4 standard errors
    assert abs(last.x.var() - v) < 4 * v * math.sqrt(2 / n)


@pytest.mark.parametrize(("T", "beta_T", "fraction"), [(100, 0.2, 0.876), (1000, 0.02, 0.985)])
def test_how_much_variance_beta_tilde_keeps(T: int, beta_T: float, fraction: float) -> None:
    schedule = Schedule.linear(T, 1e-4, beta_T)
    plan = samplers.ddpm(schedule, variance="beta-tilde")
    _, v = moments(schedule, chain(plan), 0.0, 0.25, algorithm_2(tilde=True))
    assert v / 0.25 == pytest.approx(fraction, abs=5e-4)  # three digits are published
    m = 0.0
    w = 1.0  # the same through the Plan's own coefficients
    for i, t in enumerate(plan.t.tolist()):
        eps = gaussian(schedule, 0.0, 0.25)(np.ones(1), t)[0]
        x0 = (1.0 - schedule.noise[t] * eps) / schedule.signal[t]
        factor = plan.a[i] + plan.b[i, 0] * x0
        m, w = factor * m, factor**2 * w + plan.s[i] ** 2
    assert w == pytest.approx(v, rel=1e-9)


def test_eta_1_is_algorithm_2_with_beta_tilde() -> None:
    schedule = Schedule.linear()
    for steps in (1000, 30):
        a, b = samplers.ddim(schedule, steps, eta=1.0), samplers.ddpm(schedule, steps, "beta-tilde")
        for column in ("t", "a", "b", "s"):
            assert np.abs(getattr(a, column) - getattr(b, column)).max() < 1e-11


# Euler and consistency


@pytest.mark.parametrize("steps", [1, 5, 10, 50])
def test_euler_is_diffusers_flow_matching(steps: int) -> None:
    """x + (sigma' - sigma) velocity, at our timesteps; float64 on both sides."""
    torch = pytest.importorskip("torch")
    kind = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler
    schedule = Schedule.rectified_flow(1000)
    plan = samplers.euler(schedule, steps)
    with in_float64(kind):
        scheduler = kind(1000)
        scheduler.set_timesteps(steps)
        scheduler.timesteps = torch.from_numpy(plan.t.astype(np.float64))
        scheduler.sigmas = torch.from_numpy(np.append(schedule.noise[plan.t], 0.0))
        expected = diffusers_states(scheduler, plan, draws(steps))
    got = run(plan, start(), draws(steps), prediction="velocity")
    assert np.abs(got - expected).max() < 1e-12


def test_euler_is_ddim() -> None:
    schedule, z = Schedule.linear(), draws(20)
    got = run(samplers.euler(schedule, 20, clip=1.0), start(), z)
    assert np.abs(got - run(samplers.ddim(schedule, 20, clip=1.0), start(), z)).max() < 1e-12


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_consistency_is_song_s_algorithm_1(steps: int) -> None:
    """As printed, for their x = x0 + sigma eps: ours divided by signal."""
    schedule, z = Schedule.linear(), draws(steps)
    plan = samplers.consistency(schedule, steps)

    def x0_of(x: np.ndarray, t: int) -> np.ndarray:
        return (x - schedule.noise[t] * toy(x, t)) / schedule.signal[t]

    x = x0_of(start(), int(plan.t[0]))
    expected = [x]
    for i, t in enumerate(plan.t[1:].tolist()):
        sigma = schedule.noise[t] / schedule.signal[t]
        x = x0_of(schedule.signal[t] * (x + sigma * z[i]), t)
        expected.append(x)
    states = run_plan(plan, start(), toy, lambda stream, row: z[row])
    got = [state.x0() for state in states]
    assert np.abs(np.stack(got) - np.stack(expected)).max() < 1e-11


# The warning


def test_few_steps_with_variance_beta_are_warned_of() -> None:
    for call in (samplers.ddpm, lambda *a: make_plan(a[0], "ddpm", steps=a[1])):
        with pytest.warns(samplers.SamplerWarning, match="in 50 of 1000 .* 'beta-tilde'") as caught:
            call(Schedule.linear(), 50)
        assert caught[0].filename == __file__


@pytest.mark.filterwarnings("error::ddpm_edge.samplers.SamplerWarning")
@pytest.mark.filterwarnings("ignore::ddpm_edge.schedule.ScheduleWarning")
def test_what_is_not_warned_of() -> None:
    samplers.ddpm(Schedule.linear(), 200)
    samplers.ddpm(Schedule.linear(), 50, "beta-tilde")
    samplers.ddpm(Schedule.linear(100, 1e-4, 0.2))  # all T of them
