"""`ddpm-edge train`: a run from data."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ddpm_edge.cli.options import given_options, schedule_options
from ddpm_edge.cli.output import Progress, command_line
from ddpm_edge.errors import ConfigError
from ddpm_edge.plan import PREDICTIONS
from ddpm_edge.schedule import Schedule

RESUME_OPTIONS = {"output", "resume", "data", "steps", "minutes", "device"}


@click.command()
@click.option(
    "--data",
    help="A folder of images, an .npz or .npy of uint8 images, a folder of IDX files, or "
    "'fashion-mnist'.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Directory of the run: new, or with --resume the one to go on with.",
)
@click.option("--size", help="Pixels to bring every image to: 64, or 48x64 (height x width).")
@click.option(
    "--fit",
    type=click.Choice(["crop", "pad", "resize"]),
    default="crop",
    show_default=True,
    help="How --size does it: cut the edges, add edges, or stretch.",
)
@click.option(
    "--labels",
    type=click.Choice(["auto", "folders", "none"]),
    default="auto",
    show_default=True,
    help="Where labels come from: auto takes those that the data have.",
)
@click.option("--flip", is_flag=True, help="Mirror half of the images, anew at each step.")
@click.option(
    "--val",
    type=float,
    default=0.0,
    show_default=True,
    help="Share of the images to hold out and measure the loss on, such as 0.1.",
)
@click.option(
    "--preset",
    type=click.Choice(["tiny", "small", "cifar10"]),
    default="small",
    show_default=True,
    help="Size of the U-Net.",
)
@click.option("--model", help="A network of your own instead: package.module:function.")
@click.option(
    "--init-from",
    type=click.Path(path_type=Path),
    help="A run or a .safetensors file whose weights to begin with, where they fit.",
)
@click.option("--resume", is_flag=True, help="Go on with the run in -o, exactly where it stopped.")
@click.option("--minutes", type=float, help="Train this long, altogether.")
@click.option("--steps", type=int, help="Train this many optimiser steps, altogether.")
@click.option(
    "--batch", type=int, default=128, show_default=True, help="Images a step and process."
)
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Peak learning rate.")
@click.option(
    "--warmup", type=int, default=500, show_default=True, help="Steps up to the peak, at most 5 %."
)
@click.option("--ema", type=float, default=0.9995, show_default=True, help="Decay of the average.")
@click.option(
    "--prediction",
    type=click.Choice(PREDICTIONS),
    default="eps",
    show_default=True,
    help="What the network learns to answer.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything random.")
@schedule_options
@click.option(
    "--precision",
    type=click.Choice(["auto", "bf16", "fp32"]),
    default="auto",
    show_default=True,
    help="auto is bf16 where the device computes in it.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.pass_context
def train(ctx: click.Context, /, output: Path, resume: bool, forward: Schedule, **o: Any) -> None:
    """Train a U-Net by Algorithm 1 and write a run: config, metrics, samples, checkpoints.

    Several processes, GPUs or machines:  accelerate launch -m ddpm_edge train ...

    Example:  ddpm-edge train --data my-images --size 64 --minutes 60 -o runs/mine
    """
    first = os.environ.get("RANK", "0") == "0"
    if not first:  # of several processes one speaks
        ctx.with_resource(contextlib.redirect_stdout(io.StringIO()))
    from ddpm_edge.train.checkpoint import checkpoint_path

    given = given_options(ctx)
    training = _resumed(output, given, o) if resume else _new(output, forward, o)
    step, loss = None, None
    with Progress("train", first) as progress, _stops(first) as stop:
        for step in training:
            if step.step % 10 == 0:  # reading the loss waits for the device
                value = float(step.loss)
                loss = value if loss is None else 0.95 * loss + 0.05 * value
            rate = step.images / step.seconds
            seen = "" if loss is None else f"loss {loss:.4f}, "
            progress.update(step.fraction, f"step {step.step}, {seen}{rate:.0f} images/s")
            if stop:
                break
    training.close()  # writes the checkpoint
    if step is None:
        raise click.ClickException("stopped before the first step; nothing was trained")
    if first and not checkpoint_path(output).is_file():
        raise click.ClickException(
            "the weights are not finite, nothing was kept; give a lower --lr, or --precision fp32"
        )
    done = step.fraction >= 1
    click.echo(
        f"{output}: {'done' if done else 'stopped early'} after {step.step} steps, "
        f"{step.images} images, {step.seconds / 60:.1f} min\n"
        f"Next: {command_line('export', output, '-o', f'{output.name}-bundle')}"
    )
    if not done:
        click.echo(f"      {command_line('train', '-o', output, '--resume')}")


@contextlib.contextmanager
def _stops(first: bool) -> Iterator[list[int]]:
    """A list that Ctrl-C and `kill` fill, so that training ends between two steps, exactly.

    A second signal does what it always does. Of several processes only the first, which keeps the
    files, stops: were another to stop a step before, it would wait for that one for ever.
    """
    received: list[int] = []
    usual: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, _: object) -> None:
        if first:
            received.append(number)
        signal.signal(number, usual[number])

    for number in usual:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def _new(output: Path, forward: Schedule, o: dict[str, Any]) -> Any:
    """A new run, as it was asked for."""
    from ddpm_edge.data import Source, parse_size
    from ddpm_edge.train.run import record
    from ddpm_edge.train.trainer import TrainOptions
    from ddpm_edge.train.unet import UNetConfig

    if o["data"] is None:
        raise ConfigError("no data: give --data, or --resume to go on with the run in -o")
    options = TrainOptions(
        steps=o["steps"],
        minutes=o["minutes"],
        batch=o["batch"],
        learning_rate=o["lr"],
        warmup=o["warmup"],
        ema=o["ema"],
        prediction=o["prediction"],
        flip=o["flip"],
        seed=o["seed"],
        precision=o["precision"],
        device=o["device"],
    )
    source = Source(
        data=o["data"],
        size=None if o["size"] is None else parse_size(o["size"]),
        fit=o["fit"],
        labels=o["labels"],
        validation=o["val"],
        seed=o["seed"],
    )
    images, held_out = _read(source)
    network: UNetConfig | str = o["model"] or UNetConfig.preset(
        o["preset"], images.sample_shape, len(images.class_names)
    )
    if o["init_from"] is not None:  # which of its weights fit is said in the log
        logging.getLogger("ddpm_edge").setLevel(logging.INFO)
    click.echo(f"{o['model'] or 'preset ' + o['preset']}, {o['prediction']}; {forward}")
    return record(
        output,
        images,
        network,
        forward,
        options,
        validation=held_out,
        init_from=o["init_from"],
        preset="" if o["model"] else o["preset"],
        source=source.to_dict(),
        command=command_line(*sys.argv[1:]),
    )


def _resumed(output: Path, given: dict[str, str], o: dict[str, Any]) -> Any:
    """The run in `output`, going on."""
    from ddpm_edge.data import Source
    from ddpm_edge.train.run import read_config, resume

    fixed = [flag for name, flag in given.items() if name not in RESUME_OPTIONS]
    if fixed:
        raise ConfigError(
            f"{', '.join(fixed)} cannot change in a resumed run: {output / 'config.json'} has "
            f"them; leave them out, or start a new run with --init-from {output}"
        )
    config = read_config(output)
    source = config["source"] or {}
    if o["data"] is not None:
        source = {**source, "data": o["data"]}
    if "data" not in source:
        raise ConfigError(f"{output} does not say where its data were; give --data")
    images, held_out = _read(Source.from_dict(source))
    return resume(
        output,
        images,
        validation=held_out,
        steps=o["steps"],
        minutes=o["minutes"],
        device=o["device"] if "device" in given else None,
    )


def _read(source: Any) -> Any:
    """The images of a source, training and held out, said in a line."""
    with Progress("read") as progress:
        images, held_out = source.read(progress.update)
    channels, height, width = images.sample_shape
    parts = [
        f"{images.name}: {len(images.images)} images {height} x {width}",
        f"{channels} channel{'s' if channels > 1 else ''}",
        f"{len(images.class_names) or 'no'} labels",
    ]
    if held_out is not None:
        parts.append(f"{len(held_out.images)} more held out")
    click.echo(", ".join(parts))
    return images, held_out
