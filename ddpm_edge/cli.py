"""The command line: a thin caller of the public Python surface."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from ddpm_edge import Bundle, Generator, Step, __version__, save_grid, save_image
from ddpm_edge.errors import ConfigError, DdpmEdgeError
from ddpm_edge.files import atomic_write, check_writable
from ddpm_edge.runtimes import RUNTIMES
from ddpm_edge.samplers import SAMPLERS, VARIANCES

PLAIN_PROGRESS_SECONDS = 10.0


class Commands(click.Group):
    """Turns the package's errors into messages and exit codes: 1 the work failed, 2 wrong use."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was typed."""
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            raise click.UsageError(str(error)) from error
        except (DdpmEdgeError, OSError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ddpm-edge")
@click.option("-v", "--verbose", is_flag=True, help="Log what the library does to stderr.")
def main(verbose: bool) -> None:
    """Train a DDPM in PyTorch, export it, and sample it on the device without PyTorch.

    Try it with the built-in model:  ddpm-edge sample -n 16 -o garments.png
    """
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("ddpm_edge").setLevel(logging.INFO if verbose else logging.WARNING)
    warnings.showwarning = lambda message, *_, **__: click.echo(f"Warning: {message}", err=True)


def runtime_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that choose where a bundle runs; the command gets them as the dict `where`."""

    @click.option(
        "--runtime",
        type=click.Choice(["auto", *RUNTIMES]),
        default="auto",
        show_default=True,
        help="What evaluates the network.",
    )
    @click.option("--device", help="cpu, cuda or cuda:N.  [default: the best that works]")
    @click.option("--variant", help="Precision of the network.  [default: fp32]")
    @click.option("--threads", type=int, help="CPU threads of one evaluation.  [default: all]")
    @functools.wraps(command)
    def gathered(
        runtime: str, device: str | None, variant: str | None, threads: int | None, **others: Any
    ) -> None:
        where = {"runtime": runtime, "device": device, "variant": variant, "threads": threads}
        command(where=where, **others)

    return gathered


def plan_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that choose the sampler; the command gets those given as the dict `plan`."""

    @click.option(
        "--sampler",
        type=click.Choice(list(SAMPLERS)),
        help="ddpm is Algorithm 2, all T steps unless --steps.  [default: the bundle's]",
    )
    @click.option("--steps", type=int, help="Evaluations of the network, 1 to T.")
    @click.option("--eta", type=float, help="ddim: randomness, 0 to 1.  [default: 0]")
    @click.option(
        "--variance",
        type=click.Choice(VARIANCES),
        help="ddpm: variance of each step.  [default: beta]",
    )
    @click.option("--clip", help="Limit of the predicted image, or 'off'.  [default: 1.0]")
    @functools.wraps(command)
    def gathered(
        sampler: str | None,
        steps: int | None,
        eta: float | None,
        variance: str | None,
        clip: str | None,
        **others: Any,
    ) -> None:
        given = {"sampler": sampler, "steps": steps, "eta": eta, "variance": variance}
        plan: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if clip is not None:
            plan["clip"] = None if clip == "off" else _clip_limit(clip)
        command(plan=plan, **others)

    return gathered


def _clip_limit(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"--clip must be a number above 0 or 'off'; got {text!r}") from error


@main.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("-n", "count", type=int, default=16, show_default=True, help="Number of images.")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="NAME.png: one grid. NAME.npy: uint8 (n, H, W, C). A directory: single PNGs.",
)
@click.option(
    "--label",
    "labels",
    multiple=True,
    help="Class, by number or name; repeat for several, dealt out in turn.  [default: none]",
)
@click.option("--guidance", type=float, help="Scale of guidance towards the label; 1 = none.")
@click.option("--seed", type=int, help="0 to 2**64 - 1.  [default: a fresh one, printed]")
@click.option("--first", type=int, default=0, show_default=True, help="Index of the first sample.")
@click.option("--batch", type=int, help="Images in one evaluation.  [default: 16]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@plan_options
@runtime_options
def sample(
    bundle: Path | None,
    count: int,
    output: Path,
    labels: tuple[str, ...],
    guidance: float | None,
    seed: int | None,
    first: int,
    batch: int | None,
    as_json: bool,
    plan: dict[str, Any],
    where: dict[str, Any],
) -> None:
    """Generate images with BUNDLE (default: the built-in Fashion-MNIST model).

    Example:  ddpm-edge sample -n 10 --label sneaker --label bag --seed 1 -o out.png
    """
    save = saver(output)
    with Generator.load(bundle, **where) as generator:
        numbers = [int(label) if label.isdecimal() else label for label in labels]
        dealt = [numbers[i % len(numbers)] for i in range(count)] if numbers else None
        with Progress("samples") as progress:

            def show(step: Step) -> None:
                progress.update((step.index + 1) / step.total, f"t = {step.t}")

            result = generator.run(
                count,
                label=dealt,
                guidance=guidance,
                seed=seed,
                first=first,
                batch=batch,
                callback=show,
                **plan,
            )
        save(result.images)
    seconds = result.milliseconds / 1e3
    if as_json:
        report = {
            "output": str(output),
            "images": len(result.images),
            "seed": result.seed,
            "plan": result.plan.name,
            "evaluations": result.plan.evaluations,
            "runtime": result.runtime,
            "variant": result.variant,
            "seconds": round(seconds, 3),
        }
        click.echo(json.dumps(report))
        return
    click.echo(
        f"{output}: {len(result.images)} images, seed {result.seed}\n"
        f"{result.plan.name}, {result.variant}, {result.runtime}: {seconds:.2f} s, "
        f"{seconds / len(result.images):.3f} s an image"
    )
    click.echo(f"Next: {command_line('info', *([bundle] if bundle else []))}")


@main.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--plan", "show_plan", is_flag=True, help="Print the table of the plan.")
@click.option("--json", "as_json", is_flag=True, help="Print bundle.json.")
@plan_options
def info(
    bundle: Path | None,
    show_plan: bool,
    as_json: bool,
    plan: dict[str, Any],
) -> None:
    """Show what BUNDLE (default: the built-in Fashion-MNIST model) holds; loads no runtime.

    Example:  ddpm-edge info --plan --sampler ddim --steps 10
    """
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    if as_json:
        click.echo(json.dumps(manifest.to_dict() | {"files": opened.files}, indent=2))
        return
    chosen = manifest.make_plan(**plan)
    if show_plan:
        click.echo(chosen.table())
        return
    channels, height, width = manifest.sample_shape
    size = sum(entry["size"] for entry in opened.files.values())
    rows = {
        "bundle": opened.path,
        "name": manifest.name,
        "images": f"{height} x {width}, {channels} channel{'s' if channels > 1 else ''}",
        "labels": ", ".join(manifest.class_names) or "none",
        "schedule": manifest.schedule,
        "prediction": manifest.prediction,
        "variants": ", ".join(manifest.variants),
        "plan": chosen.name,
        "size": f"{size / 1e6:.1f} MB in {len(opened.files)} files",
        "licence": manifest.licence or "not stated",
        "digest": opened.digest,
    }
    rows |= {f"trained: {key}": value for key, value in manifest.training.items()}
    for variant, entry in manifest.variants.items():
        for what, figure in entry.get("parity", {}).items():
            rows[f"{variant}: {what}"] = parity_text(**figure)
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        text = " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value
        click.echo(f"{name:<{width}}  {text}")


def command_line(*words: object) -> str:
    """A command line to copy, quoted where the shell needs it."""
    return shlex.join(["ddpm-edge", *(str(word) for word in words)])


def parity_text(max_abs_error: float, tolerance: float) -> str:
    """A figure of the parity gate for people."""
    return f"max abs error {max_abs_error:.1e} (tolerance {tolerance:.0e})"


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Directory to write; a bundle that is there is replaced.",
)
@click.option("--name", help="Name of the model.  [default: the data's]")
@click.option("--licence", default="", help="SPDX name of the weights' licence.")
@click.option(
    "--gate",
    type=click.Choice(["quick", "full"]),
    default="quick",
    show_default=True,
    help="full compares all T steps of Algorithm 2 with torch, not the last 50.",
)
@plan_options
def export(
    run: Path,
    output: Path,
    name: str | None,
    licence: str,
    gate: str,
    plan: dict[str, Any],
) -> None:
    """Export the averaged weights of the training run RUN as a bundle, if they pass the gate.

    The sampler options set the bundle's default plan: 50-step ddim unless told otherwise.

    Example:  ddpm-edge export runs/fashion-mnist -o fashion-mnist-bundle
    """
    from ddpm_edge.export import export_run

    start = time.perf_counter()

    def report(what: str, difference: float, tolerance: float) -> None:
        mark = "v" if difference <= tolerance else "x"
        click.echo(f"-[{mark}] {what}: {parity_text(difference, tolerance)}")

    click.echo(f"Exporting {run} to ONNX ...")
    bundle = export_run(
        run,
        output,
        **({"name": name} if name else {}),
        licence=licence,
        gate=gate,
        plan=plan,
        report=report,
    )
    size = sum(entry["size"] for entry in bundle.files.values())
    click.echo(
        f"{output}: {size / 1e6:.1f} MB, {time.perf_counter() - start:.0f} s\n"
        f"Next: {command_line('sample', output, '-n', 16, '-o', 'samples.png')}\n"
        f"      {command_line('info', output)}"
    )


@main.command()
@click.option(
    "--data",
    required=True,
    help="'fashion-mnist', a folder with its four IDX files, or an .npz with images and labels.",
)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="New directory."
)
@click.option(
    "--preset",
    type=click.Choice(["tiny", "small", "cifar10"]),
    default="small",
    show_default=True,
    help="Size of the U-Net.",
)
@click.option("--minutes", type=float, help="Train this long.")
@click.option("--steps", type=int, help="Train this many optimiser steps.")
@click.option("--batch", type=int, default=128, show_default=True, help="Images a step.")
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Peak learning rate.")
@click.option("--warmup", type=int, default=500, show_default=True, help="Steps up to the peak.")
@click.option("--ema", type=float, default=0.9995, show_default=True, help="Decay of the average.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything random.")
@click.option(
    "--schedule",
    type=click.Choice(["linear", "geometric", "cosine", "sigmoid", "constant"]),
    default="linear",
    show_default=True,
    help="Rule of beta_1..beta_T.",
)
@click.option("-T", "--timesteps", type=int, default=1000, show_default=True, help="T.")
@click.option("--beta-1", type=float, help="First beta.  [default: 1e-4]")
@click.option("--beta-T", "beta_t", type=float, help="Last beta.  [default: 0.02]")
@click.option("--beta", type=float, help="constant: every beta.  [default: 0.01]")
@click.option(
    "--precision",
    type=click.Choice(["auto", "bf16", "fp32"]),
    default="auto",
    show_default=True,
    help="auto is bf16 where the device computes in it.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
def train(
    data: str,
    output: Path,
    preset: str,
    minutes: float | None,
    steps: int | None,
    batch: int,
    lr: float,
    warmup: int,
    ema: float,
    seed: int,
    schedule: str,
    timesteps: int,
    beta_1: float | None,
    beta_t: float | None,
    beta: float | None,
    precision: str,
    device: str,
) -> None:
    """Train a U-Net by Algorithm 1 and write a run: config, metrics, samples, checkpoints.

    Example:  ddpm-edge train --data fashion-mnist --minutes 60 -o runs/fashion-mnist
    """
    from ddpm_edge.schedule import Schedule
    from ddpm_edge.train.data import load
    from ddpm_edge.train.run import record
    from ddpm_edge.train.trainer import TrainOptions
    from ddpm_edge.train.unet import UNetConfig

    options = TrainOptions(
        steps=steps,
        minutes=minutes,
        batch=batch,
        learning_rate=lr,
        warmup=warmup,
        ema=ema,
        seed=seed,
        precision=precision,
        device=device,
    )
    betas = {"beta_1": beta_1, "beta_T": beta_t, "beta": beta}
    given = {name: value for name, value in betas.items() if value is not None}
    forward = Schedule.from_dict({"rule": schedule, "T": timesteps} | given)
    images = load(data)
    config = UNetConfig.preset(preset, images.sample_shape, len(images.class_names))
    click.echo(
        f"{images.name}: {len(images.images)} images {images.sample_shape}, "
        f"{len(images.class_names) or 'no'} labels; preset {preset}; {forward}"
    )
    step, loss = None, None
    typed = command_line(*sys.argv[1:])
    training = record(output, images, config, forward, options, preset, typed)
    with Progress("train") as progress, contextlib.suppress(KeyboardInterrupt):
        for step in training:
            if step.step % 10 == 0:  # reading the loss waits for the device
                value = float(step.loss)
                loss = value if loss is None else 0.95 * loss + 0.05 * value
            rate = step.images / step.seconds
            seen = "" if loss is None else f"loss {loss:.4f}, "
            progress.update(step.fraction, f"step {step.step}, {seen}{rate:.0f} images/s")
    training.close()  # writes the checkpoint, if Ctrl-C came between two steps
    if step is None:
        raise click.ClickException("stopped before the first step; nothing was trained")
    state = "done" if step.fraction >= 1 else "stopped early"
    click.echo(
        f"{output}: {state} after {step.step} steps, {step.images} images, "
        f"{step.seconds / 60:.1f} min\n"
        f"Next: {command_line('export', output, '-o', f'{output.name}-bundle')}"
    )


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
            with atomic_write(output) as file:
                np.save(file, images)
        else:
            save_grid(images, output)

    return save


class Progress:
    """A bar on a terminal, a plain line every ten seconds elsewhere; on stderr."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.said = time.monotonic()

    def __enter__(self) -> Progress:
        self.bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
            self.bar = tqdm(total=1.0, desc=self.what, bar_format=layout, leave=False)
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, fraction: float, note: str) -> None:
        """Show that `fraction` (0..1) is done."""
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(fraction - self.bar.n)
        elif time.monotonic() - self.said >= PLAIN_PROGRESS_SECONDS:
            self.said = time.monotonic()
            click.echo(f"{self.what}: {100 * fraction:.0f} %, {note}", err=True)


if __name__ == "__main__":
    main()
