"""The statistics of tests/benchmarks/sampler_quality.py, which takes hours to measure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")

from benchmarks import sampler_quality as module
from helpers import ToyEngine

from ddpm_edge import Bundle, Generator
from ddpm_edge.samplers import DEFAULT_PLAN


def row(steps: int, *distances: float, **plan: object) -> dict:
    plan = {"sampler": "dpmpp", "steps": steps} | plan
    return {"plan": plan, "n": 9, "distances": {str(i): d for i, d in enumerate(distances)}}


def test_the_bound_of_a_ratio_holds_in_19_of_20_cases() -> None:
    """Simulated draws with a known ratio: how often the upper 95 % bound is below it."""
    rng, n, below = np.random.default_rng(0), 4000, 0
    for _ in range(n):
        noise = np.exp(0.04 * rng.standard_normal((4, 3)))
        rows = {str(i): row(20, *(0.2 * noise[i])) for i in range(3)}
        rows["candidate"] = row(20, *(0.2 * 1.07 * noise[3]))
        deviation, freedom = module.pooled_deviation(rows)
        assert freedom == 8
        below += module.ratio(rows["candidate"], rows["0"], deviation, freedom)[1] < 1.07
    assert below / n == pytest.approx(0.05, abs=4 * np.sqrt(0.05 * 0.95 / n))


def test_few_steps_do_not_widen_the_deviation() -> None:
    rows = {"a": row(20, 1.0, 1.1), "b": row(5, 1.0, 9.0)}
    deviation, freedom = module.pooled_deviation(rows)
    assert freedom == 1
    assert deviation == pytest.approx(np.log(1.1) / np.sqrt(2))


def test_one_draw_has_no_bound() -> None:
    value, bound = module.ratio(row(20, 0.3), row(1000, 0.2), 0.0, 0)
    assert value == pytest.approx(1.5)
    assert bound == np.inf


def test_plans_are_known_samplers() -> None:
    tables = set()
    plans = module.plans()
    assert plans[0] == {"sampler": "ddpm", "steps": 1000}
    assert len({module.name_of(plan) for plan in plans}) == len(plans)
    for plan in plans:
        made = Generator(Bundle.open(), ToyEngine(), "fp32").plan(**plan)  # as the benchmark does
        assert made.evaluations == plan["steps"]
        tables.add(made.table())
    assert len(tables) == len(plans)  # no option comes from the bundle's default plan
    assert DEFAULT_PLAN.items() - {("clip", 1.0)} in [plan.items() for plan in plans]


def test_the_committed_figures_give_the_table_and_the_plot(tmp_path: Path) -> None:
    results = module.read_results()
    assert "Algorithm 2, 1000 steps" in module.table(results, 5.0)
    pytest.importorskip("matplotlib")
    module.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
