"""What is known of how good plans are: the part of a bundle that a time budget is spent by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ddpm_edge import checks

MAX_PLANS = 100


class TunedPlan(NamedTuple):
    """A plan that was measured.

    Attributes:
        plan: its arguments: "sampler", "steps" and the sampler's options.
        evaluations: of the network.
        value: of the figure; lower is better.
        standard_error: of the value, by the choice of images.
    """

    plan: Mapping[str, Any]
    evaluations: int
    value: float
    standard_error: float


@dataclass(frozen=True)
class Tuned:
    """How good plans are, by one figure of samples of each, made from the same noise.

    Attributes:
        figure: its name; lower is better.
        settings: what it was measured with, such as "n", "seed", "data", "variant".
        plans: with at least one evaluation each, at most MAX_PLANS.
    """

    figure: str
    settings: Mapping[str, Any]
    plans: tuple[TunedPlan, ...]

    def front(self) -> list[TunedPlan]:
        """The plans that no cheaper one is as good as (Pareto), the cheapest first."""
        front: list[TunedPlan] = []
        for plan in sorted(self.plans, key=lambda p: (p.evaluations, p.value)):
            if not front or plan.value < front[-1].value:
                front.append(plan)
        return front

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        plans = [plan._asdict() for plan in self.plans]
        return {"figure": self.figure, "settings": dict(self.settings), "plans": plans}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Tuned:
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ConfigError: it is not valid.
        """
        if document.keys() != {"figure", "settings", "plans"}:
            raise TypeError(f"tuned must have figure, settings and plans; got {[*document]}")
        plans = document["plans"]
        if not isinstance(plans, list) or not 0 < len(plans) <= MAX_PLANS:
            raise TypeError(f"tuned.plans must be a list of 1 to {MAX_PLANS} plans")
        if not isinstance(document["figure"], str) or not isinstance(document["settings"], dict):
            raise TypeError("tuned.figure must be text, and tuned.settings an object")
        return cls(document["figure"], document["settings"], tuple(map(_plan, plans)))


def _plan(entry: Any) -> TunedPlan:
    if not isinstance(entry, dict) or entry.keys() != set(TunedPlan._fields):
        raise TypeError(f"an entry of tuned.plans must have {', '.join(TunedPlan._fields)}")
    if not isinstance(entry["plan"], dict):
        raise TypeError("tuned.plans: a plan must be an object")
    value, error = (
        checks.number(f"tuned.plans: {n}", entry[n]) for n in ("value", "standard_error")
    )
    if not (math.isfinite(value) and math.isfinite(error)):
        raise TypeError("tuned.plans: values must be finite")
    evaluations = checks.whole("tuned.plans: evaluations", entry["evaluations"])
    return TunedPlan(entry["plan"], evaluations, value, error)
