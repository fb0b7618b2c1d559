"""Distances between sets of images against closed forms, definitions and SciPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ddpm_edge.errors import ConfigError
from ddpm_edge.metrics import (
    T_95,
    Moments,
    class_kl,
    covered,
    difference,
    frechet_distance,
    jackknife,
    kernel_distance,
    kernel_estimate,
    mean_kernel,
    nearest,
)


def moments(seed: int, dimensions: int = 5) -> Moments:
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((dimensions, dimensions))
    return Moments(rng.standard_normal(dimensions), factor @ factor.T)


def test_one_dimension() -> None:
    a = Moments(np.array([1.0]), np.array([[4.0]]))
    b = Moments(np.array([3.0]), np.array([[9.0]]))
    assert frechet_distance(a, b) == pytest.approx((3 - 1) ** 2 + (3 - 2) ** 2)


def test_it_is_a_squared_distance() -> None:
    a, b = moments(0), moments(1)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)  # roots of rounding: 1e-7
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    assert frechet_distance(a, b) > 1


def test_it_is_scipys() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    for seed in range(5):
        a, b = moments(seed), moments(seed + 100)
        root = linalg.sqrtm(a.covariance @ b.covariance).real
        expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
        assert frechet_distance(a, b) == pytest.approx(expected)


def test_moments_are_of_the_features() -> None:
    features = np.random.default_rng(0).standard_normal((200, 3)).astype(np.float32)
    found = Moments.of(features)
    assert found.mean == pytest.approx(features.mean(axis=0), abs=1e-6)
    assert found.covariance == pytest.approx(np.cov(features.T), abs=1e-6)
    assert found.covariance.dtype == np.float64


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((3, 3)), r"N > D, .* got \(3, 3\): give more images"),
        (np.zeros(3), r"got \(3,\)"),
        (np.full((9, 3), np.nan), "NaN or infinity"),
    ],
)
def test_bad_features(features: np.ndarray, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Moments.of(features)


# Other distances


def clouds(seed: int = 0, n: int = 300, m: int = 250, d: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)), 0.3 + 1.2 * rng.standard_normal((m, d))


def test_kernel_distance_by_all_pairs() -> None:
    a, b = clouds()

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:  # scikit-learn's polynomial_kernel
        return (np.array([[np.dot(p, q) for q in y] for p in x]) / 6 + 1) ** 3

    n, m = len(a), len(b)
    xx, yy, xy = kernel(a, a), kernel(b, b), kernel(a, b)
    np.fill_diagonal(xx, 0)
    np.fill_diagonal(yy, 0)
    expected = xx.sum() / (n * (n - 1)) + yy.sum() / (m * (m - 1)) - 2 * xy.mean()
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)
    fast, plain = kernel_estimate(a, b), jackknife(lambda x: kernel_distance(x, b), a)
    assert fast.value == pytest.approx(plain.value)
    np.testing.assert_allclose(fast.replicates, plain.replicates, rtol=1e-9)
    few, plain = kernel_estimate(a[:10], b), jackknife(lambda x: kernel_distance(x, b), a[:10])
    np.testing.assert_allclose(few.replicates, plain.replicates, rtol=1e-9)
    assert kernel_estimate(a, b, mean_kernel(b)).value == pytest.approx(fast.value)


def test_kernel_distance_is_unbiased() -> None:
    # For N(0, I) and N(s, I), E k = E (x.y/D + 1)^3 in closed form: with u = x.y / D of mean c and
    # E u^2, E u^3 from x.y | x ~ N(x.s_y, |x|^2).
    d, s = 4, 0.5
    shift = np.full(d, s)

    def expected(mx: np.ndarray, my: np.ndarray) -> float:
        rng = np.random.default_rng(5)  # E over x only, by many draws; y is integrated exactly
        x = rng.standard_normal((400_000, d)) + mx
        mean, variance = x @ my / d, (x**2).sum(axis=1) / d**2
        one = 1 + mean
        return float((one**3 + 3 * one * variance).mean())

    zero = np.zeros(d)
    wanted = expected(zero, zero) + expected(shift, shift) - 2 * expected(zero, shift)
    rng = np.random.default_rng(1)
    found = [
        kernel_distance(rng.standard_normal((20, d)), rng.standard_normal((25, d)) + s)
        for _ in range(2000)
    ]
    assert abs(np.mean(found) - wanted) < 4 * np.std(found) / np.sqrt(2000) + 0.01


def test_precision_and_recall_by_their_definition() -> None:
    for seed in range(3):
        real, made = clouds(seed, 60, 50)

        def inside(point: np.ndarray, balls: np.ndarray) -> bool:  # Kynkaanniemi et al., Eq 1
            for centre in balls:
                reach = sorted(np.linalg.norm(balls - centre, axis=1))[3]  # [0] is itself
                if np.linalg.norm(point - centre) <= reach:
                    return True
            return False

        assert covered(real, made).tolist() == [inside(p, real) for p in made]
        assert covered(made, real).tolist() == [inside(p, made) for p in real]


def test_precision_and_recall_of_parts() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.normal(-9, 1, (200, 3)), rng.normal(9, 1, (200, 3))
    both = np.concatenate([left, right])
    assert covered(both, left + 1e-3).mean() > 0.95
    assert covered(left + 1e-3, both).mean() == pytest.approx(0.5, abs=0.05)
    assert not covered(left, right).any()


def test_nearest() -> None:
    distance = pytest.importorskip("scipy.spatial.distance")
    a, b = clouds(n=2500)  # several blocks
    a[7] = b[3]
    found, index = nearest(a, b)
    theirs = distance.cdist(a, b)
    np.testing.assert_allclose(found, theirs.min(axis=1), atol=1e-6)
    assert (index == theirs.argmin(axis=1)).all()
    assert index[7] == 3


def test_class_kl() -> None:
    stats = pytest.importorskip("scipy.stats")
    made, real = np.array([5, 0, 3, 9]), np.array([4, 2, 4, 10])
    assert class_kl(made, real) == pytest.approx(stats.entropy(made + 0.5, real + 0.5))
    assert class_kl(real, real) == 0
    assert np.isfinite(class_kl(real, made))


# How sure


def test_the_error_of_a_mean() -> None:
    x = np.random.default_rng(0).standard_normal(5000)
    found = jackknife(np.mean, x)
    assert found.value == pytest.approx(x.mean())
    # Of ten blocks, itself known to about 1 / sqrt(2 x 9) = 24 %
    assert found.standard_error == pytest.approx(1 / np.sqrt(5000), rel=0.6)


def test_the_error_is_right_on_average() -> None:
    rng = np.random.default_rng(0)
    errors, inside = [], 0
    for _ in range(400):
        found = jackknife(lambda x: float(np.exp(x.mean())), rng.normal(0.2, 1.0, 200))
        errors.append(found.standard_error)
        inside += abs(found.value - np.exp(0.2)) <= T_95 * found.standard_error
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.exp(0.2) / 200**0.5, rel=0.06)
    assert 0.92 < inside / 400 < 0.98  # 95 %, itself to within 1.1 %


def test_the_same_noise_shows_small_differences() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(1000)
    y = x + 0.01 + 0.001 * rng.standard_normal(1000)
    a, b = jackknife(np.mean, x), jackknife(np.mean, y)
    assert b.standard_error > 0.02
    apart = difference(a, b, paired=True)
    assert apart.significant
    assert apart.value == pytest.approx(0.01, abs=1e-3)
    alone = difference(a, b, paired=False)
    assert not alone.significant
    assert alone.standard_error == pytest.approx(np.hypot(a.standard_error, b.standard_error))
    other = jackknife(np.mean, rng.standard_normal(1000))
    assert not difference(a, other, paired=False).significant


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernel_distance(np.zeros((1, 3)), np.zeros((5, 3))), "M >= 2"),
        (lambda: covered(np.zeros((3, 3)), np.zeros((5, 3))), "N >= 4"),
        (lambda: covered(np.zeros((9, 3)), np.zeros((9, 3)), k=0), "k must be"),
        (lambda: nearest(np.zeros((1, 3)), np.zeros((5, 4))), r"got \(1, 3\) and \(5, 4\)"),
        (lambda: nearest(np.full((1, 3), np.nan), np.zeros((5, 3))), "NaN"),
        (lambda: jackknife(np.mean, np.zeros(9)), "needs 10 images or more; got 9"),
    ],
)
def test_bad_sets(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_precision_and_recall_are_prdcs() -> None:
    prdc = pytest.importorskip("prdc")
    for seed in range(3):
        x, y = clouds(seed, 120, 120)
        theirs = prdc.compute_prdc(real_features=x, fake_features=y, nearest_k=3)
        assert covered(x, y).mean() == pytest.approx(theirs["precision"], abs=1e-12)
        assert covered(y, x).mean() == pytest.approx(theirs["recall"], abs=1e-12)


def test_the_kernel_is_scikit_learns() -> None:
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    x, y = clouds(1)

    def mean(a: np.ndarray, b: np.ndarray) -> float:  # its defaults are KID's: (x.y / d + 1)^3
        k = pairwise.polynomial_kernel(a, b)
        return float((k.sum() - np.trace(k)) / (k.size - len(k)) if a is b else k.mean())

    expected = mean(x, x) + mean(y, y) - 2 * mean(x, y)
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-9)
