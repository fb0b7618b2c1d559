"""iPNDM against diffusers in float64, with diffusers' own spacing as a list."""

from __future__ import annotations

import numpy as np
import pytest
from toy import diffusers_states, draws, in_float64, run, start, toy

from ddpm_edge import samplers
from ddpm_edge.errors import ConfigError
from ddpm_edge.samplers.ipndm import ADAMS_BASHFORTH
from ddpm_edge.schedule import Schedule


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
def test_ipndm_is_diffusers(steps: int) -> None:
    """Their sine spacing in our timesteps, our noise levels as their `trained_betas`; 1e-9.

    Their scheduler takes v = signal eps - noise x0 and turns it into eps.
    """
    torch = pytest.importorskip("torch")
    kind = pytest.importorskip("diffusers").IPNDMScheduler
    schedule = Schedule.linear()
    with in_float64(kind):
        own = kind(1000)
        own.set_timesteps(steps)
        listed = np.rint(1000 * own.timesteps.numpy()).astype(int).clip(1).tolist()
        listed = sorted(set(listed), reverse=True)
        plan = samplers.ipndm(schedule, spacing=listed)
        noise = [*plan.noise.tolist(), 0.0]
        scheduler = kind(1000, trained_betas=noise)
        scheduler.set_timesteps(len(plan))
        signal = dict(zip(plan.t.tolist(), plan.signal.tolist(), strict=True))
        level = dict(zip(plan.t.tolist(), plan.noise.tolist(), strict=True))

        def v(x: np.ndarray, t: int) -> np.ndarray:
            return (toy(x, t) - level[t] * x) / signal[t]

        assert scheduler.timesteps.dtype == torch.float64
        expected = diffusers_states(scheduler, plan, draws(len(plan)), v)
    got = run(plan, start(), draws(len(plan)))
    assert np.abs(got - expected).max() < 1e-9 * max(1.0, np.abs(expected).max())


def test_weights_are_adams_and_bashforth() -> None:
    """The weights of order k integrate every polynomial of degree < k exactly over one step."""
    for weights in ADAMS_BASHFORTH:
        for degree in range(len(weights)):
            history = (-np.arange(len(weights), dtype=float)) ** degree
            assert weights @ history == pytest.approx(1 / (degree + 1))


def test_lower_orders() -> None:
    schedule, z = Schedule.linear(), draws(20)
    ddim = run(samplers.ddim(schedule, 20), start(), z)
    assert np.abs(run(samplers.ipndm(schedule, 20, order=1), start(), z) - ddim).max() < 1e-10
    two, four = samplers.ipndm(schedule, 20, order=2), samplers.ipndm(schedule, 20)
    assert (two.b.shape[1], four.b.shape[1]) == (2, 4)
    assert np.array_equal(two.b[1], four.b[1, :2])
    assert not np.array_equal(two.b[2], four.b[2, :2])


def test_clipping_gives_the_eps_of_the_clipped_x0() -> None:
    schedule, clip = Schedule.linear(), 0.3
    plan = samplers.ipndm(schedule, 12, order=2, clip=clip)

    def clipped(x: np.ndarray, t: int) -> np.ndarray:
        signal, noise = schedule.signal[t], schedule.noise[t]
        x0 = np.clip((x - noise * toy(x, t)) / signal, -clip, clip)
        return (x - signal * x0) / noise

    got = run(plan, start(), draws(12))
    expected = run(samplers.ipndm(schedule, 12, order=2), start(), draws(12), clipped)
    assert np.abs(got - expected).max() < 1e-12
    assert np.abs(got - run(samplers.ipndm(schedule, 12, order=2), start(), draws(12))).max() > 0.01


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match="order must be a whole number <= 4; got 5"):
        samplers.ipndm(Schedule.linear(), 5, 5)
    with pytest.raises(ConfigError, match=r"ipndm needs a signal of 0.001 .* at t = 100 it is 0;"):
        samplers.ipndm(Schedule.rectified_flow(100), 5)
