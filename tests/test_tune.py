"""How good fewer steps are, how long they take, and the best plan that fits."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import ToyEngine, rewrite

from ddpm_edge import Bundle, Generator, Mask, Restore, Vary
from ddpm_edge.cli import main
from ddpm_edge.data import Dataset
from ddpm_edge.errors import BundleError, CacheWarning, ConfigError
from ddpm_edge.evaluate import FRECHET, evaluate
from ddpm_edge.features import BUILT_IN as FEATURES
from ddpm_edge.features import FeatureNetwork
from ddpm_edge.images import to_images
from ddpm_edge.latency import FILE, OLD_SECONDS, RECENT, Latencies, Latency, measured_in, usual
from ddpm_edge.noise import Draws
from ddpm_edge.runtimes import measured
from ddpm_edge.tune import STEPS, front_png, grid, tune, write_tuned
from ddpm_edge.tuned import Tuned, TunedPlan

VALUES = {1: 9.0, 2: 4.0, 4: 2.0, 5: 2.5, 10: 1.0, 20: 1.1, 40: 0.5}  # of a figure, by steps
TUNED = Tuned(
    "Frechet distance",
    {"n": 100},
    tuple(TunedPlan({"sampler": "ddim", "steps": n}, n, v, 0.1) for n, v in VALUES.items()),
)
FRONT = (1, 2, 4, 10, 40)
CALL_MS = 1.0


class Clock:
    """What `time.perf_counter` says; an engine turns it on by 10 ms an image and call.

    And whoever draws where to start, or makes images of the states, by half a ms.
    """

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class Timed(ToyEngine):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.pace = clock, 1.0

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.clock.seconds += 0.010 * self.pace * len(arrays["x"])
        return super().__call__(arrays)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(time, "perf_counter", found)

    def slowly(x: np.ndarray, dtype: str) -> np.ndarray:
        found.seconds += CALL_MS / 2e3
        return to_images(x, dtype)

    def drawn(draws: Draws) -> np.ndarray:
        found.seconds += CALL_MS / 2e3
        return prior(draws)

    prior = Draws.prior
    monkeypatch.setattr("ddpm_edge.request.to_images", slowly)
    monkeypatch.setattr(Draws, "prior", drawn)
    return found


@pytest.fixture
def engine(clock: Clock) -> Timed:
    return Timed(clock)


@pytest.fixture
def tuned(engine: Timed) -> Generator:
    bundle = Bundle.open()
    return Generator(
        replace(bundle, manifest=replace(bundle.manifest, tuned=TUNED)), engine, "fp32"
    )


# What a bundle says of its plans


def test_the_front_is_what_no_cheaper_plan_is_as_good_as() -> None:
    assert [plan.evaluations for plan in TUNED.front()] == list(FRONT)
    rng = np.random.default_rng(0)
    plans = [
        TunedPlan({}, int(n), float(v), 0.0)
        for n, v in zip(rng.integers(1, 20, 60), rng.integers(0, 30, 60), strict=True)
    ]
    front = replace(TUNED, plans=tuple(plans)).front()
    for plan in plans:  # by the definition
        beaten = any(
            (p.evaluations <= plan.evaluations and p.value < plan.value)
            or (p.evaluations < plan.evaluations and p.value <= plan.value)
            for p in plans
        )
        assert beaten or any(p[1:3] == plan[1:3] for p in front)
        assert not (beaten and plan in front)
    assert len({p[1:3] for p in front}) == len(front)


def test_it_goes_into_a_bundle_and_out_again(tmp_path: Path, copy: Path) -> None:
    built_in = Bundle.open(copy)
    before = built_in.digest
    written = write_tuned(built_in, TUNED, tmp_path / "tuned")
    assert written.manifest.tuned == TUNED
    assert written.files == built_in.files
    one, other = (replace(b.manifest, tuned=None) for b in (written, built_in))
    assert one.to_dict() == other.to_dict()
    assert Bundle.open(copy).digest == before
    again = write_tuned(written, replace(TUNED, figure="another"), tmp_path / "tuned")
    assert again.manifest.tuned is not None
    assert again.manifest.tuned.figure == "another"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("plans", [], "a list of 1 to 100 plans"),
        ("plans", {}, "a list of 1 to 100 plans"),
        ("plans", [{}], "must have plan, evaluations, value, standard_error"),
        ("plans", [3], "must have plan"),
        ("figure", 3, "tuned.figure must be text"),
        ("settings", [], "tuned.settings"),
        ("more", 1, "must have figure, settings and plans"),
    ],
)
def test_what_is_no_such_part(copy: Path, field: str, value: Any, message: str) -> None:
    document = TUNED.to_dict() | {field: value}
    rewrite(copy, tuned=document)
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("evaluations", 0, "evaluations must be a whole number >= 1"),
        ("value", "1", "value must be a number"),
        ("value", True, "value must be a number"),
        ("plan", [], "a plan must be an object"),
    ],
)
def test_what_is_no_such_plan(copy: Path, field: str, value: Any, message: str) -> None:
    document = TUNED.to_dict()
    document["plans"][0][field] = value
    rewrite(copy, tuned=document)
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy)


# How good plans are


def test_grid() -> None:
    manifest = Bundle.open().manifest
    plans = grid(manifest)
    assert [plan["steps"] for plan in plans] == list(STEPS)
    assert all(plan | {"steps": 20} == dict(manifest.plan) for plan in plans)
    assert grid(manifest, ["dpmpp"], [20]) == [dict(manifest.plan)]
    two = grid(manifest, ["ddim", "unipc"], [3, 7])
    assert [(plan["sampler"], plan["steps"]) for plan in two] == [
        ("ddim", 3), ("ddim", 7), ("unipc", 3), ("unipc", 7),
    ]  # fmt: skip
    for samplers, steps, message in (
        (["dimm"], [3], "did you mean 'ddim'"),
        ([], [0], "steps must be a whole number >= 1; got 0"),
        ([], [1001], "1001"),
    ):
        with pytest.raises(ConfigError, match=message):
            grid(manifest, samplers, steps)


def images(n: int = 120) -> Dataset:
    found = np.random.default_rng(0).integers(0, 256, (n, 1, 28, 28)).astype(np.uint8)
    return Dataset("random", found)


def test_a_plan_is_as_good_as_evaluate_says(toy: Generator) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("scipy")
    plans = grid(toy.bundle.manifest, ["ddim"], [1, 3])
    told: list[float] = []
    with FeatureNetwork.fashion_mnist() as network:
        found = tune(
            toy, images(), network, plans, n=110, seed=2, guidance=1.5,
            progress=lambda share, _: told.append(share),
        )  # fmt: skip
        for plan in found.plans:
            figures = evaluate(
                toy, images(), n=110, seed=2, features=network, likelihood_images=0, guidance=1.5,
                **plan.plan,
            ).figures  # fmt: skip
            assert plan.value == figures[FRECHET].value
            assert plan.standard_error == figures[FRECHET].standard_error
    assert [plan.evaluations for plan in found.plans] == [1, 3]
    assert found.settings["n"] == 110
    assert told == sorted(told)
    assert told[-1] == 1.0
    Tuned.from_dict(json.loads(json.dumps(found.to_dict())))


def test_what_cannot_be_tuned(toy: Generator) -> None:
    pytest.importorskip("onnxruntime")
    with FeatureNetwork.fashion_mnist() as network:
        for arguments, message in (
            ({"n": 121}, "121 test images are needed, random has 120"),
            ({"n": 100}, "100 images are too few for the covariance of 96 features; give n >= 108"),
            ({"n": 5}, "n must be a whole number >= 10"),
            ({"plans": [{}] * 101}, "plans must be at most 100; got 101"),
            ({"plans": [{"steps": np.int64(3)}]}, "numbers, texts and lists, to be kept in a bun"),
            ({"plans": {"sampler": "ddim"}}, "a plan must map names to values; got 'sampler'"),
            ({"n": 110, "seed": -1}, "seed"),
        ):
            with pytest.raises(ConfigError, match=message):
                tune(toy, images(), network, **arguments)  # type: ignore[arg-type]
    assert not toy._network.engine.calls  # type: ignore[union-attr,attr-defined]


# How long they take


def test_a_latency_is_what_nine_runs_of_ten_keep() -> None:
    times = np.random.default_rng(0).permutation(100) + 1.0
    runs = iter([Latency(1.0, 1.0)] * 3 + [Latency(n, 10.0 * n) for n in times.tolist()])
    found = Latencies(None, "", str).of(1, lambda: next(runs))
    assert found == (90.0, 900.0)
    assert found.of(3) == 90.0 + 2700.0
    assert usual([2.0]) == 2.0


def test_measuring_ends(clock: Clock) -> None:
    def slow() -> Latency:
        clock.seconds += 5.0
        return Latency(1.0, 500.0)

    assert Latencies(None, "", str).of(1, slow) == (1.0, 500.0)
    assert clock.seconds == 120.0  # one to warm up, and three


def test_a_slow_device_is_not_asked_for_five_steps(tuned: Generator, engine: Timed) -> None:
    engine.pace = 100.0
    assert tuned.latency().step_ms == pytest.approx(1000.0)
    assert len(engine.calls) == 2 + 3  # 1.5 seconds to warm up


def test_latencies_are_measured_once(tuned: Generator, engine: Timed) -> None:
    assert tuned.latency(2) == pytest.approx((CALL_MS, 20.0))
    calls = len(engine.calls)
    assert calls == (3 + 15) * 5  # runs of 101 ms: three to warm up, and 1.5 seconds
    assert tuned.latency(2).step_ms == pytest.approx(20.0)
    assert len(engine.calls) == calls
    engine.pace = 3.0
    assert tuned.latency(2, again=True).step_ms == pytest.approx(60.0)
    assert tuned.latency(3).step_ms == pytest.approx(90.0)
    with pytest.raises(ConfigError, match="n must be a whole number"):
        tuned.latency(0)


def latencies(folder: Path, model: str = "model", engine: str = "a runtime") -> Latencies:
    return Latencies(measured_in(folder), model, lambda: engine)


def test_latencies_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = Latency(1.0, 2.0), Latency(3.0, 4.0)
    assert latencies(tmp_path).of(1, lambda: first) == first
    assert latencies(tmp_path).of(1, lambda: other) == first
    for fresh in (latencies(tmp_path, "m2"), latencies(tmp_path, engine="another")):
        assert fresh.of(1, lambda: other) == other
    assert latencies(tmp_path).of(2, lambda: other) == other
    assert latencies(tmp_path).of(1, lambda: other, again=True) == other
    assert latencies(tmp_path).of(1, lambda: first) == other
    now = measured.machine() | {"power_mode": "pmode:0001"}
    monkeypatch.setattr(measured, "machine", lambda: now)
    assert latencies(tmp_path).of(1, lambda: first) == first


@pytest.mark.parametrize(
    "record",
    [None, 3, {}, {"call_ms": 1}, {"call_ms": -1, "step_ms": 1}, {"call_ms": 1, "step_ms": 0},
     {"call_ms": "1", "step_ms": 1}, {"call_ms": 1, "step_ms": math.inf},
     {"call_ms": math.nan, "step_ms": 1}],
)  # fmt: skip
def test_a_damaged_record_is_measured_again(record: Any, tmp_path: Path) -> None:
    if isinstance(record, dict):
        record["machine"] = measured.machine()
    text = json.dumps({"model": {"a runtime, batch 1": record}})
    (tmp_path / FILE).write_text(text)
    assert latencies(tmp_path).of(1, lambda: Latency(1.0, 2.0)) == (1.0, 2.0)
    assert latencies(tmp_path).of(1, lambda: Latency(9.0, 9.0)) == (1.0, 2.0)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    known = latencies(tmp_path / "file")
    with pytest.warns(CacheWarning, match="latencies cannot be remembered in .*file"):
        assert known.of(1, lambda: Latency(1.0, 2.0)) == (1.0, 2.0)
    assert known.of(1, lambda: Latency(9.0, 9.0)) == (1.0, 2.0)


def test_for_real(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    for threads, key in ((None, "onnxruntime on cpu"), (1, "onnxruntime on cpu, 1 threads")):
        with Generator.load(
            runtime="onnxruntime", device="cpu", threads=threads, cache_dir=tmp_path
        ) as generator:
            assert generator.latency().step_ms > generator.latency().call_ms > 0
            file = generator.bundle.manifest.variants["fp32"]["file"]
            records = json.loads((tmp_path / FILE).read_text())
            assert f"{key}, batch 1" in records[generator.bundle.files[file]["sha256"]]


# The best that fits


@pytest.mark.parametrize("n", [1, 3, 16, 20, 40])
@pytest.mark.parametrize("guided", [False, True])
def test_the_best_plan_that_fits(tuned: Generator, engine: Timed, n: int, guided: bool) -> None:
    arguments: dict[str, Any] = {"label": 1, "guidance": 2.0} if guided else {}
    an_evaluation = 10.0 * n * (2 if guided else 1)
    fixed = CALL_MS * -(-n // 16)
    for times in (1.001, 1.99, 2.5, 9.99, 10.01, 39.9, 41, 1e4):
        budget, before = times * an_evaluation + fixed, engine.clock.seconds
        result = tuned.run(n, seed=0, budget_ms=budget, **arguments)
        fits = [steps for steps in VALUES if steps <= times]
        assert len(result.plan) == min(fits, key=lambda steps: VALUES[steps])
        assert result.expected_ms == pytest.approx(fixed + len(result.plan) * an_evaluation)
        assert result.milliseconds == pytest.approx(result.expected_ms)
        assert not result.stopped
        if times > 1.5:  # by then nothing is measured any more
            assert engine.clock.seconds - before == pytest.approx(result.milliseconds / 1e3)


def test_a_budget_below_one_evaluation_names_the_least(tuned: Generator, engine: Timed) -> None:
    tuned.latency(4)
    calls = len(engine.calls)
    # Rounded up, so that what is named is enough.
    message = r"budget_ms 40.9 is too little: the least here is 41(\.1)? ms, for 4 images"
    with pytest.raises(ConfigError, match=message):
        tuned.sample(4, budget_ms=40.9)
    assert len(engine.calls) == calls
    assert tuned.run(4, budget_ms=41.1).plan.evaluations == 1
    with pytest.raises(ConfigError, match=r"the least here is 11(\.1)? ms, for 1 image;"):
        tuned.sample(1, budget_ms=9.9)
    engine.pace = 123.456
    tuned.latency(1, again=True)
    with pytest.raises(ConfigError, match=r"the least here is 1235\.6 ms"):
        tuned.sample(1, budget_ms=9.9)


@pytest.mark.parametrize("pace", [1.2, 1.5, 1.8, 3.0, 9.0])
def test_it_stops_in_time_where_a_step_takes_longer(
    tuned: Generator, engine: Timed, pace: float
) -> None:
    tuned.latency()
    engine.pace = pace
    result = tuned.run(1, seed=0, budget_ms=105)
    assert (len(result.plan), result.stopped) == (10, True)
    assert result.milliseconds - CALL_MS < 105 + 1e-6  # a float's rounding
    assert result.expected_ms == pytest.approx(101)
    late = tuned.run(1, seed=0, budget_ms=105, deadline_ms=1000)
    assert (len(late.plan), late.stopped) == (10, False)
    assert late.milliseconds == pytest.approx(100 * pace + CALL_MS)


def test_latencies_follow_what_calls_take(tuned: Generator, engine: Timed) -> None:
    tuned.latency()
    engine.pace = 1.5
    plans = [len(tuned.run(1, seed=0, budget_ms=105).plan) for _ in range(6)]
    assert plans == [10, 10, 10, 10, 4, 4]  # four calls of thirty: a tenth of them took longer
    assert tuned.latency() == pytest.approx((CALL_MS, 15.0))
    engine.pace = 1.0
    plans = [len(tuned.run(1, seed=0, budget_ms=105).plan) for _ in range(RECENT + 1)]
    assert plans == [4] * (RECENT - 3) + [10] * 4


def test_only_plain_calls_are_learned_from(tuned: Generator, engine: Timed) -> None:
    tuned.run(20, seed=0, budget_ms=1e4)
    before = [tuned.latency(n) for n in (1, 2, 4, 16)]
    engine.pace = 3.0
    photo = np.zeros((28, 28, 1), np.uint8)
    for _ in range(6):
        tuned.run(20, seed=0, budget_ms=1e4)  # several batches
        tuned.run(1, seed=0, budget_ms=1e4, callback=lambda _: None)
        tuned.run(1, seed=0, budget_ms=1e4, label=1, guidance=2.0)
        tuned.inpaint(photo, np.eye(28), budget_ms=1e4)
    assert [tuned.latency(n) for n in (1, 2, 4, 16)] == before


def test_a_slow_spell_does_not_last(tuned: Generator, engine: Timed) -> None:
    tuned.latency()
    engine.pace = 3.0
    for _ in range(4):
        assert tuned.run(1, seed=0, budget_ms=15).plan.evaluations == 1
    for _ in range(3):
        calls = len(engine.calls)
        with pytest.raises(ConfigError, match=r"the least here is 31(\.1)? ms"):
            tuned.run(1, seed=0, budget_ms=15)
        assert len(engine.calls) == calls  # nothing is measured for it within a minute
    engine.clock.seconds += OLD_SECONDS + 1
    with pytest.raises(ConfigError, match=r"the least here is 31(\.1)? ms"):  # measured anew
        tuned.run(1, seed=0, budget_ms=15)
    assert len(engine.calls) > calls
    engine.pace = 1.0
    engine.clock.seconds += OLD_SECONDS + 1
    for _ in range(3):
        assert tuned.run(1, seed=0, budget_ms=15).plan.evaluations == 1
    assert tuned.latency() == pytest.approx((CALL_MS, 10.0))


def test_a_slow_spell_when_it_was_measured_does_not_last(engine: Timed, tmp_path: Path) -> None:
    bundle = Bundle.open()
    bundle = replace(bundle, manifest=replace(bundle.manifest, tuned=TUNED))
    engine.pace = 3.0
    with Generator(bundle, engine, "fp32", latencies(tmp_path)) as generator:
        generator.latency()
    text = (tmp_path / FILE).read_text()
    engine.pace = 1.0
    again = Generator(bundle, engine, "fp32", latencies(tmp_path))
    assert again.run(1, seed=0, budget_ms=15).plan.evaluations == 1
    assert again.latency().step_ms == pytest.approx(10.0)
    assert (tmp_path / FILE).read_text() == text  # what one process finds out stays there


def test_one_slow_run_does_not_count(clock: Clock) -> None:
    known = Latencies(None, "", str)
    runs = iter([*[Latency(1.0, 2.0)] * 102, *[Latency(30.0, 2.0)] * 99])
    assert known.of(1, lambda: next(runs)) == (1.0, 2.0)
    for _ in range(40):
        known.note(1, 11.0, 5)
    assert known.of(1, lambda: next(runs)) == (1.0, 2.0)
    known.note(1, 0.5, 5)  # no time at all: of no step
    assert known.of(1, lambda: next(runs)).step_ms == 2.0


def test_rows_that_do_not_ask_take_no_step(engine: Timed) -> None:
    bundle = Bundle.open()
    plan = {"sampler": "ddim", "steps": 10, "travel_length": 1, "travel_repeat": 2}
    manifest = replace(bundle.manifest, plan=plan, tuned=TUNED)
    with Generator(replace(bundle, manifest=manifest), engine, "fp32") as generator:
        assert generator.latency().step_ms == pytest.approx(10.0)
        evaluations = generator.plan().evaluations
        assert evaluations < len(generator.plan())
        back = replace(TUNED, plans=(TunedPlan(plan, evaluations, 1.0, 0.1),))
        manifest = replace(manifest, tuned=back)
    with Generator(replace(bundle, manifest=manifest), engine, "fp32") as generator:
        result = generator.run(1, seed=0, budget_ms=1e3)
        assert result.milliseconds == result.expected_ms == pytest.approx(1 + 10 * evaluations)
        assert generator.latency().step_ms == pytest.approx(10.0)


def test_threads_do_not_wait_for_another_batch_to_be_measured(tuned: Generator) -> None:
    begun, done = threading.Event(), threading.Event()

    def run() -> Latency:
        begun.set()
        assert done.wait(60)
        return Latency(1.0, 2.0)

    known = tuned.latency(1)
    other = threading.Thread(target=tuned._latencies.of, args=(2, run))
    other.start()
    assert begun.wait(60)
    assert tuned.latency(1) == known
    assert tuned.run(1, seed=0, budget_ms=25).plan.evaluations == 2
    done.set()
    other.join()
    assert tuned.latency(2) == (1.0, 2.0)


def test_tasks_have_budgets_as_well(tuned: Generator) -> None:
    photo = np.zeros((28, 28, 1), np.uint8)
    result = tuned.run(task=Vary(photo, 0.005), seed=0, budget_ms=52)  # 5 of the 1000 timesteps
    assert result.plan.evaluations == 5
    assert result.expected_ms == result.milliseconds == pytest.approx(50 + CALL_MS)
    nothing = tuned.run(task=Vary(photo, 0.0), seed=0, budget_ms=2)
    assert (nothing.plan.evaluations, nothing.expected_ms) == (0, pytest.approx(CALL_MS))
    hole = Restore(photo, Mask(np.eye(28)))
    assert tuned.run(task=hole, seed=0, budget_ms=102).plan.evaluations == 10
    assert tuned.inpaint(photo, np.eye(28), budget_ms=102).shape == (1, 28, 28, 1)


def test_noise_in_what_is_known_needs_a_plan_that_draws_some(engine: Timed) -> None:
    bundle, photo = Bundle.open(), np.zeros((28, 28, 1), np.uint8)
    noisy = Restore(photo, Mask(np.eye(28)), 0.1)
    # Not on the front: ddim in two steps is better.
    drawing = TunedPlan({"sampler": "ddim", "steps": 3, "eta": 1.0}, 3, 5.0, 0.1)
    mixed = replace(TUNED, plans=(*TUNED.plans, drawing))
    plan = {"sampler": "ddim", "steps": 5}  # the default draws none
    for tuned, budget, steps in ((mixed, 105, 3), (mixed, 25, None), (TUNED, 105, None)):
        manifest = replace(bundle.manifest, plan=plan, tuned=tuned)
        with Generator(replace(bundle, manifest=manifest), engine, "fp32") as generator:
            if steps is None:
                with pytest.raises(ConfigError, match="needs a sampler that draws noise, and ddim"):
                    generator.run(task=noisy, budget_ms=budget)
            else:
                assert len(generator.run(task=noisy, budget_ms=budget).plan) == steps
            with pytest.raises(ConfigError, match="needs a sampler that draws noise, and ddim"):
                generator.stream(task=noisy)


def test_listed_timesteps_and_a_variation(engine: Timed) -> None:
    bundle, plan = Bundle.open(), {"sampler": "ddim", "spacing": [900, 500, 1]}
    tuned = replace(TUNED, plans=(TunedPlan(plan, 3, 1.0, 0.1),))
    manifest = replace(bundle.manifest, tuned=tuned)
    with Generator(replace(bundle, manifest=manifest), engine, "fp32") as generator:
        task = Vary(np.zeros((28, 28, 1), np.uint8), 0.95)
        assert generator.run(task=task, budget_ms=1e3).plan.evaluations == 4  # 950 as well


def test_a_bundle_that_says_what_is_not_so(engine: Timed) -> None:
    bundle = Bundle.open()
    for plan, error, message in (
        ({"sampler": "ddim", "steps": 5}, BundleError, "has 1 evaluations; it has 5: tune it aga"),
        ({"sampler": "dimm"}, ConfigError, "did you mean 'ddim'"),
    ):
        tuned = replace(TUNED, plans=(TunedPlan(plan, 1, 1.0, 0.1),))
        manifest = replace(bundle.manifest, tuned=tuned)
        with (
            Generator(replace(bundle, manifest=manifest), engine, "fp32") as generator,
            pytest.raises(error, match=message),
        ):
            generator.run(1, budget_ms=1e3)


def test_settings_that_are_nested_deep(copy: Path) -> None:
    settings: dict[str, Any] = {}
    for _ in range(600):
        settings = {"a": settings}
    rewrite(copy, tuned=TUNED.to_dict() | {"settings": settings})
    assert Bundle.open(copy).manifest.tuned is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget_ms": 0}, "budget_ms must be a number of milliseconds above 0; got 0"),
        ({"budget_ms": -5.0}, "got -5.0"),
        ({"budget_ms": math.nan}, "got nan"),
        ({"budget_ms": math.inf}, "got inf"),
        ({"budget_ms": "5"}, "budget_ms must be a number; got '5'"),
        ({"budget_ms": 50, "steps": 3}, "budget_ms chooses the plan; leave steps out"),
        ({"budget_ms": 50, "sampler": "ddim", "eta": 1.0}, "leave sampler, eta out"),
        ({"budget_ms": 50, "clip": None}, "leave clip out"),
        ({"budget_ms": 50, "n": 0}, "n must be"),
        ({"budget_ms": 50, "deadline_ms": 0}, "deadline_ms must be"),
    ],
)
def test_bad_budgets(
    tuned: Generator, engine: Timed, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tuned.run(**arguments)
    assert not engine.calls


def test_a_bundle_that_was_not_tuned(toy: Generator) -> None:
    bundle = replace(toy.bundle, manifest=replace(toy.bundle.manifest, tuned=None))
    with pytest.raises(ConfigError, match="'fashion-mnist' does not say: `ddpm-edge tune`"):
        Generator(bundle, ToyEngine(), "fp32").sample(budget_ms=50)
    photo = np.zeros((28, 28, 1), np.uint8)
    for use in (
        lambda: toy.interpolate(photo, photo, budget_ms=50),
        lambda: toy.stream(budget_ms=5),
    ):
        with pytest.raises(ConfigError, match="only run and sample take a budget_ms; give steps"):
            use()


# On the command line


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(main, [str(word) for word in arguments])
    assert result.exit_code == code, result.output
    return result


def test_command(tmp_path: Path) -> None:
    for package in ("onnxruntime", "scipy", "matplotlib"):
        pytest.importorskip(package)
    data, new, cache = tmp_path / "images.npz", tmp_path / "new", tmp_path / "cache"
    np.savez(data, images=images(300).images.transpose(0, 2, 3, 1))
    call = ["tune", "--data", data, "--val", 0.5, "-n", 110, "--steps", 1, "--steps", 2,
            "--cache-dir", cache, "-o", new]  # fmt: skip
    refused = run(*call, code=2)
    assert "give --features" in refused.output
    assert not new.exists()
    said = run(*call, "--features", FEATURES, "--plot", tmp_path / "made" / "front.png").output
    assert said.splitlines()[1].startswith("dpmpp(steps=1, ")
    assert "best for its time" in said
    assert "2 plans, 110 samples each, seed 0; " in said
    *_, last = said.splitlines()
    assert last.startswith(f"Next: ddpm-edge sample {new} -n 1 --budget-ms ")
    assert last.endswith(f" --cache-dir {cache} -o sample.png")
    assert (tmp_path / "made" / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "Frechet distance by evaluations, 1: " in run("info", new).output
    said = run("cache", "list", "--cache-dir", cache).output
    assert "batch 1: " in said
    (row,) = json.loads(run("cache", "list", "--cache-dir", cache, "--json").output)["latencies"]
    assert row["engine"].endswith("batch 1")
    sample = ["sample", new, "-n", 1, "--cache-dir", cache, "-o", tmp_path / "a.png"]
    said = run(*sample, "--budget-ms", 60_000).output
    assert "s expected" in said
    printed = json.loads(run(*sample, "--budget-ms", 60_000, "--json").output)
    assert 0 < printed["expected_seconds"] < 60
    assert json.loads(run(*sample, "--json").output)["expected_seconds"] is None
    assert "leave steps out" in run(*sample, "--budget-ms", 50, "--steps", 3, code=2).output
    assert "is too little" in run(*sample, "--budget-ms", 0.001, code=2).output
    run("cache", "clear", "--cache-dir", cache)
    assert not (cache / FILE).exists()
    printed = json.loads(run(*call, "--features", FEATURES, "--json").output)
    assert [plan["evaluations"] for plan in printed["plans"]] == [1, 2]


def test_a_picture_of_one_plan() -> None:
    pytest.importorskip("matplotlib")
    alone = replace(TUNED, plans=TUNED.plans[:1])
    assert front_png(alone, Latency(0.0, 5.0), r"a name: $\q$").startswith(b"\x89PNG")


def test_what_was_measured_of_a_model_is_dropped(tmp_path: Path) -> None:
    for model in ("one", "two"):
        latencies(tmp_path, model).of(1, lambda: Latency(1.0, 2.0))
    measured.Measured(tmp_path / FILE).drop("one")
    measured.Measured(tmp_path / FILE).drop("three")
    kept = [model for model, _, _ in measured.Measured(tmp_path / FILE).listed()]
    assert kept == ["two"]
