"""States at T, from which a deterministic sampler makes images."""

from __future__ import annotations

import numpy as np

from ddpm_edge import checks
from ddpm_edge.arrays import Array, Float32
from ddpm_edge.errors import ConfigError


def slerp(a: Array, b: Array, n: int) -> Float32:
    """N latents from a to b along a great circle, both included (Shoemake 1985).

    Along a straight line they would lose norm on the way, and the images contrast.

    Args:
        a: latents, such as (C, H, W).
        b: as a.
        n: how many, >= 2.

    Returns:
        float32 (n, ...).

    Raises:
        ConfigError: shapes that differ, or n < 2.
    """
    n = checks.whole("n", n, least=2)
    a, b = (checks.array("latents", x).astype(np.float64) for x in (a, b))
    if a.shape != b.shape or not a.size or not np.isfinite([a, b]).all():
        raise ConfigError(f"latents must be finite, of one shape; got {a.shape} and {b.shape}")
    w = np.linspace(0.0, 1.0, n).reshape(-1, *[1] * a.ndim)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    angle = np.arccos(np.clip((a * b).sum() / norms, -1.0, 1.0)) if norms else 0.0
    if np.sin(angle) < 1e-6:  # the same direction, or opposite ones, between which none is shortest
        points: Float32 = ((1.0 - w) * a + w * b).astype(np.float32)
    else:
        weights = np.sin((1.0 - w) * angle), np.sin(w * angle)
        points = ((weights[0] * a + weights[1] * b) / np.sin(angle)).astype(np.float32)
    return points
