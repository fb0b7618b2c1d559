"""The Frechet distance against closed forms and SciPy's matrix square root."""

from __future__ import annotations

import numpy as np
import pytest

from ddpm_edge.errors import ConfigError
from ddpm_edge.metrics import Moments, frechet_distance


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
