"""Samplers: functions of a Schedule that return a Plan.

A sampler is one function in one of these files and its entry in `SAMPLERS`; the loop, the command
line and the Generator know it from then on. Each takes `steps` and `spacing` (see `grid`) and
`clip` (see `ddpm_edge.plan.Clip`), and what is its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ddpm_edge import checks
from ddpm_edge.errors import ConfigError
from ddpm_edge.plan import Plan
from ddpm_edge.samplers.dpm_solver import dpm, dpmpp
from ddpm_edge.samplers.grid import DEFAULT_SPACING, SPACINGS, Grid, timesteps
from ddpm_edge.samplers.inversion import inversion
from ddpm_edge.samplers.ipndm import ipndm
from ddpm_edge.samplers.one_step import (
    VARIANCES,
    SamplerWarning,
    consistency,
    ddim,
    ddpm,
    euler,
)
from ddpm_edge.samplers.predictor_corrector import pc
from ddpm_edge.samplers.time_travel import time_travel
from ddpm_edge.samplers.unipc import unipc
from ddpm_edge.schedule import Schedule

__all__ = [
    "DEFAULT_PLAN", "DEFAULT_SPACING", "SAMPLERS", "SPACINGS", "VARIANCES", "Grid",
    "SamplerWarning", "consistency", "ddim", "ddpm", "default_plan", "dpm", "dpmpp", "euler",
    "inversion", "ipndm", "make_plan", "override", "pc", "time_travel", "timesteps", "unipc",
]  # fmt: skip

SAMPLERS: dict[str, Callable[..., Plan]] = {
    function.__name__: function
    for function in (ddpm, ddim, dpmpp, dpm, unipc, ipndm, euler, consistency, pc)
}


# Chosen by measurement: tests/benchmarks/sampler_quality.py.
DEFAULT_PLAN: Mapping[str, Any] = {
    "sampler": "dpmpp", "order": 2, "sde": True, "spacing": "logsnr", "steps": 20, "clip": 1.0,
}  # fmt: skip


def default_plan(schedule: Schedule) -> dict[str, Any]:
    """The arguments of the plan that a bundle has unless told otherwise."""
    return {**DEFAULT_PLAN, "steps": min(DEFAULT_PLAN["steps"], schedule.T)}


def override(default: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a plan when some are given anew.

    A sampler that is named starts from its own defaults, but keeps the clip. Of `steps` and a list
    of timesteps the one that is given counts.
    """
    kept = dict(default)
    if "sampler" in given:
        kept = {name: value for name, value in kept.items() if name == "clip"}
    if "spacing" in given and (_listed(given) or _listed(kept)):
        kept.pop("steps", None)
    if "steps" in given and _listed(kept):
        del kept["spacing"]
    return kept | dict(given)


def _listed(plan: Mapping[str, Any]) -> bool:
    """Whether a plan's arguments list its timesteps."""
    return not isinstance(plan.get("spacing", ""), str)


def make_plan(
    schedule: Schedule,
    /,
    sampler: str,
    travel_length: int | None = None,
    travel_repeat: int | None = None,
    **options: Any,
) -> Plan:
    """The plan of the sampler called `sampler`, with the time travel that any of them can do.

    Raises:
        ConfigError: no such sampler, an option that it does not have, or a bad value.
    """
    checks.choice("sampler", sampler, SAMPLERS)
    known = [*_options(sampler), "travel_length", "travel_repeat"]
    for name in options:
        if name not in known:
            others = [other for other in SAMPLERS if name in _options(other)]
            hint = f"; that is an option of {', '.join(others)}" if others else ""
            unknown = checks.unknown(f"an option of sampler {sampler!r}", name, known)
            raise ConfigError(unknown + hint)
    plan = SAMPLERS[sampler](schedule, **options)
    if travel_repeat is None:
        if travel_length is not None:
            raise ConfigError("travel_length needs travel_repeat: how often each stretch is run")
        return plan
    return time_travel(plan, 1 if travel_length is None else travel_length, travel_repeat)


def _options(sampler: str) -> list[str]:
    """The names of a sampler's options."""
    return list(inspect.signature(SAMPLERS[sampler]).parameters)[1:]
