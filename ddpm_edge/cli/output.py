"""What commands print: progress, figures, lines to copy."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any

import click

from ddpm_edge.manifest import Manifest
from ddpm_edge.reference import Comparison

PLAIN_PROGRESS_SECONDS = 10.0


def command_line(*words: object) -> str:
    """A command line to copy, quoted where the shell needs it."""
    return shlex.join(["ddpm-edge", *(str(word) for word in words)])


def next_sample(bundle: Path | None, manifest: Manifest) -> str:
    """The `sample` command that this bundle (None = the built-in one) can be tried with."""
    words: list[object] = [bundle] if bundle else []
    if manifest.class_names and manifest.null_label is None:
        words += ["--label", manifest.class_names[0]]
    return f"Next: {command_line('sample', *words, '-n', 16, '-o', 'samples.png')}"


def show_comparison(comparison: Comparison) -> None:
    """Print a figure beside its tolerance, and whether it is within."""
    click.echo(f"-[{'v' if comparison.passed else 'x'}] {comparison}")


class Progress:
    """A bar on a terminal, a plain line every ten seconds elsewhere; on stderr."""

    def __init__(self, what: str, speak: bool = True) -> None:
        self.what, self.speak = what, speak
        self.said = time.monotonic()

    def __enter__(self) -> Progress:
        self.bar: Any = None
        if self.speak and sys.stderr.isatty():
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
        elif self.speak and time.monotonic() - self.said >= PLAIN_PROGRESS_SECONDS:
            self.said = time.monotonic()
            click.echo(f"{self.what}: {100 * fraction:.0f} %, {note}", err=True)
