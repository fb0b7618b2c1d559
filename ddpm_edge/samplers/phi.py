"""The phi functions of exponential integrators (Hochbruck and Ostermann 2010, section 2)."""

from __future__ import annotations

import math

import numpy as np


def y_phi(k: int, y: float) -> float:
    """Y phi_k(y) with phi_k(y) = sum over j >= 0 of y^j / (j + k)!, k >= 1.

    y phi_1 = e^y - 1, and y phi_{k+1} = phi_k - 1/k!. Near 0 that difference loses its digits, and
    the sum is taken; minus infinity gives the limit, -1/(k-1)!.
    """
    if abs(y) < 1.0:
        terms = (y ** (j + 1) / math.factorial(j + k) for j in range(18))  # 18! is 6e15
        return sum(terms)
    value = float(np.expm1(y))
    for i in range(1, k):
        value = value / y - 1.0 / math.factorial(i)
    return value
