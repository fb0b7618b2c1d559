"""The phi functions against their series in exact fractions, near 0 and far from it."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from ddpm_edge.samplers.phi import y_phi


@pytest.mark.parametrize("y", [-20.0, -3.0, -1.001, -0.999, -0.1, -1e-3, -1e-8, 1e-5, 0.5, 2.0])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_y_phi_is_its_series(k: int, y: float) -> None:
    exact = sum(Fraction(y) ** (j + 1) / math.factorial(j + k) for j in range(120))
    assert y_phi(k, y) == pytest.approx(float(exact), rel=1e-13)  # a few roundings


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_limit_in_the_data(k: int) -> None:
    assert y_phi(k, -math.inf) == -1 / math.factorial(k - 1)
