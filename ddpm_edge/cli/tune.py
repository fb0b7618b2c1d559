"""`ddpm-edge tune`: how good fewer steps are, for `--budget-ms`."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import click

from ddpm_edge import Generator
from ddpm_edge.cli.evaluate import feature_network, real_images
from ddpm_edge.cli.options import judging_options, runtime_options
from ddpm_edge.cli.output import Progress, command_line
from ddpm_edge.errors import ConfigError
from ddpm_edge.files import check_writable, write_bytes

COLUMNS = ("plan", "evaluations", "Frechet distance", "standard error", "ms an image here", "")


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@judging_options
@click.option(
    "--sampler", "samplers", multiple=True, help="Repeat for several.  [default: BUNDLE's]"
)
@click.option("--steps", multiple=True, type=int, help="Repeat for several.  [default: 1 to 50]")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="The new bundle: BUNDLE with what was measured.",
)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="PNG of quality against time."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@runtime_options
def tune(
    bundle: Path | None,
    real: dict[str, Any],
    count: int,
    seed: int,
    guidance: float | None,
    samplers: tuple[str, ...],
    steps: tuple[int, ...],
    output: Path,
    plot: Path | None,
    as_json: bool,
    where: dict[str, Any],
) -> None:
    """Measure how good BUNDLE (default: the built-in model) is in how many steps.

    With the Frechet distance of each plan in the new bundle, and how long a step takes on each
    device, which is measured there, `sample --budget-ms` takes the best plan that fits.

    Example:  ddpm-edge tune my-bundle --data my-images --val 0.1 -o tuned --plot tuned.png
    """
    from ddpm_edge import tune as tuning
    from ddpm_edge.bundle import check_target
    from ddpm_edge.report import number, text_table

    check_target(output)
    if plot is not None:
        tuning.plotting()
        check_writable(plot.parent)
    _, test = real_images(real)
    with contextlib.ExitStack() as stack:
        generator = stack.enter_context(Generator.load(bundle, **where))
        network = feature_network(real["features"], test)
        if network is None:
            raise ConfigError(
                "a feature model tells how good samples are, and the built-in one knows "
                "Fashion-MNIST alone: give --features, the ONNX file of one for such images"
            )
        stack.enter_context(network)
        plans = tuning.grid(generator.bundle.manifest, samplers, steps)
        with Progress("tune", speak=not as_json) as progress:
            tuned = tuning.tune(
                generator, test, network, plans, n=count, seed=seed, guidance=guidance,
                progress=progress.update,
            )  # fmt: skip
        tuning.write_tuned(generator.bundle, tuned, output)
        guided = guidance not in (None, 1.0)
        latency = generator.latency(2 if guided else 1)
        runtime, name = generator.runtime, generator.bundle.manifest.name
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(plot, tuning.front_png(tuned, latency, f"{name}, {runtime}"))
    if as_json:
        click.echo(json.dumps(tuned.to_dict() | {"latency": latency._asdict()}))
        return
    front = tuned.front()
    body = [
        [
            generator.plan(**plan.plan).name,
            str(plan.evaluations),
            number(plan.value),
            number(plan.standard_error),
            number(latency.of(plan.evaluations)),
            "best for its time" if plan in front else "",
        ]
        for plan in tuned.plans
    ]
    click.echo(text_table(COLUMNS, body))
    click.echo(f"{output}: {len(body)} plans, {count} samples each, seed {seed}; {runtime}")
    budget = math.ceil(1.1 * latency.of(front[len(front) // 2].evaluations))
    given = [(f"--{name.replace('_', '-')}", value) for name, value in where.items()]
    same = [word for pair in given if pair[1] not in (None, "auto", "never") for word in pair]
    same += ["--label", 0, "--guidance", f"{guidance:g}"] if guided else []
    words = ["sample", output, "-n", 1, "--budget-ms", budget, *same, "-o", "sample.png"]
    click.echo(f"Next: {command_line(*words)}")
