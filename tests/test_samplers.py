"""What holds for every sampler: names, predictions, clipping, rounding, and where samples end."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from toy import draws, run, start, toy

from ddpm_edge.errors import ConfigError
from ddpm_edge.noise import Stream
from ddpm_edge.plan import run_plan
from ddpm_edge.samplers import DEFAULT_PLAN, SAMPLERS, default_plan, make_plan, override
from ddpm_edge.schedule import Schedule

pytestmark = pytest.mark.filterwarnings("ignore::ddpm_edge.samplers.SamplerWarning")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_a_clip_that_is_never_reached_changes_nothing(sampler: str, steps: int) -> None:
    """A network that sees only noise predicts x0 near 0."""
    schedule = Schedule.linear()

    def ask(x: np.ndarray, t: int) -> np.ndarray:
        return x * float(schedule.noise[t])

    plain = make_plan(schedule, sampler, steps=steps)
    z = draws(len(plain))
    expected = run(plain, 0.01 * start(), 0.01 * z, ask)
    for clip in (1.0, "100%"):
        clipped = make_plan(schedule, sampler, steps=steps, clip=clip)
        got = run(clipped, 0.01 * start(), 0.01 * z, ask)
        assert np.abs(got - expected).max() < 1e-9 * np.abs(expected).max()


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", ["x0", "v", "velocity"])
def test_predictions_are_converted(prediction: str, sampler: str, clip: float | None) -> None:
    schedule = Schedule.linear()

    def answer(x: np.ndarray, t: int) -> np.ndarray:
        signal, noise, eps = schedule.signal[t], schedule.noise[t], toy(x, t)
        x0 = (x - noise * eps) / signal
        return {"x0": x0, "v": signal * eps - noise * x0, "velocity": eps - x0}[prediction]

    plan = make_plan(schedule, sampler, steps=50, clip=clip)
    z = draws(len(plan))
    a, b = run(plan, start(), z), run(plan, start(), z, answer, prediction)
    assert np.abs(a - b).max() < 1e-9 * np.abs(a).max()


@pytest.mark.parametrize("clip", [None, 1.0, "99%"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_float32_loop_differs_by_its_rounding(sampler: str, clip: float | str | None) -> None:
    plan = make_plan(Schedule.linear(), sampler, steps=20, clip=clip)
    z, x = draws(len(plan)), start().astype(np.float32)
    exact = run(plan, x.astype(np.float64), z.astype(np.float32).astype(np.float64))
    rounded = run(plan, x, z)
    assert rounded.dtype == np.float32
    # roundings of 6e-8 a step, times up to 160 where x0 is divided by signal_T = 0.006
    assert np.abs(rounded - exact).max() < 3e-5 * np.abs(exact).max()


# The default plan, and what becomes of it when something is given anew.


@pytest.mark.filterwarnings("ignore::ddpm_edge.schedule.ScheduleWarning")
def test_the_default_plan_runs_on_every_schedule() -> None:
    for schedule in (
        Schedule.linear(), Schedule.cosine(4), Schedule.constant(1), Schedule.rectified_flow(9),
        Schedule.linear(1000, 1e-4, 0.2), Schedule.rectified_flow(1),
    ):  # fmt: skip
        plan = make_plan(schedule, **default_plan(schedule))
        assert len(plan) == min(DEFAULT_PLAN["steps"], schedule.T)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"sampler": "dpmpp", "order": 3, "steps": 9, "spacing": "karras", "clip": 1.0}),
        ({"steps": 5},
         {"sampler": "dpmpp", "order": 3, "steps": 5, "spacing": "karras", "clip": 1.0}),
        ({"sampler": "dpmpp", "clip": None}, {"sampler": "dpmpp", "clip": None}),
        ({"sampler": "ddpm"}, {"sampler": "ddpm", "clip": 1.0}),
        ({"spacing": [9, 2]}, {"sampler": "dpmpp", "order": 3, "spacing": [9, 2], "clip": 1.0}),
        ({"spacing": [9, 2], "steps": 2},
         {"sampler": "dpmpp", "order": 3, "spacing": [9, 2], "steps": 2, "clip": 1.0}),
    ],
)  # fmt: skip
def test_override(given: dict, expected: dict) -> None:
    default = {"sampler": "dpmpp", "order": 3, "steps": 9, "spacing": "karras", "clip": 1.0}
    assert override(default, given) == expected


def test_override_of_a_list() -> None:
    default = {"sampler": "ddim", "spacing": [1000, 10]}
    assert override(default, {"steps": 5}) == {"sampler": "ddim", "steps": 5}
    assert override({**default, "steps": 2}, {"spacing": "karras"}) == {
        "sampler": "ddim", "spacing": "karras"
    }  # fmt: skip
    assert override(default, {"eta": 1.0}) == {"sampler": "ddim", "spacing": [1000, 10], "eta": 1.0}


# A mixture of eight Gaussians on a circle, with the exact network.

MODES = np.stack([np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], axis=1)
WIDTH = 0.1
STEPS = {"ddpm": 1000}


def mixture_eps(schedule: Schedule, x: np.ndarray, t: int) -> np.ndarray:
    """E[eps | x_t], x (n, 2): the posterior over the modes, and each mode's linear answer."""
    signal, noise = float(schedule.signal[t]), float(schedule.noise[t])
    total = signal**2 * WIDTH**2 + noise**2
    away = x[:, None, :] - signal * MODES  # (n, 8, 2)
    log_weight = -(away**2).sum(axis=2) / (2 * total)
    weight = np.exp(log_weight - log_weight.max(axis=1, keepdims=True))
    weight /= weight.sum(axis=1, keepdims=True)
    eps: np.ndarray = noise / total * (weight[:, :, None] * away).sum(axis=1)
    return eps


@pytest.mark.parametrize("schedule", [Schedule.linear(), Schedule.rectified_flow(1000)], ids=repr)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_mode_gets_its_share(sampler: str, schedule: Schedule) -> None:
    n, rng = 4000, np.random.default_rng(0)
    options: dict[str, Any] = {"steps": STEPS.get(sampler, 100)}
    if not schedule.signal[-1] and sampler in ("dpm", "ipndm"):
        options["spacing"] = "karras"  # begins where there is some signal
    plan = make_plan(schedule, sampler, **options)

    def velocity(x: np.ndarray, t: int) -> np.ndarray:
        eps = mixture_eps(schedule, x, t)
        signal, noise = float(schedule.signal[t]), float(schedule.noise[t])
        if signal:
            return eps - (x - noise * eps) / signal
        return eps - MODES.mean(axis=0)  # all that x_T tells of x0 is its mean

    def draw(stream: Stream, row: int) -> np.ndarray:
        return rng.standard_normal((n, 2))

    *_, last = run_plan(plan, rng.standard_normal((n, 2)), velocity, draw, "velocity")
    distance = np.linalg.norm(last.x[:, None] - MODES, axis=2)
    nearest = distance.argmin(axis=1)
    share = np.bincount(nearest, minlength=8) / n
    assert np.abs(share - 1 / 8).max() < 4 * math.sqrt(1 / 8 * 7 / 8 / n)  # standard errors
    spread = (last.x - MODES[nearest]).std()
    # the width of a mode; consistency ends with E[x0 | x_t], which is narrower
    assert spread == pytest.approx(WIDTH, rel=0.15) or sampler == "consistency"
    assert distance.min(axis=1).max() < 6 * WIDTH


@pytest.mark.filterwarnings("ignore::ddpm_edge.schedule.ScheduleWarning")
@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        ("eular", {}, "sampler must be one of ddpm, .* got 'eular'; did you mean 'euler'"),
        ("dpmpp_2m", {}, "got 'dpmpp_2m'; did you mean 'dpmpp'"),
        ("xyz", {}, "sampler must be one of ddpm, ddim, dpmpp, dpm, unipc, .*; got 'xyz'$"),
        ("", {}, "got ''"),
        (None, {}, "got None"),
        (["ddim"], {}, "got .'ddim'."),
        (np.array(["ddim", "ddpm"]), {}, "sampler must be one of"),
        ("x" * 1_000_000, {}, r"got 'x{76}\.\.\.$"),
        ("ddpm", {"variance": np.array(["beta", "x"])}, "variance must be one of"),
        ("ddpm", {"eta": 0.5}, "of sampler 'ddpm' .*; got 'eta'; that is an option of ddim"),
        ("ddim", {"stpes": 1}, "got 'stpes'; did you mean 'steps'"),
        ("ddim", {"schedule": 1}, "got 'schedule'"),
        ("ddim", {"steps": 0}, "steps must be a whole number >= 1; got 0"),
        ("ddpm", {"steps": 11}, "steps must be in 1..10, .* got 11"),
        ("ddim", {"eta": 1.1, "steps": 5}, r"eta must be in 0..1; got 1.1"),
        ("ddim", {"eta": math.nan, "steps": 5}, "got nan"),
        ("ddim", {"eta": "1", "steps": 5}, "eta must be a number; got '1'"),
        ("ddpm", {"variance": "learned"}, "must be one of beta, beta-tilde; got 'learned'"),
        ("ddpm", {"variance": "beta-tild"}, "did you mean 'beta-tilde'"),
        ("ddpm", {"clip": 0.0}, "clip must be a number above 0, a percentile .* got 0.0"),
        ("ddpm", {"clip": "99.5"}, "a percentile such as '99.5%', or None .*; got '99.5'"),
    ],
)  # fmt: skip
def test_bad_options(sampler: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(Schedule.linear(10), sampler, **options)
