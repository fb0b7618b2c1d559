"""Inversion against diffusers and the exact flow, and what lies between latents."""

from __future__ import annotations

import numpy as np
import pytest
from toy import SHAPE, gaussian, in_float64, start, toy

from ddpm_edge import samplers
from ddpm_edge.errors import ConfigError
from ddpm_edge.latents import slerp
from ddpm_edge.plan import PREDICTIONS, run_plan
from ddpm_edge.schedule import Schedule

SCHEDULE = Schedule.linear()


def test_diffusers_inverse_scheduler() -> None:
    """At its own timesteps, which begin at t = 1."""
    pytest.importorskip("diffusers")
    import torch
    from diffusers import DDIMInverseScheduler

    x, states, asked = torch.from_numpy(start()), [], []
    with in_float64(DDIMInverseScheduler):
        scheduler = DDIMInverseScheduler(1000, clip_sample=False, timestep_spacing="leading")
        scheduler.set_timesteps(20)
        for t in scheduler.timesteps:
            asked.append(int(t) + 1)
            x = scheduler.step(torch.from_numpy(toy(x.numpy(), asked[-1])), t, x).prev_sample
            states.append(x.numpy().copy())
    plan = samplers.inversion(SCHEDULE, spacing=asked[::-1])
    assert plan.t.tolist() == list(range(1, 1000, 50))
    got = np.stack([s.x.copy() for s in run_plan(plan, start(), toy, _no_draw)])
    assert np.abs(got - np.stack(states)).max() < 1e-9 * np.abs(got).max()


def _no_draw(*_: object) -> np.ndarray:
    raise AssertionError("inversion draws nothing")


def test_there_and_back_along_the_exact_flow() -> None:
    """Both ways are of order 1: the way there, and what is left of the data on return."""
    network, x = gaussian(SCHEDULE, 0.2, 0.25), start()
    errors = []
    for steps in (50, 100, 200):
        *_, there = run_plan(samplers.inversion(SCHEDULE, steps), x.copy(), network, _no_draw)
        *_, back = run_plan(samplers.ddim(SCHEDULE, steps), there.x.copy(), network, _no_draw)
        errors.append(np.abs(back.x - x).max())
    ratios = np.array(errors[:-1]) / errors[1:]
    assert (ratios > 1.8).all()
    assert errors[-1] < 0.05


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_inverts(prediction: str) -> None:
    """Gaussian data: all four are the exact flow in the limit, on the way down the same one."""
    eps_of, x = gaussian(SCHEDULE, 0.2, 0.25), start()

    def network(x: np.ndarray, t: int) -> np.ndarray:
        signal, noise = float(SCHEDULE.signal[t]), float(SCHEDULE.noise[t])
        eps = eps_of(x, t)
        x0 = (x - noise * eps) / signal
        answers = {"eps": eps, "x0": x0, "v": signal * eps - noise * x0, "velocity": eps - x0}
        return answers[prediction]

    errors = []
    for steps in (100, 200):
        plan = samplers.inversion(SCHEDULE, steps)
        *_, there = run_plan(plan, x.copy(), network, _no_draw, prediction)
        down = samplers.ddim(SCHEDULE, steps)
        *_, back = run_plan(down, there.x.copy(), network, _no_draw, prediction)
        errors.append(np.abs(back.x - x).max())
    assert errors[0] / errors[1] > 1.7
    assert errors[1] < 0.1


def test_rectified_flow_inverts_to_pure_noise() -> None:
    """A straight flow, exactly but for the first of 100 steps, for which no eps is known."""
    schedule = Schedule.rectified_flow(100)
    eps, data = np.random.default_rng(1).standard_normal(SHAPE), start()
    plan = samplers.inversion(schedule, 100)
    *_, last = run_plan(plan, data.copy(), lambda x, t: eps - data, _no_draw, "velocity")
    assert np.abs(last.x - eps).max() < 1.01e-4 * np.abs(eps - data).max()


# Latents


def test_slerp_is_a_great_circle() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 1, 8, 8))
    b *= np.linalg.norm(a) / np.linalg.norm(b)
    points = slerp(a, b, 7)
    assert points.shape == (7, 1, 8, 8)
    assert points.dtype == np.float32
    assert np.abs(points[[0, -1]] - [a, b]).max() < 1e-6  # float32
    flat = points.reshape(7, -1) / np.linalg.norm(a)
    assert np.abs(np.linalg.norm(flat, axis=1) - 1).max() < 1e-6
    angles = np.arccos((flat[1:] * flat[:-1]).sum(axis=1))
    assert np.ptp(angles) < 1e-4
    assert angles.sum() == pytest.approx(np.arccos(flat[0] @ flat[-1]), abs=1e-4)


def test_slerp_where_there_is_no_circle() -> None:
    a = np.ones((1, 2, 2), np.float32)
    assert (slerp(a, a, 3) == a).all()
    assert np.abs(slerp(a, -a, 3)[:, 0, 0, 0] - [1, 0, -1]).max() < 1e-6
    assert (slerp(0 * a, a, 2) == [0 * a, a]).all()


@pytest.mark.parametrize(
    ("shape", "n", "message"),
    [((3,), 2, r"one shape; got \(2,\) and \(3,\)"), ((2,), 1, "n must be a whole number >= 2")],
)
def test_slerp_refuses(shape: tuple[int, ...], n: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        slerp(np.ones(2), np.ones(shape), n)
