"""The command line: a thin caller of the public Python surface, one file a command."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import click

from ddpm_edge import __version__
from ddpm_edge.cli.bench import bench
from ddpm_edge.cli.build import build
from ddpm_edge.cli.cache import cache
from ddpm_edge.cli.doctor import doctor
from ddpm_edge.cli.evaluate import evaluate
from ddpm_edge.cli.export import export
from ddpm_edge.cli.info import info
from ddpm_edge.cli.restore import inpaint, upscale, vary
from ddpm_edge.cli.sample import sample
from ddpm_edge.cli.train import train
from ddpm_edge.cli.tune import tune
from ddpm_edge.cli.verify import verify
from ddpm_edge.errors import ConfigError, DdpmEdgeError


class Commands(click.Group):
    """Turns the package's errors into messages and exit codes: 1 the work failed, 2 wrong use."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was typed."""
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            raise click.UsageError(str(error)) from error
        except BrokenPipeError:  # of `| head`; click ends without a word
            raise
        except (DdpmEdgeError, OSError, MemoryError) as error:
            raise click.ClickException(str(error) or "not enough memory") from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ddpm-edge")
@click.option("-v", "--verbose", is_flag=True, help="Log what the library does to stderr.")
def main(verbose: bool) -> None:
    """Train a DDPM in PyTorch, export it, and sample it on the device without PyTorch.

    Try it with the built-in model:  ddpm-edge sample -n 16 -o garments.png
    """
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("ddpm_edge").setLevel(logging.INFO if verbose else logging.WARNING)
    warnings.showwarning = lambda message, *_, **__: click.echo(f"Warning: {message}", err=True)


for command in (
    train, export, sample, inpaint, upscale, vary, info, verify, evaluate, tune, bench, build,
    cache, doctor,
):  # fmt: skip
    main.add_command(command)
