"""`ddpm-edge train`: a run from data."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import click

from ddpm_edge.cli.output import Progress, command_line


@click.command()
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
