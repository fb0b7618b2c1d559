"""Operators against dense matrices, DDNM and DDNM+ against the paper's algorithms, projections."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ddpm_edge import AveragePool, Generator, Grayscale, Mask, Matrix, Restore, samplers
from ddpm_edge.errors import ConfigError
from ddpm_edge.noise import Stream
from ddpm_edge.plan import run_plan
from ddpm_edge.restoration import EXACT, Measurement, Operator, ddnm_plus
from ddpm_edge.schedule import Schedule

RNG = np.random.default_rng(0)
SHAPE = (3, 4, 4)
SIZE = 48
HOLE = np.zeros((4, 4), bool)
HOLE[1:3, 2:] = True
DEFICIENT = RNG.standard_normal((10, 5)) @ RNG.standard_normal((5, SIZE))
OPERATORS: dict[str, Operator] = {
    "mask": Mask(HOLE),
    "pool": AveragePool(2),
    "gray": Grayscale(),
    "matrix": Matrix(RNG.standard_normal((7, SIZE)), (4, 4, 3)),
    "deficient": Matrix(DEFICIENT, (4, 4, 3)),
}
ROUNDING = 1e-5  # float32, sums of 48 values


def dense(operator: Operator) -> np.ndarray:
    """A as a matrix on states: its columns are what unit vectors become."""
    units = np.eye(SIZE, dtype=np.float32).reshape(SIZE, *SHAPE)
    return operator.forward(units).reshape(SIZE, -1).T.astype(np.float64)


def svd(operator: Operator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u, s, vt = np.linalg.svd(dense(operator), full_matrices=False)
    rank = int((s > 1e-5 * s[0]).sum())
    return u[:, :rank], s[:rank], vt[:rank]


def measured(operator: Operator, x: np.ndarray) -> np.ndarray:
    return operator.forward(x.astype(np.float32))


@pytest.mark.parametrize("name", OPERATORS)
def test_inverse_is_the_pseudo_inverse(name: str) -> None:
    operator = OPERATORS[name]
    y = RNG.standard_normal((2, *operator.measured_shape(SHAPE))).astype(np.float32)
    expected = y.reshape(2, -1) @ np.linalg.pinv(dense(operator), rcond=1e-5).T
    got = operator.inverse(y)
    assert got.shape == (2, *SHAPE)
    assert got.dtype == np.float32
    assert np.abs(got.reshape(2, -1) - expected).max() < ROUNDING * max(1, np.abs(expected).max())


@pytest.mark.parametrize("name", OPERATORS)
def test_singular_values_and_their_weights(name: str) -> None:
    operator = OPERATORS[name]
    u, s, vt = svd(operator)
    singular = np.broadcast_to(operator.singular, s.shape)
    assert np.abs(np.sort(singular) - np.sort(s)).max() < ROUNDING * s.max()
    weight = RNG.random(s.shape if np.ndim(operator.singular) else 1).astype(np.float32)
    y = RNG.standard_normal((2, *operator.measured_shape(SHAPE))).astype(np.float32)
    expected = ((y.reshape(2, -1) @ u) * (np.broadcast_to(weight, s.shape) / s)) @ vt
    got = operator.inverse(y, weight).reshape(2, -1)
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


def network(x: np.ndarray, t: int) -> np.ndarray:
    return np.tanh(0.9 * x + 0.2 * np.roll(x, 1, axis=-1) + t / 50)


@pytest.mark.parametrize("sigma_y", [0.0, 0.3])
@pytest.mark.parametrize("name", OPERATORS)
def test_ddnm_is_the_paper_s_algorithm(name: str, sigma_y: float) -> None:
    """Algorithm 1, and section 3.3 where y is noisy, in the basis V, with the same noise."""
    operator, schedule = OPERATORS[name], Schedule.linear(30, 1e-3, 0.6)
    u, s, vt = svd(operator)
    start, truth = RNG.standard_normal((2, 2, *SHAPE)).astype(np.float32)
    y = measured(operator, truth)
    z = RNG.standard_normal((30, 2, *SHAPE)).astype(np.float32)
    plan = samplers.ddpm(schedule, variance="beta-tilde")
    impose, draw = Measurement.of(operator, y, sigma_y).along(plan, lambda _, row: z[row])
    *_, last = run_plan(plan, start.copy(), network, draw, impose=impose)

    x, y_flat = start.reshape(2, -1).astype(np.float64), y.reshape(2, -1).astype(np.float64)
    for row, t in enumerate(range(30, 0, -1)):
        ab, ab_before = schedule.alpha_bar[t], schedule.alpha_bar[t - 1]
        beta = schedule.beta[t]
        eps = network(x.reshape(2, *SHAPE), t).reshape(2, -1)
        x0 = (x - np.sqrt(1 - ab) * eps) / np.sqrt(ab)
        a = np.sqrt(ab_before) * beta / (1 - ab)
        sigma = np.sqrt((1 - ab_before) / (1 - ab) * beta)
        lam, gamma = np.ones_like(s), np.full_like(s, sigma**2)
        if sigma_y:
            carried = a * sigma_y / s
            lam = np.where(sigma >= carried, 1.0, sigma / carried)
            gamma = np.maximum(sigma**2 - (lam * carried) ** 2, 0.0)
        x0 += ((y_flat @ u / s - x0 @ vt.T) * lam) @ vt  # V lambda (S^-1 U^T y - V^T x0)
        noise = sigma * z[row].reshape(2, -1)
        noise += ((noise @ vt.T) * (np.sqrt(gamma) / max(sigma, 1e-12) - 1)) @ vt
        mean = a * x0 + np.sqrt(1 - beta) * (1 - ab_before) / (1 - ab) * x
        x = mean + (noise if t > 1 else 0.0)
    error = np.abs(last.x.reshape(2, -1) - x).max()
    assert error < 1e-3 * np.abs(x).max()  # float32 over 30 steps; A^+ of 7 x 48 amplifies little
    assert sigma_y or np.abs(operator.forward(last.x) - y).max() < 1e-3 * np.abs(y).max()


def test_the_noise_of_ddnm_plus_adds_up_to_the_row_s_own() -> None:
    plan = samplers.dpmpp(Schedule.linear(), 20, 2, True, "logsnr")
    singular, sigma_y = np.array([0.25, 1.0, 3.0]), 0.2
    weight, kept = ddnm_plus(plan, singular, sigma_y)
    a, s = plan.b.sum(axis=1)[:, None], plan.s[:, None]
    total = (a * weight * sigma_y / singular) ** 2 + (s * kept) ** 2
    assert np.abs(total[:-1] - s[:-1] ** 2).max() < 1e-6  # float32
    assert (weight[-1] == 0).all()  # the last row draws nothing
    assert ((weight == 1) | (kept < 1e-3))[:-1].all()  # believed whole, or as far as there is room


def test_tempered_draws_have_their_variance_and_touch_only_v() -> None:
    """20,000 draws through `along`: sqrt(gamma) / sigma along V, untouched beside it."""
    plan = samplers.ddpm(Schedule.linear(), 20, "beta-tilde")
    A = RNG.standard_normal((3, SIZE)) * [[0.2], [1.0], [5.0]]
    operator = Matrix(A, (4, 4, 3))
    _, kept = ddnm_plus(plan, operator.singular, 0.3)
    z = RNG.standard_normal((20_000, *SHAPE)).astype(np.float32)
    y = np.zeros((1, 3), np.float32)
    _, draw = Measurement.of(operator, y, 0.3).along(plan, lambda stream, row: z)
    row = 5
    got = draw(Stream.STEP, row).transpose(0, 2, 3, 1).reshape(len(z), -1)
    along = got @ operator.vt.T
    # 4 standard errors of a standard deviation
    assert along.std(axis=0) == pytest.approx(kept[row], abs=4 / np.sqrt(2 * len(z)))
    plain = z.transpose(0, 2, 3, 1).reshape(len(z), -1)
    beside = (got - along @ operator.vt) - (plain - plain @ operator.vt.T @ operator.vt)
    assert np.abs(beside).max() < 1e-5  # float32, sums of 48


@pytest.mark.parametrize("sampler", ["dpm", "ipndm"])
def test_on_eps_the_answer_belongs_to_the_imposed_x0(sampler: str) -> None:
    plan = samplers.make_plan(Schedule.linear(), sampler, steps=5)
    truth = RNG.uniform(-1, 1, (2, *SHAPE)).astype(np.float32)
    measurement = Measurement.of(Mask(HOLE), truth, 0.0)
    impose, draw = measurement.along(plan, lambda *_: None)
    for state in run_plan(plan, truth[::-1].copy(), network, draw, impose=impose):
        # float32, beside an x0 that is up to 200 before it is imposed upon
        assert np.abs(state.x0() - truth)[..., ~HOLE].max() < 1e-4
        i = state.index
        x = plan.signal[i] * state.x0() + plan.noise[i] * state.m
        assert np.abs(x - state.x_before).max() < 1e-6 * np.abs(x).max()  # float32


# The end of a run


LARGE = (4, 3, 28, 28)


def hard(kind: str) -> np.ndarray:
    draw = np.random.default_rng(0)
    if kind == "signs":
        return np.sign(draw.standard_normal(LARGE)).astype(np.float32)
    if kind == "a few below 1":
        few = draw.random(LARGE) < 0.03
        return np.where(few, draw.uniform(-1, 1, LARGE), 1.0).astype(np.float32)
    return np.full(LARGE, float(kind), np.float32)


@pytest.mark.parametrize("start", ["noise", "all -1", "all 1", "huge"])
@pytest.mark.parametrize("kind", ["signs", "a few below 1", "-1", "-0.9999", "0.98", "0.999", "1"])
@pytest.mark.parametrize(
    "operator",
    [AveragePool(2), AveragePool(4), AveragePool(7), Grayscale(), Grayscale((1, 0, 0)),
     Grayscale((0.99, 0.01, 0.0)), Grayscale((0.998, 0.001, 0.001)), Mask(np.eye(28))],
    ids=["pool 2", "pool 4", "pool 7", "gray", "red", "red and green", "nearly red", "mask"],
)  # fmt: skip
def test_finish_meets_hard_y(operator: Operator, kind: str, start: str) -> None:
    y = operator.forward(hard(kind))
    x = {"noise": 3 * RNG.standard_normal(LARGE), "all -1": -np.ones(LARGE),
         "all 1": np.ones(LARGE), "huge": 1e30 * RNG.standard_normal(LARGE)}[start]  # fmt: skip
    done = Measurement.of(operator, y, 0.0).finish(x.astype(np.float32))
    assert np.abs(done).max() <= 1.0
    assert np.abs(operator.forward(done) - y).max() <= EXACT


def test_finish_leaves_alone_what_fits() -> None:
    x = RNG.uniform(-1, 1, (2, *SHAPE)).astype(np.float32)
    for operator in OPERATORS.values():
        assert (Measurement.of(operator, operator.forward(x), 0.0).finish(x) == x).all()
    noisy = Measurement.of(Mask(HOLE), np.zeros_like(x), 0.1)
    assert (noisy.finish(2 * x) == np.clip(2 * x, -1, 1)).all()


def test_a_y_that_no_image_has_comes_to_an_end() -> None:
    x = RNG.uniform(-1, 1, (2, *SHAPE)).astype(np.float32)
    for name in ("matrix", "deficient"):
        operator = OPERATORS[name]
        y = np.full((2, len(operator.matrix)), 1e3, np.float32)  # type: ignore[attr-defined]
        done = Measurement.of(operator, y, 0.0).finish(x)
        assert np.isfinite(done).all()
        assert np.abs(done).max() <= 1.0


def test_each_sample_ends_by_itself() -> None:
    x = RNG.uniform(-1.5, 1.5, (6, *SHAPE)).astype(np.float32)
    y = RNG.choice([-1.0, -0.97, 0.2, 0.99], (6, 3, 2, 2)).astype(np.float32)
    together = Measurement.of(AveragePool(2), y, 0.0)
    alone = [together.part(slice(i, i + 1)).finish(x[i : i + 1]) for i in range(6)]
    assert (together.finish(x) == np.concatenate(alone)).all()


@pytest.mark.parametrize("width", [1.0, 1.5, 2.0])
def test_a_blur_is_undone_as_far_as_float32_carries_it(toy: Generator, width: float) -> None:
    i = np.arange(28)
    kernel = np.exp(-((i[:, None] - i) ** 2) / (2 * width**2))
    kernel /= kernel.sum(axis=1, keepdims=True)
    A = np.kron(kernel, kernel)
    y = np.sin(np.arange(784) / 40) @ A.T
    restored = toy.restore(y, Matrix(A, ONE), dtype="float32", steps=3, seed=0)
    assert np.abs(A @ restored.reshape(-1) - y).max() < 1 / 127.5  # one grey level


# What does not fit


ONE = (28, 28, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AveragePool(1), "factor must be a whole number >= 2; got 1"),
        (lambda: AveragePool(2.0), "got 2.0"),  # type: ignore[arg-type]
        (lambda: Grayscale((0.5, 0.5, 0.5)), r"sum to 1; got \(0.5, 0.5, 0.5\)"),
        (lambda: Grayscale((0.5, 0.5)), "three numbers"),  # type: ignore[arg-type]
        (lambda: Grayscale((1.5, -0.5, 0.0)), ">= 0 that sum to 1"),
        (lambda: Matrix(np.zeros((2, 784)), ONE), "must hold finite numbers, the largest in 1e-09"),
        (lambda: Matrix(np.full((2, 784), np.nan), ONE), "finite numbers"),
        (lambda: Matrix(np.full((2, 784), 1e300), ONE), "the largest in 1e-09 to 1e.09; scale it"),
        (lambda: Matrix(np.ones((2, 784)), 784), "got .* and 784"),  # type: ignore[arg-type]
        (
            lambda: Matrix(np.ones((2, 784)), (28.0, 28.0, 1.0)),
            "a size of image_shape must be a wh",
        ),
        (lambda: Matrix(np.ones((2, 784)), (-28, -28, 1)), "a size of image_shape must be a whole"),
        (lambda: Grayscale(0.5), "must be three numbers"),  # type: ignore[arg-type]
        (lambda: Matrix(np.full((2, 784), "a"), ONE), "must be an array of numbers"),
        (lambda: Matrix(np.ones((2, 783)), ONE), r"got \(2, 783\) and \(28, 28, 1\)"),
        (lambda: Matrix(np.ones(784), ONE), r"must be \(K, H W C\)"),
        (lambda: Matrix(np.ones((2, 784)), (28, 28)), r"got .* and \(28, 28\)"),  # type: ignore[arg-type]
        (lambda: Matrix(np.ones((2, 784)), (1, 28, 28)).measured_shape((1, 28, 28)), "the model m"),
    ],
)
def test_operators_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.zeros(3), r"y must be \(2,\), or \(n, 2\) for several; got \(3,\)"),
        (np.zeros((2, 2, 2)), r"got \(2, 2, 2\)"),
        (np.array([1.0, np.inf]), "y must hold numbers that float32 holds"),
        (np.array([1.0, 1e300]), "y must hold numbers that float32 holds"),
        (np.array(["a", "b"]), "y must be an array of numbers"),
    ],
)
def test_vectors_that_cannot_be(toy: Generator, y: np.ndarray, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        toy.restore(y, Matrix(np.ones((2, 784)), ONE))


@pytest.mark.parametrize("sigma_y", [-0.1, float("nan"), float("inf"), "a"])
def test_sigma_y_that_cannot_be(toy: Generator, sigma_y: Any) -> None:
    with pytest.raises(ConfigError, match="sigma_y must be a number"):
        toy.run(task=Restore(np.zeros((28, 28), np.uint8), Mask(np.eye(28)), sigma_y))
