"""`ddpm-edge cache`: what was built and measured on this device."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ddpm_edge import latency
from ddpm_edge.cli.options import cache_option
from ddpm_edge.runtimes import choice
from ddpm_edge.runtimes.engine_cache import EngineCache, cache_directory


@click.group()
def cache() -> None:
    """List or remove the engines that were built on this device, and what was measured here.

    Example:  ddpm-edge cache list
    """


@cache.command("list")
@cache_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def list_(cache_dir: Path | None, as_json: bool) -> None:
    """List the engines in the cache, the newest last, and what was measured.

    Example:  ddpm-edge cache list --json
    """
    directory = cache_directory(cache_dir)
    entries, measured = EngineCache(directory).entries(), choice.listed(directory)
    latencies = list(latency.measured_in(directory).listed())
    if as_json:
        rows = [
            entry.key.to_dict()
            | {"file": str(entry.path), "size": entry.size, "built": entry.built}
            for entry in entries
        ]
        fastest = [dict(zip(("model", "device", "runtime"), r, strict=True)) for r in measured]
        document = {"directory": str(directory), "engines": rows, "fastest": fastest} | {
            "latencies": [{"model": m, "engine": engine} | r for m, engine, r in latencies]
        }
        click.echo(json.dumps(document))
        return
    for entry in entries:
        key = entry.key
        least, best, most = key.profile
        click.echo(
            f"{entry.path.name}  {entry.size / 1e6:.1f} MB  {entry.built}  model {key.model[:12]} "
            f"{key.variant}  {key.flavour} {key.version}  {key.device} ({key.compute_capability})  "
            f"batch {least} to {most}, best {best}"
        )
    for model, device, runtime in measured:
        click.echo(f"model {model[:12]}, device {device}: {runtime} is the fastest")
    for model, engine, record in latencies:
        click.echo(f"model {model[:12]}, {engine}: {record.get('step_ms')} ms a step")
    total = sum(entry.size for entry in entries)
    click.echo(f"{_engines(len(entries))}, {total / 1e6:.1f} MB in {directory}")


@cache.command()
@cache_option
def clear(cache_dir: Path | None) -> None:
    """Remove the engines, and what was measured, and nothing else.

    Example:  ddpm-edge cache clear
    """
    directory = cache_directory(cache_dir)
    engines, size = EngineCache(directory).clear()
    choice.forget(directory)
    latency.measured_in(directory).forget()
    click.echo(f"{_engines(engines)}, {size / 1e6:.1f} MB removed from {directory}")


def _engines(count: int) -> str:
    return f"{count} engine{'s' * (count != 1)}"
