"""`ddpm-edge export`: a torch network as a bundle."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import click

from ddpm_edge.bundle import BUILT_IN, Bundle
from ddpm_edge.cli.options import cache_option, given_options, plan_options, schedule_options
from ddpm_edge.cli.output import command_line, next_sample, show_comparison
from ddpm_edge.errors import ConfigError, RuntimeUnavailableError
from ddpm_edge.export import GATES, VARIANTS
from ddpm_edge.export.from_diffusers import SCHEDULER, Imported, is_diffusers, read_diffusers
from ddpm_edge.export.pipeline import check_choices
from ddpm_edge.manifest import MANIFEST
from ddpm_edge.plan import PREDICTIONS
from ddpm_edge.schedule import Schedule

SCHEDULE_OPTIONS = {"rule", "timesteps", "beta_1", "beta_t", "beta"}
MODEL_OPTIONS = SCHEDULE_OPTIONS | {
    "weights", "shape", "classes", "prediction", "timestep_offset",
}  # fmt: skip
FORMATS = ("onnx", "tensorrt", "triton")
BUNDLE_OPTIONS = {"run", "output", "gate", "variants", "format_", "cache_dir"}
TRITON_OPTIONS = {"run", "output", "name", "variants", "format_", "engine", "max_batch"}
DIFFUSERS_OPTIONS = MODEL_OPTIONS - {"weights", "timestep_offset"}


@click.command()
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Directory to write; a bundle that is there is replaced.",
)
@click.option("--name", help="Name of the model.  [default: the data's, or the directory's]")
@click.option("--licence", default="", help="SPDX name of the weights' licence.")
@click.option(
    "--gate",
    type=click.Choice(GATES),
    default="quick",
    show_default=True,
    help="full compares all T steps of Algorithm 2 with torch, not the last 50, and half "
    "precision by a Frechet distance too (int8 always is), which takes minutes.",
)
@click.option(
    "--variants",
    default="fp32",
    show_default=True,
    help=f"Precisions, separated by commas, of {', '.join(VARIANTS)}. Each passes a gate of its "
    "own or gives way to a higher one.",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(FORMATS),
    default="onnx",
    show_default=True,
    help="tensorrt: also build the engines, for the GPU of this machine. triton: write the bundle "
    "RUN into a model repository of NVIDIA Triton.",
)
@click.option(
    "--engine",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="triton: an engine that `ddpm-edge build -o` wrote, in the place of the ONNX file.",
)
@click.option(
    "--max-batch", type=int, help="triton: most images of an evaluation.  [default: as for build]"
)
@cache_option
@plan_options
@click.option("--model", help="Instead of RUN, a network of your own: package.module:function.")
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="--model: its .safetensors file.  [default: as the function returns it]",
)
@click.option("--shape", help="--model, diffusers: CxHxW of one sample, such as 3x32x32.")
@click.option("--classes", help="--model, diffusers: names of its labels, separated by commas.")
@click.option(
    "--prediction",
    type=click.Choice(PREDICTIONS),
    default="eps",
    show_default=True,
    help="--model, a bare UNet2DModel: what it answers.",
)
@click.option(
    "--timestep-offset",
    type=int,
    default=-1,
    show_default=True,
    help="--model: it is fed t + offset, t in 1..T.",
)
@schedule_options
@click.pass_context
def export(
    ctx: click.Context, /, run: Path | None, output: Path, model: str | None, **o: Any
) -> None:
    """Export the averaged weights of the training run RUN as a bundle, if they pass the gate.

    RUN may also be a folder that diffusers saved: a pipeline of a UNet2DModel and a scheduler, or a
    bare UNet2DModel, whose schedule and prediction you say; or a bundle, to add --variants (left
    out: the built-in model). The sampler options set the bundle's default plan. A network of your
    own maps (x, t) or (x, t, label) to x's shape; say its --shape and its schedule.

    Example:  ddpm-edge export runs/fashion-mnist -o fashion-mnist-bundle --variants fp32,fp16
    """
    given = given_options(ctx)
    if run is None and model is None and ("variants" in given or o["format_"] == "triton"):
        run = BUILT_IN
    if (run is None) == (model is None):
        raise ConfigError("give either the directory of a training run, or --model")
    variants = _names(o["variants"])
    if o["format_"] == "triton":
        _triton(run, output, variants, given, o)
        return
    extra = [given[name] for name in ("engine", "max_batch") if name in given]
    if extra:
        raise ConfigError(f"{', '.join(extra)} go with --format triton")
    check_choices(variants, o["gate"])
    if o["format_"] == "tensorrt":
        _check_gpu()
    if run is not None and (run / MANIFEST).is_file():
        _again(run, output, variants, given, o)
        return
    diffusers = run is not None and is_diffusers(run)
    if run is not None:
        taken = DIFFUSERS_OPTIONS if diffusers else set()
        extra = [flag for name, flag in given.items() if name in MODEL_OPTIONS - taken]
        if extra:
            raise ConfigError(f"{', '.join(extra)} go with --model; {run} has its own")
    start = time.perf_counter()
    common = {
        **({"name": o["name"]} if o["name"] else {}),
        "licence": o["licence"],
        "variants": variants,
        "gate": o["gate"],
        "plan": o["plan"],
        "report": show_comparison,
    }
    click.echo(f"Exporting {run or model} to ONNX ...")
    imported = _imported(run, o, given) if run is not None and diffusers else None
    bundle = _exporter(imported or run, model, output, o)(**common)
    _show(bundle, output, time.perf_counter() - start)
    _build(bundle, output, o)


def _again(
    run: Path, output: Path, variants: list[str], given: Mapping[str, str], o: dict[str, Any]
) -> None:
    """Export a bundle in other precisions."""
    from ddpm_edge.export import export_bundle

    extra = [flag for name, flag in given.items() if name not in BUNDLE_OPTIONS]
    if extra:
        raise ConfigError(f"{', '.join(extra)} cannot change: {run} is a bundle and has its own")
    start = time.perf_counter()
    click.echo(f"Converting {run} to {', '.join(variants)} ...")
    bundle = export_bundle(run, output, variants=variants, gate=o["gate"], report=show_comparison)
    _show(bundle, output, time.perf_counter() - start)
    _build(bundle, output, o)


def _triton(
    run: Path | None,
    output: Path,
    variants: list[str],
    given: Mapping[str, str],
    o: dict[str, Any],
) -> None:
    """Write a bundle into a model repository."""
    from ddpm_edge.export.to_triton import write_repository

    extra = [flag for name, flag in given.items() if name not in TRITON_OPTIONS]
    if extra:
        raise ConfigError(f"{', '.join(extra)} cannot go with --format triton")
    if len(variants) != 1:
        raise ConfigError(f"--format triton takes one of the variants; got {o['variants']}")
    variant = variants[0] if "variants" in given else None
    bundle = Bundle.open(run)
    name = write_repository(
        bundle, output, variant=variant, name=o["name"], engine=o["engine"],
        max_batch=o["max_batch"],
    )  # fmt: skip
    click.echo(
        f"{output}: {name}, the sampling loop, and {name}-network\n"
        f"Next: tritonserver --model-repository={output.absolute()}, where ddpm-edge is installed; "
        "see docs/serving.md"
    )


def _show(bundle: Bundle, output: Path, seconds: float) -> None:
    """Say what was written and what to do next."""
    size = sum(entry["size"] for entry in bundle.files.values())
    variants = bundle.manifest.variants
    for name, entry in variants.items():
        if "kept_in_fp32" in entry:
            click.echo(f"{name}: also in fp32 are {', '.join(entry['kept_in_fp32'])}")
    click.echo(
        f"{output}: {', '.join(variants)}; {size / 1e6:.1f} MB, {seconds:.0f} s\n"
        f"{next_sample(output, bundle.manifest)}\n"
        f"      {command_line('verify', output)}"
    )


def _check_gpu() -> None:
    """Refuse to export what cannot be built here."""
    from ddpm_edge.runtimes import cuda
    from ddpm_edge.runtimes.flavour import flavour_for

    try:
        flavour_for(cuda.gpu())
    except RuntimeUnavailableError as error:
        raise RuntimeUnavailableError(
            f"--format tensorrt builds for the GPU of this machine: {error}; leave it out, and run "
            "ddpm-edge build on the device"
        ) from error


def _build(bundle: Bundle, output: Path, o: dict[str, Any]) -> None:
    """With --format tensorrt, build an engine of every variant."""
    if o["format_"] != "tensorrt":
        return
    from ddpm_edge.cli.build import DEFAULTS, build_here, show

    for name in bundle.manifest.variants:
        report = build_here(output, **DEFAULTS, variant=name, cache_dir=o["cache_dir"])
        show(report, output)


def _imported(run: Path, o: dict[str, Any], given: Collection[str]) -> Imported:
    """What a folder of diffusers holds, with what was typed for a bare network."""
    imported = read_diffusers(
        run,
        schedule=o["forward"] if SCHEDULE_OPTIONS & set(given) else None,
        prediction=o["prediction"] if "prediction" in given else None,
        sample_shape=_shape(o["shape"]) if o["shape"] else None,
        class_names=_names(o["classes"]),
    )
    click.echo(_description(imported))
    return imported


def _exporter(
    source: Imported | Path | None, model: str | None, output: Path, o: dict[str, Any]
) -> Callable[..., Bundle]:
    """What exports: a folder of diffusers, a run, or the user's own network."""
    import functools

    from ddpm_edge.export import export as export_network
    from ddpm_edge.export import export_run

    if isinstance(source, Imported):
        return functools.partial(source.export, output)
    if source is not None:
        return functools.partial(export_run, source, output)
    from ddpm_edge.train.network import from_factory, load_weights

    shape = _shape(o["shape"])
    network = from_factory(str(model))
    if o["weights"] is not None:
        from ddpm_edge.train.checkpoint import load_state

        load_state(network, load_weights(o["weights"]))
    forward: Schedule = o["forward"]
    return functools.partial(
        export_network,
        network,
        forward,
        output,
        sample_shape=shape,
        prediction=o["prediction"],
        timestep_offset=o["timestep_offset"],
        class_names=_names(o["classes"]),
        training={"model": model, "weights": str(o["weights"]) if o["weights"] else None},
    )


def _description(imported: Imported) -> str:
    """What was read from a folder of diffusers, or assumed where it does not say."""
    schedule, prediction, clip, variance, _ = imported.process
    process = f"{schedule}, prediction {prediction}"
    if imported.scheduler is None:
        return f"No {SCHEDULER}: taken {process}; --schedule, -T and --prediction say otherwise"
    clipped = "off" if clip is None else f"{clip:g}"
    return f"{imported.scheduler}: {process}, variance {variance}, clip {clipped}"


def _names(text: str | None) -> list[str]:
    """The names in "cat, dog"."""
    return [name.strip() for name in text.split(",")] if text else []


def _shape(text: str | None) -> tuple[int, int, int]:
    """The sizes in CxHxW, such as 3x32x32."""
    if text is None:
        raise ConfigError("--model needs --shape CxHxW, such as 3x32x32")
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--shape must be CxHxW, such as 3x32x32; got {text!r}")
    channels, height, width = (int(part) for part in parts)
    return channels, height, width
