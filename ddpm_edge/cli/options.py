"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from ddpm_edge.errors import ConfigError
from ddpm_edge.runtimes import RUNTIMES
from ddpm_edge.samplers import SAMPLERS, VARIANCES


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
    @functools.wraps(command)
    def gathered(
        runtime: str, device: str | None, variant: str | None, threads: int | None, **others: Any
    ) -> None:
        where = {"runtime": runtime, "device": device, "variant": variant, "threads": threads}
        command(where=where, **others)

    return gathered


def plan_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that choose the sampler; the command gets those given as the dict `plan`."""

    @click.option(
        "--sampler",
        type=click.Choice(list(SAMPLERS)),
        help="ddpm is Algorithm 2, all T steps unless --steps.  [default: the bundle's]",
    )
    @click.option("--steps", type=int, help="Evaluations of the network, 1 to T.")
    @click.option("--eta", type=float, help="ddim: randomness, 0 to 1.  [default: 0]")
    @click.option(
        "--variance",
        type=click.Choice(VARIANCES),
        help="ddpm: variance of each step.  [default: beta]",
    )
    @click.option("--clip", help="Limit of the predicted image, or 'off'.  [default: 1.0]")
    @functools.wraps(command)
    def gathered(
        sampler: str | None,
        steps: int | None,
        eta: float | None,
        variance: str | None,
        clip: str | None,
        **others: Any,
    ) -> None:
        given = {"sampler": sampler, "steps": steps, "eta": eta, "variance": variance}
        plan: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if clip is not None:
            plan["clip"] = None if clip == "off" else _clip_limit(clip)
        command(plan=plan, **others)

    return gathered


def _clip_limit(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"--clip must be a number above 0 or 'off'; got {text!r}") from error
