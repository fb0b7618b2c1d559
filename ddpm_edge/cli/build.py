"""`ddpm-edge build`: the TensorRT engine of a bundle, on the device it will run on."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ddpm_edge.build import BuildOptions, BuildReport
from ddpm_edge.build import build as build_bundle
from ddpm_edge.cli.options import cache_option
from ddpm_edge.cli.output import Progress, command_line

DEFAULTS: dict[str, Any] = asdict(BuildOptions())


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--variant", help="Precision of the network.  [default: fp32]")
@click.option("--device", help="cuda or cuda:N.  [default: the first GPU]")
@click.option(
    "--max-batch",
    type=int,
    default=BuildOptions.max_batch,
    show_default=True,
    help="The most images in one evaluation. The network's batch is twice that where guidance can "
    "ask twice.",
)
@click.option(
    "--best-batch",
    type=int,
    default=BuildOptions.best_batch,
    show_default=True,
    help="The network's batch that the engine is fastest for.",
)
@click.option(
    "--workspace-mb",
    type=int,
    help="MiB that a layer may use besides its tensors.  [default: all there is]",
)
@click.option(
    "--optimization-level",
    type=int,
    default=BuildOptions.optimization_level,
    show_default=True,
    help="0 (a quick build) to 5 (a quick engine).",
)
@cache_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write the engine to this file as well, for trtexec or Triton.",
)
@click.option("--rebuild", is_flag=True, help="Build even if the engine is there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def build(bundle: Path | None, as_json: bool, **given: Any) -> None:
    """Build the TensorRT engine of BUNDLE (default: the built-in model) for this device.

    Takes seconds on a desktop and minutes on a Jetson, once: the engine is kept in the cache of
    this device and found by `--runtime tensorrt`, or by `auto`. Ctrl-C cancels.

    Example:  ddpm-edge build my-bundle --variant fp16 --max-batch 4
    """
    report = build_here(bundle, **given)
    if as_json:
        click.echo(json.dumps(facts(report)))
        return
    show(report, bundle)


def build_here(
    bundle: Path | None,
    max_batch: int,
    best_batch: int,
    workspace_mb: int | None,
    optimization_level: int,
    **where: Any,
) -> BuildReport:
    """Build as the options say, with a progress bar."""
    options = BuildOptions(max_batch, best_batch, workspace_mb, optimization_level)
    with Progress("build") as progress:
        return build_bundle(bundle, options=options, progress=progress.update, **where)


def show(report: BuildReport, bundle: Path | None) -> None:
    """Say what was built and what to do next."""
    built = report.built
    size = f"{len(built.engine) / 1e6:.1f} MB"
    how = "already there" if built.cached else f"built in {report.seconds:.0f} s ({built.reason})"
    click.echo(
        f"{report.variant} engine for {report.gpu} by {report.flavour}: {how}\n"
        f"batch {report.profile}; {size} in {built.path or 'no file: it was not kept'}"
    )
    words = [*([bundle] if bundle else []), "--runtime", "tensorrt", "--variant", report.variant]
    click.echo(
        f"Next: {command_line('verify', *words)}\n"
        f"      {command_line('sample', *words, '-n', 16, '-o', 'samples.png')}"
    )


def facts(report: BuildReport) -> dict[str, Any]:
    """The report for a program."""
    built = report.built
    return {
        "engine": str(built.path) if built.path else None,
        "bytes": len(built.engine),
        "cached": built.cached,
        "reason": built.reason,
        "variant": report.variant,
        "flavour": str(report.flavour),
        "device": report.gpu.device,
        "gpu": report.gpu.name,
        "profile": list(report.profile),
        "seconds": round(report.seconds, 3),
    }
