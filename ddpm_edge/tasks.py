"""What a call may know of its images beforehand: a measurement, or images to begin with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ddpm_edge import checks
from ddpm_edge.arrays import Float32
from ddpm_edge.errors import ConfigError
from ddpm_edge.images import from_images
from ddpm_edge.restoration import Measurement, Operator


@dataclass(frozen=True, eq=False)
class Known:
    """The checked form of a task.

    Attributes:
        count: of how many images; 1 = of all, if there are more.
        measurement: what is imposed on every predicted x0.
        image: x0 to start from, float32 (count, C, H, W).
        strength: how much of `image` is made anew, 0..1: sampling begins at t = strength T.
    """

    count: int = 1
    measurement: Measurement | None = None
    image: Float32 | None = None
    strength: float = 1.0


class Task(Protocol):
    """What `Generator.run` and `stream` take as `task`."""

    def known(self, sample_shape: tuple[int, int, int]) -> Known:
        """What is known of samples of this shape.

        Raises:
            ConfigError: it does not fit them.
        """


@dataclass(frozen=True, eq=False)
class Restore:
    """Images of which a linear measurement is known, y = A x + sigma_y n.

    Attributes:
        y: of one or many: images as the operator leaves them, uint8 or float32 in [-1, 1]
            (h, w, C); for a `Matrix` (K,) or (n, K), floats.
        operator: `Mask`, `AveragePool`, `Grayscale` or `Matrix`.
        sigma_y: standard deviation of the noise in y, for values in [-1, 1]; 0 = y is exact.
    """

    y: Any
    operator: Operator
    sigma_y: float = 0.0

    def known(self, sample_shape: tuple[int, int, int]) -> Known:
        """The measurement."""
        if not isinstance(self.operator, Operator):
            raise ConfigError(
                "operator must be a Mask, AveragePool, Grayscale or Matrix; got "
                f"{checks.shown(self.operator)}"
            )
        sigma_y = checks.number("sigma_y", self.sigma_y)
        if not 0.0 <= sigma_y < np.inf:
            raise ConfigError(f"sigma_y must be a number >= 0; got {self.sigma_y!r}")
        shape = self.operator.measured_shape(sample_shape)
        y = from_images(self.y, shape) if len(shape) == 3 else _vectors(self.y, shape[0])
        count = max(len(y), len(self.operator))
        if not {len(y), len(self.operator)} <= {1, count}:
            raise ConfigError(
                f"got {len(y)} images and {len(self.operator)} masks; give one mask, or one an "
                "image"
            )
        return Known(count, measurement=Measurement.of(self.operator, y, sigma_y))


@dataclass(frozen=True, eq=False)
class Vary:
    """Variations of images: noised to t = strength T and sampled from there.

    SDEdit (Meng et al. 2022).

    Attributes:
        image: one or many, uint8 or float32 in [-1, 1], (H, W, C).
        strength: 0 = the image itself .. 1 = independent of it.
    """

    image: Any
    strength: float = 0.5

    def known(self, sample_shape: tuple[int, int, int]) -> Known:
        """The images to start from."""
        strength = checks.number("strength", self.strength)
        if not 0.0 <= strength <= 1.0:
            raise ConfigError(f"strength must be in 0..1; got {self.strength!r}")
        image = from_images(self.image, sample_shape)
        return Known(len(image), image=image, strength=strength)


def _vectors(y: Any, size: int) -> Float32:
    """One or many measurements by a matrix, float32 (n, size)."""
    values = checks.array("y", y)
    if values.ndim not in (1, 2) or values.shape[-1:] != (size,) or not values.size:
        raise ConfigError(f"y must be ({size},), or (n, {size}) for several; got {values.shape}")
    with np.errstate(over="ignore"):
        vectors: Float32 = values.reshape(-1, size).astype(np.float32)
    if not np.isfinite(vectors).all():
        raise ConfigError("y must hold numbers that float32 holds; some are NaN or too large")
    return vectors
