"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ddpm_edge.errors import ConfigError
from ddpm_edge.generator import BUILD
from ddpm_edge.runtimes import RUNTIMES
from ddpm_edge.samplers import SAMPLERS, SPACINGS, VARIANCES
from ddpm_edge.sampling import LOOPS
from ddpm_edge.schedule import RULES, Schedule

PLAN_OPTIONS = (
    "sampler", "steps", "spacing", "order", "sde", "eta", "variance", "corrections", "snr", "clip",
    "travel_length", "travel_repeat",
)  # fmt: skip
WHERE_OPTIONS = ("runtime", "device", "variant", "threads", "cache_dir", "build", "loop")
IMAGE_OPTIONS = (
    "output", "labels", "guidance", "guidance_interval", "seed", "first", "batch", "deadline_ms",
    "budget_ms", "as_json",
)  # fmt: skip
REAL_OPTIONS = ("data", "size", "share", "split_seed", "features")


cache_option = click.option(
    "--cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where engines built on this device are.  [default: DDPM_EDGE_CACHE, the user's cache]",
)


def runtime_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that choose where a bundle runs; the command gets them as the dict `where`."""

    @click.option(
        "--runtime",
        type=click.Choice(["auto", *RUNTIMES]),
        default="auto",
        show_default=True,
        help="What evaluates the network.",
    )
    @click.option("--device", help="cpu, cuda or cuda:N.  [default: the best that works]")
    @click.option("--variant", help="Precision of the network.  [default: fp32]")
    @click.option("--threads", type=int, help="CPU threads of one evaluation.  [default: all]")
    @cache_option
    @click.option(
        "--build",
        type=click.Choice(BUILD),
        default="never",
        show_default=True,
        help="missing: with --runtime tensorrt, build the engine where it is not there.",
    )
    @click.option(
        "--loop",
        type=click.Choice(LOOPS),
        default="auto",
        show_default=True,
        help="Where the sampling loop runs; device: on the GPU with the network.",
    )
    @functools.wraps(command)
    def gathered(**given: Any) -> None:
        where = {name: given.pop(name) for name in WHERE_OPTIONS}
        command(where=where, **given)

    return gathered


def image_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of the commands that make images; the command gets them as the dict `wanted`."""

    @click.option(
        "-o",
        "--output",
        required=True,
        type=click.Path(path_type=Path),
        help="NAME.png: the image, or a grid of several. NAME.npy: uint8 (n, H, W, C). A "
        "directory: single PNGs.",
    )
    @click.option(
        "--label",
        "labels",
        multiple=True,
        help="Class, by number or name; repeat for several, dealt out in turn.  [default: none]",
    )
    @click.option("--guidance", type=float, help="Scale of guidance towards the label; 1 = none.")
    @click.option(
        "--guidance-interval",
        type=(int, int),
        help="Lowest and highest timestep at which guidance acts.  [default: 1 T]",
    )
    @click.option("--seed", type=int, help="0 to 2**64 - 1.  [default: a fresh one, printed]")
    @click.option(
        "--first", type=int, default=0, show_default=True, help="Index of the first sample."
    )
    @click.option("--batch", type=int, help="Images in one evaluation.  [default: 16]")
    @click.option(
        "--deadline-ms", type=float, help="Stop after so many milliseconds with what there is."
    )
    @click.option(
        "--budget-ms",
        type=float,
        help="Take the best of the plans that `tune` measured that fits into so many milliseconds.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
    @functools.wraps(command)
    def gathered(**given: Any) -> None:
        wanted = {name: given.pop(name) for name in IMAGE_OPTIONS}
        command(wanted=wanted, **given)

    return gathered


def judging_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of the commands that hold samples against real images.

    The command gets `count`, `seed` and `guidance` of the samples, and as the dict `real` what the
    images are and what sees them.
    """

    @click.option(
        "--data",
        required=True,
        help="fashion-mnist, a folder of images or IDX files, or an .npz or .npy file.",
    )
    @click.option("--size", help="Bring every image to this size: 64, or 48x64 (height x width).")
    @click.option(
        "--val",
        "share",
        type=float,
        help="--val of the training, where the data have no test images of their own.",
    )
    @click.option(
        "--split-seed", type=int, default=0, show_default=True, help="--seed of that train."
    )
    @click.option(
        "--features",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="ONNX model that sees the images.  [default: the built-in one, for Fashion-MNIST]",
    )
    @click.option(
        "-n", "count", type=int, default=1000, show_default=True, help="Number of samples."
    )
    @click.option("--seed", type=int, default=0, show_default=True, help="0 to 2**64 - 1.")
    @click.option("--guidance", type=float, help="Scale of guidance towards the label; 1 = none.")
    @functools.wraps(command)
    def gathered(**given: Any) -> None:
        real = {name: given.pop(name) for name in REAL_OPTIONS}
        command(real=real, **given)

    return gathered


def plan_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that choose the sampler; the command gets those given as the dict `plan`."""

    @click.option(
        "--sampler",
        help=f"{', '.join(SAMPLERS)}. ddpm is Algorithm 2, all T steps unless --steps.  "
        "[default: the bundle's]",
    )
    @click.option("--steps", type=int, help="Steps of the sampler, 1 to T.")
    @click.option(
        "--spacing",
        help=f"Which timesteps: {', '.join(SPACINGS)}, or a list such as 1000,600,200.",
    )
    @click.option(
        "--order", type=int, help="dpmpp, dpm, unipc: 1 to 3 [default: 2]; ipndm: 1 to 4."
    )
    @click.option(
        "--sde/--ode",
        default=None,
        help="dpmpp, dpm: draw noise at each step, or never.  [default: --ode]",
    )
    @click.option("--eta", type=float, help="ddim: randomness, 0 to 1.  [default: 0]")
    @click.option(
        "--variance",
        help=f"ddpm: variance of each step, {' or '.join(VARIANCES)}.  [default: the bundle's]",
    )
    @click.option("--corrections", type=int, help="pc: Langevin steps a timestep.  [default: 1]")
    @click.option("--snr", type=float, help="pc: their signal-to-noise ratio.  [default: 0.16]")
    @click.option(
        "--clip",
        help="Limit of the predicted image, a percentile such as 99.5%, or 'off'.  [default: 1.0]",
    )
    @click.option(
        "--travel-length", type=int, help="Rows of a stretch of time travel.  [default: 1]"
    )
    @click.option("--travel-repeat", type=int, help="How often each stretch is run.  [default: 1]")
    @functools.wraps(command)
    def gathered(**given: Any) -> None:
        typed = {name: given.pop(name) for name in PLAN_OPTIONS}
        plan = {name: value for name, value in typed.items() if value is not None}
        if "spacing" in plan:
            plan["spacing"] = _spacing(plan["spacing"])
        if "clip" in plan:
            plan["clip"] = _clip(plan["clip"])
        command(plan=plan, **given)

    return gathered


def schedule_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that define the forward process; the command gets the Schedule as `forward`."""

    @click.option(
        "--schedule",
        "rule",
        type=click.Choice([rule for rule in RULES if rule != "betas"]),
        default="linear",
        show_default=True,
        help="Rule of beta_1..beta_T.",
    )
    @click.option("-T", "--timesteps", type=int, default=1000, show_default=True, help="T.")
    @click.option("--beta-1", type=float, help="First beta.  [default: 1e-4]")
    @click.option("--beta-T", "beta_t", type=float, help="Last beta.  [default: 0.02]")
    @click.option("--beta", type=float, help="constant: every beta.  [default: 0.01]")
    @functools.wraps(command)
    def gathered(
        rule: str,
        timesteps: int,
        beta_1: float | None,
        beta_t: float | None,
        beta: float | None,
        **others: Any,
    ) -> None:
        betas = {"beta_1": beta_1, "beta_T": beta_t, "beta": beta}
        given = {name: value for name, value in betas.items() if value is not None}
        command(forward=Schedule.from_dict({"rule": rule, "T": timesteps} | given), **others)

    return gathered


def given_options(ctx: click.Context) -> dict[str, str]:
    """The options that were typed: parameter name -> how the option is spelled."""
    typed = click.core.ParameterSource.COMMANDLINE
    return {
        parameter.name: parameter.opts[-1]
        for parameter in ctx.command.params
        if parameter.name and ctx.get_parameter_source(parameter.name) is typed
    }


def _spacing(text: str) -> str | list[int]:
    """A name, or the timesteps in "1000,600,200"."""
    parts = [part.strip() for part in text.split(",")]
    if not any(part.lstrip("-").isdecimal() for part in parts):
        return text
    try:
        return [int(part) for part in parts]
    except ValueError as error:
        raise ConfigError(
            f"--spacing must be one of {', '.join(SPACINGS)}, or whole numbers such as "
            f"1000,600,200; got {text!r}"
        ) from error


def _clip(text: str) -> float | str | None:
    """A limit, a percentile, or off."""
    if text.lower() in ("off", "none"):
        return None
    try:
        return float(text)
    except ValueError:
        return text
