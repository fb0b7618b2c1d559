"""`ddpm-edge doctor`: what works on this machine, and the remedy of what does not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from ddpm_edge.cli.options import cache_option
from ddpm_edge.cli.output import command_line
from ddpm_edge.doctor import Finding, examine
from ddpm_edge.runtimes.flavour import TITLES

MARKS = {"ok": "v", "info": "i", "warning": "!", "fault": "x"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@cache_option
def doctor(as_json: bool, cache_dir: Path | None) -> None:
    """Look at this machine: what works, what is wrong and what to do about it. Takes seconds.

    Each line is -[v] works, -[i] worth knowing, -[!] a warning or -[x] a fault: installed or asked
    for, and it does not work. Below it stands the remedy, mostly a command to type. Nothing is
    changed. Exits with 1 if there is a fault.

    Example:  ddpm-edge doctor --json
    """
    findings = list(examine(cache_dir) if as_json else _shown(examine(cache_dir)))
    faults = sum(finding.status == "fault" for finding in findings)
    if as_json:
        rows = [finding._asdict() for finding in findings]
        click.echo(json.dumps({"ok": not faults, "findings": rows}))
    else:
        click.echo(_next(findings, faults))
    if faults:
        click.get_current_context().exit(1)


def _shown(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Print each finding as it comes."""
    for finding in findings:
        click.echo(f"-[{MARKS[finding.status]}] {finding.text}")
        if finding.remedy:
            click.echo(f"     {finding.remedy}")
        yield finding


def _next(findings: Iterable[Finding], faults: int) -> str:
    if faults:
        return f"Next: the remedies of {faults} -[x], then {command_line('doctor')}"
    ready = any(f.what in TITLES and f.status == "ok" for f in findings)
    built = any(f.what == "auto" and "tensorrt" in f.text for f in findings)
    words = ("build",) if ready and not built else ("sample", "-n", 16, "-o", "samples.png")
    return f"Next: {command_line(*words)}"
