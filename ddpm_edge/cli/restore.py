"""`ddpm-edge inpaint`, `upscale` and `vary`: images from images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from ddpm_edge import AveragePool, Generator, Mask, Restore, Vary
from ddpm_edge.arrays import UInt8
from ddpm_edge.cli.options import image_options, plan_options, runtime_options
from ddpm_edge.cli.sample import make_images
from ddpm_edge.errors import ConfigError
from ddpm_edge.images import read_image
from ddpm_edge.tasks import Task

FILE = click.Path(path_type=Path)


def image_arguments(command: Callable[..., None]) -> Callable[..., None]:
    """What the commands that take image files share."""
    for option in (
        click.option("-n", "count", type=int, help="Answers to one image.  [default: 1]"),
        click.option("--bundle", type=FILE, help="The bundle.  [default: the built-in model]"),
        click.argument("images", nargs=-1, required=True, type=FILE),
    ):
        command = option(command)
    return command


def noise_option(command: Callable[..., None]) -> Callable[..., None]:
    """For measurements that are not exact."""
    return click.option(
        "--sigma-y",
        type=float,
        default=0.0,
        show_default=True,
        help="Standard deviation of the noise in the images, of values in [-1, 1].",
    )(command)


@click.command()
@image_arguments
@click.option(
    "--mask",
    "masks",
    multiple=True,
    required=True,
    type=FILE,
    help="Image of 0 and 255: not black where pixels are to be painted. Repeat for one an image.",
)
@noise_option
@image_options
@plan_options
@runtime_options
def inpaint(images: tuple[Path, ...], masks: tuple[Path, ...], sigma_y: float, **call: Any) -> None:
    """Paint parts of IMAGES anew; all other pixels stay as they are.

    Example:  ddpm-edge inpaint photo.png --mask mask.png -n 4 -o painted.png
    """

    def task(generator: Generator) -> Task:
        mask = Mask(read(masks, 1)[..., 0])
        return Restore(read(images, generator.sample_shape[0]), mask, sigma_y)

    _run(max(images, masks, key=len), task, **call)


@click.command()
@image_arguments
@click.option("--factor", type=int, default=2, show_default=True, help="How much larger, 2, 3, ...")
@noise_option
@image_options
@plan_options
@runtime_options
def upscale(images: tuple[Path, ...], factor: int, sigma_y: float, **call: Any) -> None:
    """Make larger images of IMAGES, whose size times the factor is that of the bundle's images.

    Example:  ddpm-edge upscale small.png --factor 2 -o large.png
    """

    def task(generator: Generator) -> Task:
        return Restore(read(images, generator.sample_shape[0]), AveragePool(factor), sigma_y)

    _run(images, task, **call)


@click.command()
@image_arguments
@click.option(
    "--strength",
    type=float,
    default=0.5,
    show_default=True,
    help="0 = the image itself to 1 = independent of it.",
)
@image_options
@plan_options
@runtime_options
def vary(images: tuple[Path, ...], strength: float, **call: Any) -> None:
    """Make variations of IMAGES.

    Example:  ddpm-edge vary photo.png --strength 0.4 -n 8 -o variations.png
    """

    def task(generator: Generator) -> Task:
        return Vary(read(images, generator.sample_shape[0]), strength)

    _run(images, task, **call)


def _run(
    images: tuple[Path, ...],
    task: Callable[[Generator], Task],
    *,
    count: int | None,
    bundle: Path | None,
    **call: Any,
) -> None:
    """Run a task for these images, or several times for one."""
    n = len(images) if count is None else count
    make_images(bundle, lambda generator: (n, task(generator)), **call)


def read(paths: tuple[Path, ...], channels: int) -> UInt8:
    """Image files of one size, uint8 (n, H, W, C)."""
    arrays = [read_image(path, channels) for path in paths]
    for path, array in zip(paths, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise ConfigError(
                f"{path} is {array.shape[0]} x {array.shape[1]}, but {paths[0]} is "
                f"{arrays[0].shape[0]} x {arrays[0].shape[1]}; give images of one size"
            )
    return np.stack(arrays)
