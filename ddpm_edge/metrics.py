"""How far apart two sets of images are, by what a feature network sees in them; NumPy only."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ddpm_edge.arrays import Array, Float64
from ddpm_edge.errors import ConfigError


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
        if features.ndim != 2 or len(features) <= features.shape[1]:
            raise ConfigError(
                f"features must be (N, D) with N > D, or their covariance is not known; got "
                f"{features.shape}: give more images"
            )
        if not np.isfinite(features).all():
            raise ConfigError("the features hold NaN or infinity; look at the images")
        values = features.astype(np.float64)
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
