"""`ddpm-edge info`: what a bundle holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ddpm_edge import Bundle
from ddpm_edge.cli.options import plan_options
from ddpm_edge.reference import Comparison


@click.command()
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
    """Check the files of BUNDLE (default: the built-in model) and show what it holds.

    Loads no runtime; `verify` also proves that it computes here what it should.

    Example:  ddpm-edge info --plan --sampler ddim --steps 10
    """
    opened = Bundle.open(bundle)
    opened.check()
    manifest = opened.manifest
    if as_json:
        document = manifest.to_dict() | {"files": opened.files, "digest": opened.digest}
        click.echo(json.dumps(document, indent=2))
        return
    chosen = manifest.make_plan(**plan)
    if show_plan:
        click.echo(chosen.table())
        return
    channels, height, width = manifest.sample_shape
    size = sum(entry["size"] for entry in opened.files.values())
    null = "none: every image needs a label" if manifest.null_label is None else manifest.null_label
    rows = {
        "bundle": opened.path,
        "name": manifest.name,
        "images": f"{height} x {width}, {channels} channel{'s' if channels > 1 else ''}",
        "labels": ", ".join(manifest.class_names) or "none",
        **({"null label": null} if manifest.class_names else {}),
        "schedule": manifest.schedule,
        "prediction": manifest.prediction,
        "variants": ", ".join(manifest.variants),
        "plan": chosen.name,
        "size": f"{size / 1e6:.1f} MB in {len(opened.files)} files",
        "licence": manifest.licence or "not stated",
        "digest": opened.digest,
    }
    if manifest.tuned is not None:
        front = ", ".join(f"{p.evaluations}: {p.value:.3g}" for p in manifest.tuned.front())
        rows["tuned"] = f"{manifest.tuned.figure} by evaluations, {front}"
    rows |= {f"trained: {key}": value for key, value in manifest.training.items()}
    for variant, entry in manifest.variants.items():
        for what, figure in entry.get("parity", {}).items():
            rows[f"{variant}: {what}"] = Comparison.of_figure(what, figure).figures
        if entry.get("kept_in_fp32"):
            rows[f"{variant}: also in fp32"] = ", ".join(entry["kept_in_fp32"])
        for line in entry.get("ladder", []):
            rows[f"{variant}: because"] = line
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        text = " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value
        click.echo(f"{name:<{width}}  {text}")
