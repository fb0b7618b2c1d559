"""bench: what it reports fits together. Nothing here depends on how fast the machine is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers import ToyEngine

from ddpm_edge import bench as module
from ddpm_edge.bench import TimedEngine, bench
from ddpm_edge.cli import main
from ddpm_edge.errors import BundleError, ConfigError, EngineError
from ddpm_edge.runtimes import Engine, open_engine


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> ToyEngine:
    """What bench opens: microseconds a step."""
    toy = ToyEngine()
    monkeypatch.setattr("ddpm_edge.generator.open_engine", lambda *_: toy)
    return toy


def test_figures_fit_together(engine: ToyEngine) -> None:
    report = bench(batches=[1, 3], runs=4, sampler="ddim", steps=5, eta=0.5)
    assert (report.name, report.variant, report.runtime) == ("fashion-mnist", "fp32", "toy on cpu")
    assert report.plan == "ddim(steps=5, eta=0.5, clip=1)"
    assert (report.runs, [b.batch for b in report.batches]) == (4, [1, 3])
    assert report.cpus >= 1
    assert 0 < report.load_ms < report.first_image_ms
    for b in report.batches:
        assert b.steps == 5
        assert 0 < b.ms_a_step_min <= b.ms_a_step <= b.ms_a_step_max
        assert b.steps_a_second == pytest.approx(1e3 / b.ms_a_step)
        assert b.images_a_second == pytest.approx(b.batch / (b.ms_a_step / 1e3 * b.steps))
        assert 0 < b.loop_percent < 100
        assert 0 < b.loop_us < b.ms_a_step_max * 1e3
    assert engine.closed


def test_what_runs(engine: ToyEngine) -> None:
    bench(batches=[2], runs=3, steps=5)
    batches = [len(call["x"]) for call in engine.calls]
    assert batches == [1] * 5 + [2] + [2] * 5 * 3  # the first image, the warm-up, the runs


def test_a_batch_above_the_usual_limit_is_one_call(engine: ToyEngine) -> None:
    bench(batches=[40], runs=1, steps=2)
    assert [len(call["x"]) for call in engine.calls][-2:] == [40, 40]


def test_progress_ends_at_1() -> None:
    seen: list[tuple[float, str]] = []
    bench(batches=[1, 3], runs=2, steps=1, progress=lambda *done: seen.append(done))
    assert seen == [(1 / 8, "batch 1"), (2 / 8, "batch 1"), (5 / 8, "batch 3"), (1.0, "batch 3")]


def test_a_timed_engine_is_the_engine_and_counts() -> None:
    class Failing(ToyEngine):
        def __call__(self, arrays: Any) -> Any:
            raise EngineError("it failed")

    toy = ToyEngine()
    with TimedEngine(toy) as timed:
        engine: Engine = timed
        assert (engine.runtime, engine.device, engine.inputs) == ("toy", "cpu", toy.inputs)
    assert toy.closed
    failing = TimedEngine(Failing())
    with pytest.raises(EngineError):
        failing({})
    assert failing.seconds > 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not say")
def test_peak_memory_is_of_the_right_order() -> None:
    memory = module._peak_memory_mb()
    assert memory is not None
    assert 20 < memory < 100_000  # NumPy alone is 30 MB; a wrong unit is off by a thousand


def test_where_the_system_does_not_say_there_is_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows, without Linux's /proc
    monkeypatch.setattr("ddpm_edge.bench.PROC_STATUS", "/nowhere")
    assert bench(batches=[1], runs=1, steps=1).peak_memory_mb is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batches": [1, 0]}, ConfigError, "batch must be a whole number >= 1; got 0"),
        ({"batches": [1.5]}, ConfigError, "batch must be a whole number >= 1; got 1.5"),
        ({"batches": []}, ConfigError, "batches is empty; give at least one"),
        ({"runs": 0}, ConfigError, "runs must be a whole number >= 1; got 0"),
        ({"steps": 0}, ConfigError, "steps must be a whole number >= 1; got 0"),
        ({"oder": 0}, ConfigError, "got 'oder'; did you mean 'order'"),
        ({"path": "nothing"}, BundleError, "no bundle at nothing"),
        ({"variant": "int4"}, BundleError, "has no variant 'int4'"),
    ],
)
def test_bad_arguments(
    engine: ToyEngine, arguments: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        bench(**arguments)
    assert not engine.calls


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def test_command_prints_a_table(copy: Path) -> None:
    result = run(copy, "--batch", 2, "--batch", 5, "--runs", 2, "--steps", 3)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == f"bundle       fashion-mnist ({copy})"
    assert "plan         dpmpp(steps=3, order=2, sde=True, spacing=logsnr, clip=1)" in lines
    assert any(line.startswith("runs on      toy on cpu, ") for line in lines)
    assert any(line.startswith("peak memory ") for line in lines)
    table = [line.split() for line in lines[-3:-1]]
    assert [row[0] for row in table] == ["2", "5"]
    assert {len(row) for row in table} == {8}
    assert lines[-1] == f"Next: ddpm-edge sample {copy} -n 16 -o samples.png"


def test_command_prints_json() -> None:
    result = run("--runs", 1, "--steps", 2, "--sampler", "euler", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report["plan"] == "euler(steps=2, clip=1)"
    assert [b["batch"] for b in report["batches"]] == [1, 4]
    for b in report["batches"]:
        assert b["images_a_second"] == pytest.approx(b["batch"] * 1e3 / (b["ms_a_step"] * 2))
    assert set(report) == set(module.Report.__dataclass_fields__)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--batch", "0"], 2, "batch must be a whole number >= 1; got 0"),
        (["--batch", "two"], 2, "'two' is not a valid integer"),
        (["--runs", "0"], 2, "runs must be a whole number >= 1; got 0"),
        (["--steps", "5000"], 2, "got 5000"),
        (["nothing"], 1, "no bundle at nothing"),
    ],
)
def test_command_errors(arguments: list[str], code: int, message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code
    assert message in result.output


def test_the_real_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("ddpm_edge.generator.open_engine", open_engine)
    report = bench(batches=[1], runs=1, steps=1, device="cpu", threads=1)
    assert report.runtime == "onnxruntime on cpu"
