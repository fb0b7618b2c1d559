"""`ddpm-edge bench`: how fast a bundle runs on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ddpm_edge.bench import Report, choose
from ddpm_edge.bench import bench as measure
from ddpm_edge.bundle import Bundle
from ddpm_edge.cli.options import plan_options, runtime_options
from ddpm_edge.cli.output import Progress, next_sample


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option(
    "--batch",
    "batches",
    type=int,
    multiple=True,
    default=(1, 4),
    show_default=True,
    help="Images at once; repeat for several.",
)
@click.option(
    "--runs",
    type=int,
    default=5,
    show_default=True,
    help="Times the whole plan runs for each batch; medians are shown.",
)
@click.option(
    "--choose",
    "choosing",
    is_flag=True,
    help="Measure every variant on every runtime instead, at the first --batch, and remember the "
    "fastest runtimes for --runtime auto.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@plan_options
@runtime_options
def bench(
    bundle: Path | None,
    batches: tuple[int, ...],
    runs: int,
    choosing: bool,
    as_json: bool,
    plan: dict[str, Any],
    where: dict[str, Any],
) -> None:
    """Measure BUNDLE (default: the built-in Fashion-MNIST model) on this machine.

    Shows the time to load and to the first image (ms), and for each batch the time of a step (ms),
    steps and images a second, and what the loop around the network costs (us and % of a step).

    Example:  ddpm-edge bench --choose

    Example:  ddpm-edge bench --batch 1 --batch 16 --steps 50 --runs 3
    """
    if choosing:
        _choose(bundle, batches[0], runs, as_json, plan, where)
        return
    with Progress("bench") as progress:
        report = measure(
            bundle, batches=batches, runs=runs, progress=progress.update, **where, **plan
        )
    if as_json:
        click.echo(json.dumps(report.to_dict()))
        return
    click.echo(text(report))
    click.echo(next_sample(bundle, Bundle.open(bundle).manifest))


def _choose(
    bundle: Path | None,
    batch: int,
    runs: int,
    as_json: bool,
    plan: dict[str, Any],
    where: dict[str, Any],
) -> None:
    """`bench --choose`."""
    chosen = [name for name in ("runtime", "variant") if where[name] not in ("auto", None)]
    if chosen or where["build"] != "never":
        raise click.UsageError(
            f"--choose measures all of them; leave --{(chosen or ['build'])[0]} out"
        )
    del where["runtime"], where["variant"]
    with Progress("bench") as progress:
        found = choose(bundle, batch=batch, runs=runs, progress=progress.update, **where, **plan)
    able = [candidate for candidate in found if candidate.report]  # the fastest first
    fastest = {c.variant: c.runtime for c in reversed(able)}
    if as_json:
        candidates = [candidate.to_dict() for candidate in found]
        click.echo(json.dumps({"candidates": candidates, "fastest": fastest}))
        return
    click.echo(f"{'variant':8} {'runtime':12} {'ms a step':>9} {'images/s':>9}")
    for c in found:
        if c.report is None:
            click.echo(f"{c.variant:8} {c.runtime:12} {'-':>9} {'-':>9}  {c.reason}")
        else:
            rate = c.report.batches[0].images_a_second
            click.echo(f"{c.variant:8} {c.runtime:12} {c.ms_a_step:9.2f} {rate:9.2f}")
    for variant in dict.fromkeys(c.variant for c in able):
        click.echo(f"{variant}: --runtime auto takes {fastest[variant]}")
    best = found[0]
    if best.variant != "fp32":
        click.echo(f"Next: --variant {best.variant}, the fastest; without it fp32 runs")


def text(report: Report) -> str:
    """What was measured, for people."""
    memory = report.peak_memory_mb
    rows = {
        "bundle": f"{report.name} ({report.path})",
        "plan": report.plan,
        "variant": report.variant,
        "runs on": f"{report.runtime}, the loop on the {report.loop}, {report.cpus} CPUs",
        "load": f"{report.load_ms:.0f} ms",
        "first image": f"{report.first_image_ms:.0f} ms from the start of load",
        "peak memory": f"{memory:.0f} MB resident, the process's peak so far" if memory else "?",
    }
    head = ("batch", "ms a step", "fastest", "slowest", "steps/s", "images/s", "loop us", "loop %")
    lines = [f"{name:<12} {value}" for name, value in rows.items()]
    lines += [f"Medians of {report.runs} runs; loop = the time of a step outside the network:"]
    lines += [" ".join(f"{name:>9}" for name in head)]
    for b in report.batches:
        ms = f"{b.ms_a_step:9.2f} {b.ms_a_step_min:9.2f} {b.ms_a_step_max:9.2f}"
        rates = f"{b.steps_a_second:9.1f} {b.images_a_second:9.2f}"
        lines.append(f"{b.batch:9d} {ms} {rates} {b.loop_us:9.0f} {b.loop_percent:9.1f}")
    return "\n".join(lines)
