"""Labels of a batch, and guidance towards them."""

from __future__ import annotations

from typing import NamedTuple

from ddpm_edge.arrays import Float32, Int64

Labels = Int64 | None  # (B,); None where the model takes none


class Guidance(NamedTuple):
    """Classifier-free guidance of a batch (Ho and Salimans 2022).

    Attributes:
        scale: of eps_u + scale (eps_c - eps_u) for each sample; 1 = plain conditioning;
            float32 (B,).
        interval: the first and the last timestep, low <= high, at which it acts (Kynkaanniemi et
            al. 2024); elsewhere the network is asked with the labels alone.
    """

    scale: Float32
    interval: tuple[int, int]

    def at(self, t: int) -> Float32 | None:
        """The scales at timestep t; None where it does not act."""
        low, high = self.interval
        return self.scale if low <= t <= high else None
