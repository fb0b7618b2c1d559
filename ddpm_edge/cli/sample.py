"""`ddpm-edge sample`: images from a bundle."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from ddpm_edge import Generator, Step, save_grid, save_image
from ddpm_edge.cli.options import image_options, plan_options, runtime_options
from ddpm_edge.cli.output import Progress, command_line
from ddpm_edge.errors import ConfigError
from ddpm_edge.files import check_writable, write_bytes
from ddpm_edge.tasks import Task


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("-n", "count", type=int, default=16, show_default=True, help="Number of images.")
@image_options
@plan_options
@runtime_options
def sample(
    bundle: Path | None,
    count: int,
    wanted: dict[str, Any],
    plan: dict[str, Any],
    where: dict[str, Any],
) -> None:
    """Generate images with BUNDLE (default: the built-in Fashion-MNIST model).

    Example:  ddpm-edge sample -n 10 --label sneaker --label bag --seed 1 -o out.png
    """
    make_images(bundle, lambda _: (count, None), wanted, plan, where)


def make_images(
    bundle: Path | None,
    what: Callable[[Generator], tuple[int, Task | None]],
    wanted: dict[str, Any],
    plan: dict[str, Any],
    where: dict[str, Any],
) -> None:
    """Run what a command asks for, save the images and say how it went.

    Args:
        bundle: None = the built-in one.
        what: number of images and task, for the loaded bundle.
        wanted: see `image_options`.
        plan: see `plan_options`.
        where: see `runtime_options`.
    """
    options = dict(wanted)
    output, labels, as_json = (options.pop(name) for name in ("output", "labels", "as_json"))
    save = saver(output)
    with Generator.load(bundle, **where) as generator:
        count, task = what(generator)
        names = generator.class_names  # a class may be called "7": the name comes first
        numbers = [int(x) if x.isdecimal() and x not in names else x for x in labels]
        dealt = [numbers[i % len(numbers)] for i in range(count)] if numbers else None
        with Progress("samples") as progress:

            def show(step: Step) -> None:
                progress.update((step.index + 1) / step.total, f"t = {step.t}")

            result = generator.run(count, label=dealt, task=task, callback=show, **options, **plan)
        save(result.images)
    seconds = result.milliseconds / 1e3
    expected = None if result.expected_ms is None else result.expected_ms / 1e3
    if as_json:
        report = {
            "output": str(output),
            "images": len(result.images),
            "seed": result.seed,
            "plan": result.plan.name,
            "evaluations": result.plan.evaluations,
            "runtime": result.runtime,
            "variant": result.variant,
            "loop": result.loop,
            "seconds": round(seconds, 3),
            "stopped": result.stopped,
            "expected_seconds": None if expected is None else round(expected, 3),
        }
        click.echo(json.dumps(report))
        return
    stopped = ", stopped by the deadline" if result.stopped else ""
    loop = ", and so the loop" if result.loop == "device" else ""
    click.echo(
        f"{output}: {len(result.images)} image{'s' * (len(result.images) > 1)}, "
        f"seed {result.seed}{stopped}\n"
        f"{result.plan.name}, {result.variant}, {result.runtime}{loop}: {seconds:.2f} s, "
        f"{seconds / len(result.images):.3f} s an image"
        + ("" if expected is None else f", {expected:.3f} s expected")
    )
    click.echo(f"Next: {command_line('info', *([bundle] if bundle else []))}")


def saver(output: Path) -> Callable[[Any], None]:
    """How to save images to `output`; what cannot be written is refused before any work is done."""
    suffix = output.suffix.lower()
    single = not suffix or output.is_dir()
    folder = output if single else output.parent
    if suffix not in ("", ".png", ".npy") and not single:
        raise ConfigError(
            f"cannot write {output}: end the name in .png (one grid) or .npy (an array), or give a "
            "directory (single PNGs)"
        )
    if folder.exists() and not folder.is_dir():
        raise click.ClickException(f"cannot write to {output}: {folder} is a file")
    if not single and not folder.exists():
        raise click.ClickException(f"cannot write {output}: there is no directory {folder}")
    check_writable(folder)

    def save(images: Any) -> None:
        if single:
            output.mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(images):
                save_image(image, output / f"{i:05d}.png")
        elif suffix == ".npy":
            buffer = io.BytesIO()  # NumPy's own write to a file does not notice a full disk
            np.save(buffer, images)
            write_bytes(output, buffer.getvalue())
        elif len(images) == 1:
            save_image(images[0], output)
        else:
            save_grid(images, output)

    return save
