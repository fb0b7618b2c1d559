"""The eps-U-Net of Ho et al. 2020 (section 4, appendix B), written for the edge.

Differences from the original that keep its parameters and help a runtime: all residual blocks take
their time shift from one shared projection, q, k and v are one 1x1 convolution, and the strided
convolution pads symmetrically, so that the exported graph holds no shape arithmetic and no Pad.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ddpm_edge.errors import ConfigError


@dataclass(frozen=True)
class UNetConfig:
    """What defines a U-Net.

    Args:
        sample_shape: (C, H, W) of one sample; H and W divisible by 2 ** (len(widths) - 1).
        widths: feature channels at each level, finest first; each divisible by `groups`.
        blocks: residual blocks a level on the way down (one more on the way up).
        attention: levels with self-attention after each block, 0 = full resolution. The middle of
            the network always has it.
        groups: groups of each normalisation. At least 2: one group is computed wrongly by some
            TensorRT versions.
        classes: number of labels; 0 = unconditional. Label `classes` is the null label.
        dropout: probability in [0, 1) of dropping a feature inside a residual block in training.
    """

    sample_shape: tuple[int, int, int] = (1, 28, 28)
    widths: tuple[int, ...] = (32, 64, 96)
    blocks: int = 2
    attention: tuple[int, ...] = (2,)
    groups: int = 8
    classes: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot be built, before any weight is made."""
        factor = 2 ** (len(self.widths) - 1)
        _, height, width = self.sample_shape
        if height % factor or width % factor:
            raise ConfigError(
                f"images of {height}x{width} cannot be halved {len(self.widths) - 1} times; "
                f"height and width must be multiples of {factor}: resize or pad the images"
            )
        if any(w % self.groups for w in self.widths) or self.groups < 2:
            raise ConfigError(
                f"widths {self.widths} must be multiples of groups, which must be >= 2; "
                f"got groups={self.groups}"
            )

    @classmethod
    def preset(cls, name: str, sample_shape: tuple[int, int, int], classes: int = 0) -> UNetConfig:
        """The preset called `name`, for data of this shape and number of classes."""
        if name not in PRESETS:
            raise ConfigError(f"no preset {name!r}; presets are {', '.join(PRESETS)}")
        return replace(PRESETS[name], sample_shape=sample_shape, classes=classes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> UNetConfig:
        """The inverse of `to_dict`."""
        lists: dict[str, Any] = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        return cls(**{**values, **lists})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


PRESETS = {
    "tiny": UNetConfig(widths=(8, 16), blocks=1, attention=(), groups=4),
    "small": UNetConfig(widths=(32, 64, 96), blocks=1, attention=(2,), groups=8),
    "cifar10": UNetConfig(
        sample_shape=(3, 32, 32),
        widths=(128, 256, 256, 256),
        blocks=2,
        attention=(1,),
        groups=32,
        dropout=0.1,
    ),
}


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep through two linear layers (Ho et al., appendix B)."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half) / max(half - 1, 1))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.linear1 = nn.Linear(2 * half, 4 * width)
        self.linear2 = nn.Linear(4 * width, 4 * width)

    def forward(self, t: Tensor) -> Tensor:
        """Embed t (B,)."""
        angle = t[:, None].float() * self.frequencies  # (B, width / 2), float32: exact to t = 2^24
        wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # (B, width)
        out: Tensor = self.linear2(F.silu(self.linear1(wave)))
        return out  # (B, 4 width)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, with the time shift between and a shortcut around."""

    def __init__(self, channels: int, out: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.groups, channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(config.groups, out)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = zeroed(nn.Conv2d(out, out, 3, padding=1))
        self.shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """Map x (B, channels, H, W) and shift (B, out) to (B, out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x))) + shift[:, :, None, None]  # (B, out, H, W)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + self.shortcut(x)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Single-head self-attention over all positions, added to its input."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)  # each (B, C, N), N = H W
        scores = q.transpose(1, 2) @ k * x.shape[1] ** -0.5  # (B, N, N): query, key
        mixed = v @ scores.softmax(dim=2).transpose(1, 2)  # (B, C, N)
        return x + self.out(mixed.unflatten(2, x.shape[2:]))  # type: ignore[no-any-return]


class UNet(nn.Module):
    """The network of a diffusion model: an answer of x's shape for x at timestep number t.

    `forward(x, t)` or, with classes, `forward(x, t, label)`: x float32 (B, C, H, W), t int64 (B,)
    counted from 0, label int64 (B,) in 0..classes where `classes` means "no label".
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.time = TimeEmbedding(config.widths[0])
        self.label = (
            nn.Embedding(config.classes + 1, 4 * config.widths[0]) if config.classes else None
        )
        self.stem = nn.Conv2d(config.sample_shape[0], config.widths[0], 3, padding=1)
        self._shifts: list[int] = []  # channels of each block's time shift, in order of use
        here, skips = config.widths[0], [config.widths[0]]

        self.down = nn.ModuleList()
        for level, width in enumerate(config.widths):
            for _ in range(config.blocks):
                self.down.append(self._stage(here, width, level in config.attention))
                here = width
                skips.append(here)
            if level < len(config.widths) - 1:
                self.down.append(nn.Conv2d(here, here, 3, stride=2, padding=1))
                skips.append(here)

        self.middle = nn.ModuleList(
            [self._stage(here, here, attention=True), self._stage(here, here, attention=False)]
        )

        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(config.widths))):
            for _ in range(config.blocks + 1):
                self.up.append(self._stage(here + skips.pop(), width, level in config.attention))
                here = width
            if level:
                self.up.append(Upsample(here))

        self.shifts = nn.Linear(4 * config.widths[0], sum(self._shifts))
        self.norm = nn.GroupNorm(config.groups, here)
        self.head = zeroed(nn.Conv2d(here, config.sample_shape[0], 3, padding=1))

    def _stage(self, channels: int, out: int, attention: bool) -> Stage:
        self._shifts.append(out)
        return Stage(channels, out, attention, self.config)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Answer for x (B, C, H, W) at t (B,); a label is needed if there are classes."""
        embedding = self.time(t)  # (B, 4 width)
        if self.label is not None:
            embedding = embedding + self.label(label)
        shifts = iter(self.shifts(F.silu(embedding)).split(self._shifts, dim=1))

        h = self.stem(x)  # (B, width, H, W)
        skips = [h]
        for layer in self.down:
            h = apply(layer, h, shifts)
            skips.append(h)
        for layer in self.middle:
            h = apply(layer, h, shifts)
        for layer in self.up:
            joined = h if isinstance(layer, Upsample) else torch.cat([h, skips.pop()], dim=1)
            h = apply(layer, joined, shifts)
        out: Tensor = self.head(F.silu(self.norm(h)))
        return out  # (B, C, H, W)


class Stage(nn.Module):
    """A residual block, followed by attention where the level has it."""

    def __init__(self, channels: int, out: int, attention: bool, config: UNetConfig) -> None:
        super().__init__()
        self.block = ResidualBlock(channels, out, config)
        self.attention = Attention(out, config) if attention else nn.Identity()

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """Map x (B, channels, H, W) and shift (B, out) to (B, out, H, W)."""
        out: Tensor = self.attention(self.block(x, shift))
        return out


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, 2 H, 2 W)."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def apply(layer: nn.Module, h: Tensor, shifts: Iterator[Tensor]) -> Tensor:
    """Run a layer; only stages take a time shift."""
    out: Tensor = layer(h, next(shifts)) if isinstance(layer, Stage) else layer(h)
    return out


def zeroed(module: nn.Conv2d) -> nn.Conv2d:
    """Start at zero, so that a block starts as the identity (Ho et al.'s init_scale = 0)."""
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return module
