"""How far apart two sets of images are, by what a feature network sees in them; NumPy only.

How sure a figure is tells a jackknife over ten blocks of images, for any statistic alike. Figures
of images that were made from the same noise are compared block by block, which sees much smaller
differences than their errors alone would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ddpm_edge import checks
from ddpm_edge.arrays import Array, Bool, Float64, Int64
from ddpm_edge.errors import ConfigError

BLOCKS = 10  # of a jackknife
T_95 = 2.262  # quantile 0.975 of Student's t with BLOCKS - 1 degrees of freedom
NEIGHBOURS = 3  # of precision and recall (Kynkaanniemi et al. 2019)
PAIRS = 8_000_000  # of which a matrix is in memory at once


class Moments(NamedTuple):
    """Mean and covariance of features: all that the Frechet distance knows of them."""

    mean: Float64  # (D,)
    covariance: Float64  # (D, D)

    @classmethod
    def of(cls, features: Array) -> Moments:
        """Of features (N, D), N > D, any floating dtype.

        Raises:
            ConfigError: too few of them, another shape, or NaN.
        """
        values = _features(features, "features").astype(np.float64)
        if len(values) <= values.shape[1]:
            raise ConfigError(
                f"features must be (N, D) with N > D, or their covariance is not known; got "
                f"{features.shape}: give more images"
            )
        return cls(values.mean(axis=0), np.cov(values, rowvar=False))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)), A and B the covariances.

    Dowson and Landau 1982; with Inception's features it is the FID of Heusel et al. 2017. It falls
    with the number of images: compare only distances of equally many.
    """
    # (A B)^(1/2) has the trace of (sqrt(A) B sqrt(A))^(1/2), which is symmetric.
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0.0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ b.covariance @ root)
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance) + np.trace(b.covariance)
    return float(distance - 2.0 * np.sqrt(cross.clip(0.0)).sum())


def kernel_distance(a: Array, b: Array) -> float:
    """Squared maximum mean discrepancy, unbiased, with k(x, y) = (x.y / D + 1)^3.

    With Inception's features it is the KID of Binkowski et al. 2018. Unlike the Frechet distance it
    does not depend on how many images there are; it may be slightly negative.

    Args:
        a: features (N, D), N >= 2.
        b: features (M, D), M >= 2.
    """
    return kernel_estimate(b, a).value


def covered(balls: Array, points: Array, k: int = NEIGHBOURS) -> Bool:
    """Which points are nearer to one of `balls` than its own k-th neighbour is; bool (M,).

    The share of them is the precision of generated points among real balls, and the recall the
    other way round (Kynkaanniemi et al. 2019).

    Args:
        balls: features (N, D), N > k.
        points: features (M, D).
        k: which neighbour, >= 1.
    """
    k = checks.whole("k", k)
    balls, points = _pair(balls, points, least=(k + 1, 1))
    radius = np.concatenate([np.partition(d, k, axis=1)[:, k] for d in _distances(balls, balls)])
    return np.concatenate([(d <= radius).any(axis=1) for d in _distances(points, balls)])


def nearest(a: Array, b: Array) -> tuple[Float64, Int64]:
    """Distance to the nearest row of b, and which it is; (N,) each.

    Args:
        a: (N, D), such as images of any dtype.
        b: (M, D).
    """
    x, y = _pair(a, b, least=(1, 1), dtype=np.float32)  # to find it; two alike may be confused
    index = np.concatenate([d.argmin(axis=1) for d in _distances(x, y)])
    exact = a.astype(np.float64) - b[index]
    return np.sqrt(np.einsum("nd,nd->n", exact, exact)), index


def class_kl(made: Array, real: Array) -> float:
    """KL(made || real) of two histograms of classes, in nats; 0 where they are alike.

    Half an image is added to each class, so that one that is absent does not make it infinite.

    Args:
        made: counts (classes,).
        real: counts (classes,).
    """
    p, q = ((n + 0.5) / np.sum(n + 0.5) for n in (made, real))
    return float(np.sum(p * np.log(p / q)))


@dataclass(frozen=True, eq=False)
class Estimate:
    """A figure and how sure it is.

    Attributes:
        value: of all images.
        replicates: without each of the blocks of images; (BLOCKS,).
    """

    value: float
    replicates: Float64

    @property
    def standard_error(self) -> float:
        """Of the value, by the choice of images."""
        g = len(self.replicates)
        return float(np.sqrt((g - 1) * np.var(self.replicates)))


class Difference(NamedTuple):
    """How far two figures are apart."""

    value: float
    standard_error: float

    @property
    def significant(self) -> bool:
        """Whether it is not 0, with 95 % confidence."""
        return abs(self.value) > T_95 * self.standard_error


def difference(a: Estimate, b: Estimate, paired: bool) -> Difference:
    """How far b is above a.

    Args:
        a: a figure.
        b: another one.
        paired: whether image i of both belong together, as those made from the same noise do: they
            are then compared block by block.
    """
    if paired:
        apart = Estimate(b.value - a.value, b.replicates - a.replicates)
        return Difference(apart.value, apart.standard_error)
    return Difference(b.value - a.value, float(np.hypot(a.standard_error, b.standard_error)))


def jackknife(statistic: Callable[..., float], *samples: Array) -> Estimate:
    """A statistic of samples (N, ...) and its standard error (delete-a-group; Kott 2001).

    Args:
        statistic: of what remains of each of the samples.
        *samples: (N, ...) each, N >= BLOCKS; row i of all belong together.

    Raises:
        ConfigError: fewer.
    """
    n = len(samples[0])
    if n < BLOCKS:
        raise ConfigError(f"a standard error needs {BLOCKS} images or more; got {n}")
    blocks = np.array_split(np.arange(n), BLOCKS)
    without = [statistic(*(np.delete(s, block, axis=0) for s in samples)) for block in blocks]
    return Estimate(float(statistic(*samples)), np.array(without, np.float64))


def mean_kernel(x: Array) -> float:
    """The mean of k(x_i, x_j) over all i != j, of features (N, D), N >= 2."""
    return float(_own_sums(x.astype(np.float64)).sum() / (len(x) * (len(x) - 1)))


def kernel_estimate(made: Array, real: Array, within: float | None = None) -> Estimate:
    """`jackknife` of `kernel_distance` by the choice of made images, in one pass over pairs.

    Args:
        made: features (N, D), N >= 2.
        real: features (M, D), M >= 2.
        within: `mean_kernel(real)`, where it is known; None = found here.
    """
    x, y = _pair(made, real, least=(2, 2))
    n, m = len(x), len(y)
    own, cross = _own_sums(x), _kernel_sums(x, y)
    real_part = mean_kernel(y) if within is None else within

    def without(block: Int64) -> float:
        left = n - len(block)
        among = _kernel(x[block] @ x[block].T, x.shape[1])  # counted twice in the rows
        pairs = own.sum() - 2 * own[block].sum() + among.sum() - np.trace(among)
        between = (cross.sum() - cross[block].sum()) / (left * m)
        return float(pairs / (left * (left - 1)) + real_part - 2 * between)

    blocks = np.array_split(np.arange(n), BLOCKS) if n >= BLOCKS else []
    return Estimate(without(np.arange(0)), np.array([without(block) for block in blocks]))


def _distances(a: Array, b: Array) -> Iterator[Array]:
    """Euclidean distances of all pairs, some rows at a time; (rows, M)."""
    squares = np.einsum("nd,nd->n", b, b)
    rows = max(1, PAIRS // len(b))
    for first in range(0, len(a), rows):
        part = a[first : first + rows]
        between = part @ b.T
        between *= -2.0
        between += squares
        between += np.einsum("nd,nd->n", part, part)[:, None]
        np.maximum(between, 0.0, out=between)
        yield np.sqrt(between, out=between)


def _kernel(products: Float64, dimensions: int) -> Float64:
    kernel: Float64 = (products / dimensions + 1.0) ** 3
    return kernel


def _own_sums(x: Float64) -> Float64:
    """For each row the sum over all others; (N,)."""
    return _kernel_sums(x, x) - _kernel(np.einsum("nd,nd->n", x, x), x.shape[1])


def _kernel_sums(a: Float64, b: Float64) -> Float64:
    """For each row of a the sum over all rows of b; (N,)."""
    rows = max(1, PAIRS // len(b))
    parts = [_kernel(a[i : i + rows] @ b.T, a.shape[1]).sum(axis=1) for i in range(0, len(a), rows)]
    return np.concatenate(parts)


def _features(features: Any, name: str) -> Array:
    values = checks.array(name, features)
    if values.ndim != 2 or not values.size:
        raise ConfigError(f"{name} must be (N, D); got {values.shape}")
    if not np.isfinite(values).all():
        raise ConfigError(f"the {name} hold NaN or infinity; look at the images")
    return values


def _pair(
    a: Array, b: Array, least: tuple[int, int], dtype: type = np.float64
) -> tuple[Array, Array]:
    x: Array = _features(a, "features").astype(dtype)
    y: Array = _features(b, "features").astype(dtype)
    if x.shape[1] != y.shape[1] or len(x) < least[0] or len(y) < least[1]:
        raise ConfigError(
            f"features must be (N, D) and (M, D), N >= {least[0]} and M >= {least[1]}; got "
            f"{x.shape} and {y.shape}"
        )
    return x, y
