"""`ddpm-edge export`: a torch network as a bundle."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from ddpm_edge.cli.options import plan_options
from ddpm_edge.cli.output import command_line, parity_text


@click.command()
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
