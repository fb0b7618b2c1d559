"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from ddpm_edge.errors import ConfigError
from ddpm_edge.runtimes import RUNTIMES
from ddpm_edge.samplers import SAMPLERS, VARIANCES
from ddpm_edge.schedule import RULES, Schedule


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


def _clip_limit(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"--clip must be a number above 0 or 'off'; got {text!r}") from error
