"""What is known of an image beside the model: a linear measurement y = A x + sigma_y n.

DDNM (Wang et al. 2022, arXiv:2212.00490) imposes it on every predicted x0,

    x0 <- x0 + A^+ (y - A x0)                       (section 3.2, Algorithm 1)

which fills the range of A^+ from the measurement and leaves the rest to the model. An operator is
A by its singular value decomposition A = U S V^T: what the form for noisy measurements, DDNM+,
weighs is the directions in V.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ddpm_edge import checks
from ddpm_edge.arrays import Array, Float32
from ddpm_edge.errors import ConfigError
from ddpm_edge.images import to_mask
from ddpm_edge.noise import Stream
from ddpm_edge.plan import Draw, Impose, Plan

Shape = tuple[int, int, int]  # (C, H, W)
Weight = float | Array  # one for all singular values, or one for each

ITU_R_601 = (0.299, 0.587, 0.114)  # red, green, blue: what PIL and OpenCV make gray with
ROUNDS = 100
EXACT = 0.1 / 127.5  # a tenth of one of 256 grey levels
LEAST, MOST = 1e-9, 1e9  # of a matrix, far inside what float32 holds


class Operator(ABC):
    """A of a measurement, on states (B, C, H, W).

    Attributes:
        singular: the singular values of A, one number where all that are not 0 are equal.
        disjoint: whether every value of a state goes into one value of the measurement at most.
        scale: how large y is beside x.
    """

    singular: Weight
    disjoint = True
    scale = 1.0

    @abstractmethod
    def measured_shape(self, sample_shape: Shape) -> tuple[int, ...]:
        """Shape of y for one sample: (C, H, W) of an image, or (K,).

        Raises:
            ConfigError: the operator does not fit such samples.
        """

    @abstractmethod
    def forward(self, x: Array) -> Array:
        """A x; float32 (B, ...)."""

    @abstractmethod
    def inverse(self, y: Array, weight: Weight = 1.0) -> Array:
        """V (weight / S) U^T y, which with weight 1 is A^+ y; float32 (B, C, H, W)."""

    def __len__(self) -> int:
        """For how many samples this is; 1 = the same A for all."""
        return 1

    def part(self, samples: slice) -> Operator:  # noqa: ARG002
        """The operator of these samples."""
        return self


class Mask(Operator):
    """Pixels that are known, the others are to be painted.

    Args:
        mask: (H, W), or (n, H, W) for one an image: bool, {0, 1} or {0, 255}, not 0 where pixels
            are to be painted (as in OpenCV and diffusers).

    Raises:
        ConfigError: other values or shapes, or a mask that is empty or full.
    """

    singular = 1.0

    def __init__(self, mask: Any) -> None:
        self.known: Float32 = (~to_mask(mask))[:, None].astype(np.float32)  # (n, 1, H, W)

    def measured_shape(self, sample_shape: Shape) -> tuple[int, ...]:
        """That of the samples."""
        got, expected = self.known.shape[2:], sample_shape[1:]
        if got != expected:
            raise ConfigError(
                f"the mask is {_size(got)}, but the model's images are {_size(expected)} (height x "
                "width); crop or resize image and mask alike"
            )
        return sample_shape

    def forward(self, x: Array) -> Array:
        """The known pixels, 0 elsewhere."""
        return x * self.known

    def inverse(self, y: Array, weight: Weight = 1.0) -> Array:
        """The same again."""
        x: Array = y * (self.known * weight)
        return x

    def __len__(self) -> int:
        return len(self.known)

    def part(self, samples: slice) -> Mask:
        """With the masks of these samples."""
        chosen = Mask.__new__(Mask)
        chosen.known = part_of(self.known, samples)
        return chosen


class AveragePool(Operator):
    """Means of blocks of factor x factor pixels: what a smaller image knows of a larger one.

    Args:
        factor: 2 or more; it must divide the height and the width of the model's images.
    """

    def __init__(self, factor: int) -> None:
        self.factor = checks.whole("factor", factor, least=2)
        self.singular = 1.0 / self.factor

    def measured_shape(self, sample_shape: Shape) -> tuple[int, ...]:
        """That of the smaller image."""
        channels, height, width = sample_shape
        if height % self.factor or width % self.factor:
            raise ConfigError(
                f"factor {self.factor} does not divide {_size((height, width))}, the size of the "
                "model's images"
            )
        return channels, height // self.factor, width // self.factor

    def forward(self, x: Array) -> Array:
        """The means."""
        n, channels, height, width = x.shape
        f = self.factor
        blocks = x.reshape(n, channels, height // f, f, width // f, f)
        means: Array = blocks.mean(axis=(3, 5), dtype=x.dtype)
        return means

    def inverse(self, y: Array, weight: Weight = 1.0) -> Array:
        """Every mean in all pixels of its block."""
        large: Array = (y * weight).repeat(self.factor, 2).repeat(self.factor, 3)
        return large


class Grayscale(Operator):
    """The gray image of an RGB one: a weighted sum of its channels.

    Args:
        weights: of red, green and blue; they sum to 1. The default is that of PIL and OpenCV
            (ITU-R 601-2).
    """

    def __init__(self, weights: tuple[float, float, float] = ITU_R_601) -> None:
        values = checks.array("weights", weights).astype(np.float64)
        if values.shape != (3,) or not abs(values.sum() - 1.0) < 1e-6 or not (values >= 0).all():
            raise ConfigError(
                f"weights must be three numbers >= 0 that sum to 1; got {checks.shown(weights)}"
            )
        self.weights: Float32 = values.astype(np.float32).reshape(3, 1, 1)
        self.singular = float(np.sqrt((values**2).sum()))

    def measured_shape(self, sample_shape: Shape) -> tuple[int, ...]:
        """One channel."""
        if sample_shape[0] != 3:
            raise ConfigError(
                f"colours can be given back by a model of RGB images only; this one makes "
                f"{sample_shape[0]} channel(s)"
            )
        return 1, *sample_shape[1:]

    def forward(self, x: Array) -> Array:
        """The weighted sum."""
        gray: Array = (x * self.weights).sum(axis=1, keepdims=True)
        return gray

    def inverse(self, y: Array, weight: Weight = 1.0) -> Array:
        """The colour of least norm with this gray."""
        x: Array = y * (self.weights * (weight / self.singular**2))
        return x


class Matrix(Operator):
    """Any linear measurement, by its matrix.

    Args:
        matrix: (K, H W C) real numbers; image.reshape(-1) of an image (H, W, C) is what it takes.
        image_shape: (H, W, C).

    Raises:
        ConfigError: another shape, NaN or infinity, or a largest value outside 1e-9 to 1e9.
    """

    disjoint = False

    def __init__(self, matrix: Any, image_shape: tuple[int, int, int]) -> None:
        sizes = checks.array("image_shape", image_shape)
        for size in sizes.reshape(-1):
            checks.whole("a size of image_shape", size)
        values = checks.array("the matrix", matrix)
        if sizes.shape != (3,) or values.ndim != 2 or values.shape[1] != sizes.prod():
            raise ConfigError(
                f"the matrix must be (K, H W C), and image_shape (H, W, C); got {values.shape} and "
                f"{checks.shown(image_shape)}"
            )
        self.image_shape = tuple(sizes.tolist())
        if not np.isfinite(values).all() or not LEAST <= np.abs(values).max(initial=0) <= MOST:
            raise ConfigError(
                f"the matrix must hold finite numbers, the largest in {LEAST:g} to {MOST:g}; "
                "scale it and y"
            )
        u, s, vt = np.linalg.svd(values.astype(np.float64), full_matrices=False)
        # What is below float32's rounding of y would blow it up, as of a blur's high frequencies.
        rank = int((s > s[0] * max(values.shape) * np.finfo(np.float32).eps).sum())
        self.scale = float(np.linalg.norm(values.astype(np.float64), axis=1).max())
        self.matrix: Float32 = values.astype(np.float32)
        self.u: Float32 = u[:, :rank].astype(np.float32)  # (K, rank)
        self.singular: Float32 = s[:rank].astype(np.float32)
        self.vt: Float32 = vt[:rank].astype(np.float32)  # (rank, H W C)

    def measured_shape(self, sample_shape: Shape) -> tuple[int, ...]:
        """(K,)."""
        channels, height, width = sample_shape
        if self.image_shape != (height, width, channels):
            raise ConfigError(
                f"the matrix is for images of {self.image_shape}; the model makes "
                f"{(height, width, channels)} (height, width, channels)"
            )
        return (len(self.matrix),)

    def forward(self, x: Array) -> Array:
        """A x; (B, K)."""
        y: Array = x.transpose(0, 2, 3, 1).reshape(len(x), -1) @ self.matrix.T
        return y

    def inverse(self, y: Array, weight: Weight = 1.0) -> Array:
        """V (weight / S) U^T y."""
        flat = ((y @ self.u) * (weight / self.singular)) @ self.vt  # (B, H W C)
        x: Array = flat.reshape(len(y), *self.image_shape).transpose(0, 3, 1, 2)
        return x


@dataclass(frozen=True, eq=False)
class Measurement:
    """What was measured of samples.

    Attributes:
        operator: A.
        y: float32 (n, ...), or (1, ...) where it is the same for all.
        sigma_y: standard deviation of the noise in y, whose values are those of images, [-1, 1].
    """

    operator: Operator
    y: Float32
    sigma_y: float = 0.0

    @classmethod
    def of(cls, operator: Operator, y: Float32, sigma_y: float) -> Measurement:
        """Of y (n, ...), but for what no image can have led to: A A^+ y."""
        return cls(operator, operator.forward(operator.inverse(y)), sigma_y)

    def part(self, samples: slice) -> Measurement:
        """That of these samples."""
        return replace(self, operator=self.operator.part(samples), y=part_of(self.y, samples))

    def check(self, plan: Plan) -> None:
        """Raise ConfigError where a noisy measurement would never be imposed."""
        if self.sigma_y > 0.0 and not plan.s.any():
            raise ConfigError(
                f"sigma_y {self.sigma_y:g} needs a sampler that draws noise, and {plan.name} does "
                "not; use the default, ddpm, or ddim with eta 1"
            )

    def along(self, plan: Plan, draw: Draw) -> tuple[Impose, Draw]:
        """What `run_plan` imposes on x0, and its draws, which make room for the noise in y."""
        if self.sigma_y == 0.0:
            return lambda x0, _: self.correct(x0), draw
        weight, kept = ddnm_plus(plan, self.operator.singular, self.sigma_y)
        row_of = {number: i for i, number in enumerate(plan.row.tolist())}

        def impose(x0: Array, i: int) -> None:
            self.correct(x0, weight[i])

        def tempered(stream: Stream, number: int) -> Array:
            z, less = draw(stream, number), kept[row_of[number]] - np.float32(1)
            if not less.any():
                return z
            operator = self.operator
            smaller: Array = z + operator.inverse(operator.forward(z), less)
            return smaller

        return impose, tempered

    def correct(self, x0: Array, weight: Weight = 1.0) -> None:
        """x0 <- x0 + A^+ (y - A x0), in place."""
        x0 += self.operator.inverse(self.y - self.operator.forward(x0), weight)

    def finish(self, x: Array) -> Array:
        """States (B, C, H, W) in [-1, 1] as near to x as the measurement lets them be.

        Clipping a state that agrees with y moves it away from y again; here what may still move
        takes over what was cut. A noisy measurement is not met again after the last step.
        """
        x = np.clip(x, -1.0, 1.0)
        if self.sigma_y > 0.0:
            return x
        operator = self.operator
        for _ in range(ROUNDS):
            residual = self.y - operator.forward(x)
            off = np.abs(residual).reshape(len(x), -1).max(axis=1) > EXACT * operator.scale
            if not off.any():
                break
            move = operator.inverse(residual)
            free = np.where(move > 0, x < 1.0, x > -1.0)  # what is at the border stays there
            if operator.disjoint:  # then each value of y tells how far that would come
                share = np.divide(
                    operator.forward(move * free),
                    residual,
                    out=np.ones_like(residual),
                    where=residual != 0,
                )
                move = operator.inverse(residual / np.maximum(share, 1e-6))
            # A sample that is there does not move with its batch: it depends on itself alone.
            move *= free & off[:, None, None, None]
            x = np.clip(x + move, -1.0, 1.0)
        return x


def ddnm_plus(plan: Plan, singular: Weight, sigma_y: float) -> tuple[Float32, Float32]:
    """How far a noisy measurement is imposed at each row, and what is left of the row's draw.

    DDNM+ (Wang et al. 2022, section 3.3): of what is imposed, noise of a sigma_y / s reaches the
    next state, a the coefficient of x0 in the row and s a singular value. It takes the place of as
    much of the row's own draw; where it is more, the correction is weighted down. Answers from
    before carry the same noise, so that a is the sum of their coefficients.

    Returns:
        Weights of the correction and of the draw, float32 (N, 1) or (N, singular values).
    """
    a = np.abs(plan.b.sum(axis=1, keepdims=True))  # (N, 1)
    draw = plan.s[:, None]
    noise = a * sigma_y / np.atleast_1d(np.asarray(singular, np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.where(noise > draw, draw / noise, 1.0)
        kept = np.sqrt(np.maximum(1.0 - (weight * noise / draw) ** 2, 0.0))
    kept = np.where(plan.evaluate[:, None] & (draw > 0), kept, 1.0)
    return weight.astype(np.float32), kept.astype(np.float32)


def part_of(array: Array, samples: slice) -> Array:
    """The rows of these samples; an array of one row is the same for all."""
    return array if len(array) == 1 else array[samples]


def _size(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))
