"""`ddpm-edge verify`: proof that a bundle computes here what torch computed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from ddpm_edge import Bundle, Generator
from ddpm_edge.cli.options import runtime_options
from ddpm_edge.cli.output import next_sample, show_comparison


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@runtime_options
def verify(bundle: Path | None, as_json: bool, where: dict[str, Any]) -> None:
    """Check that BUNDLE (default: the built-in model) computes here what torch computed.

    Checks every file against its SHA-256, then recomputes on this runtime the answers and images
    that torch gave when the model was exported. Exits with 1 if a figure is outside its tolerance.

    Example:  ddpm-edge verify fashion-mnist-bundle --runtime onnxruntime --device cpu
    """
    start = time.perf_counter()
    opened = Bundle.open(bundle)
    opened.check()
    with Generator.load(bundle, **where) as generator:
        if not as_json:
            size = sum(entry["size"] for entry in opened.files.values())
            click.echo(
                f"-[v] {len(opened.files)} files, {size / 1e6:.1f} MB: SHA-256 as listed\n"
                f"{generator.variant} by {generator.runtime}, against torch:"
            )
        comparisons = []
        for comparison in generator.verify():
            comparisons.append(comparison)
            if not as_json:
                show_comparison(comparison)
        passed = all(comparison.passed for comparison in comparisons)
        if as_json:
            report = {
                "bundle": str(opened.path),
                "digest": opened.digest,
                "runtime": generator.runtime,
                "variant": generator.variant,
                "passed": passed,
                "comparisons": [{"what": c.what, **c.figure()} for c in comparisons],
            }
            click.echo(json.dumps(report))
    if not passed:
        raise click.ClickException(
            f"{opened.path} does not compute here what torch computed; try another --runtime, "
            "--device or --variant, or export the model again"
        )
    if not as_json:
        click.echo(
            f"{opened.path}: verified in {time.perf_counter() - start:.1f} s\n"
            f"{next_sample(bundle, opened.manifest)}"
        )
