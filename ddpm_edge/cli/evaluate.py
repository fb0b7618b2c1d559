"""`ddpm-edge evaluate`: how good a bundle is, in figures with errors."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddpm_edge import Generator
from ddpm_edge.cli.options import judging_options, plan_options, runtime_options
from ddpm_edge.cli.output import Progress
from ddpm_edge.errors import ConfigError
from ddpm_edge.files import check_writable

if TYPE_CHECKING:
    from ddpm_edge.data import Dataset
    from ddpm_edge.features import FeatureNetwork


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@judging_options
@click.option(
    "--likelihood",
    "likelihood_images",
    type=int,
    default=100,
    show_default=True,
    help="Number of images to find bits/dim of; 0 = none.",
)
@click.option(
    "--timesteps",
    type=int,
    default=50,
    show_default=True,
    help="Timesteps of the bound, for each of them; 0 = all T, exactly.",
)
@click.option(
    "--compare",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="report.json of another evaluation with the same data, to stand beside this one.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory for report.json and report.html.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the JSON instead of a table.")
@plan_options
@runtime_options
def evaluate(
    bundle: Path | None,
    real: dict[str, Any],
    count: int,
    seed: int,
    guidance: float | None,
    likelihood_images: int,
    timesteps: int,
    compare: Path | None,
    output: Path | None,
    as_json: bool,
    plan: dict[str, Any],
    where: dict[str, Any],
) -> None:
    """Measure how good BUNDLE (default: the built-in model) is, against real images.

    Frechet and kernel distance, precision and recall, classes, nearness to training images and
    bits/dim, each with its standard error, a floor (training images) and a ceiling (noise).

    Example:  ddpm-edge evaluate my-bundle --data my-images -n 1000 -o report
    """
    from ddpm_edge import evaluate as evaluation
    from ddpm_edge import report

    if output is not None:
        check_writable(output)
    earlier = None if compare is None else evaluation.read_report(compare.read_bytes())
    train, test = real_images(real)
    with contextlib.ExitStack() as stack:
        generator = stack.enter_context(Generator.load(bundle, **where))
        network = feature_network(real["features"], test)
        if network is not None:
            stack.enter_context(network)
        progress = stack.enter_context(Progress("evaluate", speak=not as_json))
        found = evaluation.evaluate(
            generator, test, train, n=count, seed=seed, features=network, guidance=guidance,
            likelihood_images=likelihood_images, timesteps=timesteps or None, beside=earlier,
            progress=progress.update, **plan,
        )  # fmt: skip
    compared = [] if earlier is None else evaluation.compare(earlier, found.to_dict())
    if output is not None:
        report.write_report(found, output, compared, str(compare))
    if as_json:
        also = {"compared": report.compared_json(compared)} if compared else {}
        click.echo(json.dumps(found.to_dict() | also))
        return
    settings = found.settings
    click.echo(
        f"{settings['model']}, {settings['plan']}, {settings['variant']}, {settings['runtime']}\n"
        f"{count} samples, seed {seed}, against {settings['data']}: {found.seconds:.0f} s\n"
    )
    click.echo(report.text_table(report.COLUMNS, report.rows(found)))
    if network is None:
        click.echo("\nNo feature model: give --features for distances, precision and recall")
    if compared:
        click.echo(f"\na: {compare}; b: this")
        click.echo(report.text_table(report.COMPARED, report.compared_rows(compared)))
    if output is None:
        click.echo("\nNext: give -o DIRECTORY to keep report.json and report.html")
        return
    click.echo(f"\n{output}: report.json, report.html")
    click.echo(f"Next: the same with another --steps and --compare {output / 'report.json'}")


def real_images(real: dict[str, Any]) -> tuple[Dataset, Dataset]:
    """The images for training and for testing, by `judging_options`."""
    from ddpm_edge.data import has_test_images, load, parse_size, split

    data, size, share = (real[name] for name in ("data", "size", "share"))
    size = None if size is None else parse_size(size)
    train = load(data, size=size)
    if has_test_images(data):
        return train, load(data, "test", size=size)
    if share is None:
        raise ConfigError(
            f"{data} has no test images of its own; give --val (and --split-seed) as train had it: "
            "a model is better on the images that it was trained with"
        )
    return split(train, share, real["split_seed"])


def feature_network(features: Path | None, images: Dataset) -> FeatureNetwork | None:
    """The model given, or the built-in one where it knows the images, or None; to be closed."""
    from ddpm_edge.data import FASHION_MNIST_CLASSES
    from ddpm_edge.features import FeatureNetwork

    if features is not None:
        return FeatureNetwork(features)
    if images.class_names == FASHION_MNIST_CLASSES and images.sample_shape == (1, 28, 28):
        return FeatureNetwork.fashion_mnist()
    return None
