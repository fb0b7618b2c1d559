"""What `bench --choose` measures and remembers, and what `auto` makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers import ToyEngine

from ddpm_edge import Generator
from ddpm_edge.bench import BatchReport, Report, choose
from ddpm_edge.bundle import Bundle
from ddpm_edge.cli import main
from ddpm_edge.errors import CacheWarning, EngineError, RuntimeUnavailableError
from ddpm_edge.runtimes import RUNTIMES, choice, measured, open_engine, select

MODEL = b"a model"


class Named(ToyEngine):
    """A toy that says which runtime it is."""

    def __init__(self, runtime: str) -> None:
        super().__init__()
        self.runtime = runtime


@pytest.fixture
def runtimes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[..., Any]]:
    """Two runtimes that work and one that does not, in the place of the real ones."""

    def broken(_: Any) -> Any:
        raise EngineError("it cannot")

    fakes: dict[str, Callable[..., Any]] = {
        "broken": broken,
        "slow": lambda _: Named("slow"),
        "fast": lambda _: Named("fast"),
    }
    for module in ("ddpm_edge.bench", "ddpm_edge.runtimes.select"):
        monkeypatch.setattr(f"{module}.RUNTIMES", fakes)
    return fakes


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Milliseconds a step of the fakes, in the place of a clock."""
    ms = {"slow": 20.0, "fast": 5.0}

    def bench(path: Any = None, *, batches: Any, runtime: str, **_: Any) -> Report:
        open_engine(Bundle.open(path).model()[1], runtime).close()
        (batch,) = batches
        row = BatchReport(batch, 20, ms[runtime], ms[runtime], ms[runtime], 50.0, 1.0)
        return Report("m", "p", "plan", "fp32", runtime, 2, 5, 1.0, 2.0, (row,), None)

    monkeypatch.setattr("ddpm_edge.bench.bench", bench)
    return ms


def opened(cache: Path, runtime: str = "auto", device: str | None = None) -> str:
    return open_engine(Bundle.open().model()[1], runtime, device, cache_dir=cache).runtime


@pytest.mark.usefixtures("runtimes")
def test_auto_takes_what_was_the_fastest(figures: dict[str, float], tmp_path: Path) -> None:
    assert opened(tmp_path) == "slow"  # the first that works
    best, second, none = choose(cache_dir=tmp_path)
    assert [c.runtime for c in (best, second, none)] == ["fast", "slow", "broken"]
    assert (best.ms_a_step, none.report, none.reason) == (5.0, None, "it cannot")
    assert opened(tmp_path) == "fast"
    assert opened(tmp_path, "slow") == "slow"  # asked for by name
    assert opened(tmp_path, device="cpu") == "slow"  # not measured so
    assert opened(tmp_path / "other") == "slow"
    figures["fast"] = 30.0
    choose(cache_dir=tmp_path)
    assert opened(tmp_path) == "slow"


@pytest.mark.usefixtures("figures")
def test_a_runtime_that_has_gone_is_passed_over(runtimes: dict[str, Any], tmp_path: Path) -> None:
    choose(cache_dir=tmp_path)
    runtimes["fast"] = runtimes["broken"]
    assert opened(tmp_path) == "slow"
    del runtimes["fast"]
    assert opened(tmp_path) == "slow"


@pytest.mark.usefixtures("figures")
def test_what_could_not_run_then_keeps_its_place(runtimes: dict[str, Any], tmp_path: Path) -> None:
    choose(cache_dir=tmp_path)
    runtimes["broken"] = lambda _: Named("built since")
    assert opened(tmp_path) == "built since"


@pytest.mark.usefixtures("figures")
def test_nothing_that_runs(runtimes: dict[str, Any], tmp_path: Path) -> None:
    runtimes["slow"] = runtimes["fast"] = runtimes["broken"]
    with pytest.raises(RuntimeUnavailableError, match="broken: it cannot; slow: it cannot"):
        choose(cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("runtimes", "figures")
def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(CacheWarning, match="the choice cannot be remembered in .*file"):
        best, *_ = choose(cache_dir=tmp_path / "file")
    assert best.runtime == "fast"


@pytest.mark.parametrize(
    "changed",
    [
        {"processor": "another"},
        {"cpus": 1000},
        {"power_mode": "another"},
        {"versions": {"onnxruntime": "1.0"}},
    ],
)
def test_another_machine_or_version_is_another_matter(
    changed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choice.remember(tmp_path, MODEL, None, {"a": 2.0, "b": 1.0}) == "b"
    assert choice.remembered(tmp_path, MODEL, None) == {"a": 2.0, "b": 1.0}
    assert choice.remembered(tmp_path, MODEL + b"2", None) == {}
    now = measured.machine() | changed
    monkeypatch.setattr(measured, "machine", lambda: now)
    assert choice.remembered(tmp_path, MODEL, None) == {}


def test_models_and_devices_are_remembered_beside_each_other(tmp_path: Path) -> None:
    choice.remember(tmp_path, MODEL, None, {"a": 1.0})
    choice.remember(tmp_path, MODEL, "cpu", {"b": 1.0})
    choice.remember(tmp_path, b"another", None, {"c": 1.0})
    found = [choice.remembered(tmp_path, *key) for key in
             ((MODEL, None), (MODEL, "cpu"), (b"another", None))]  # fmt: skip
    assert [[*ms] for ms in found] == [["a"], ["b"], ["c"]]
    choice.forget(tmp_path)
    choice.forget(tmp_path)
    assert choice.remembered(tmp_path, MODEL, None) == {}


def records(text: Any) -> str:
    """The file of a model that has this for a record."""
    return json.dumps({choice._digest(MODEL): text})


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "\xff", "[" * 100_000, records(3), records({"any": 3}),
     records({"any": {}}), records({"any": {"runtime": "a"}}), records([]), records(None)],
)  # fmt: skip
def test_a_damaged_file_costs_nothing_but_the_choice(text: str, tmp_path: Path) -> None:
    (tmp_path / choice.FILE).write_text(text, encoding="latin-1")
    assert choice.remembered(tmp_path, MODEL, None) == {}
    assert select._order(select.Opening(MODEL, "fp32", None, None, tmp_path)) == [*RUNTIMES]
    assert choice.remember(tmp_path, MODEL, None, {"a": 1.0}) == "a"
    assert choice.remembered(tmp_path, MODEL, None) == {"a": 1.0}


def test_without_a_file_nothing_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_digest", lambda _: pytest.fail("hashed"))
    assert choice.remembered(tmp_path, MODEL, None) == {}


@pytest.mark.usefixtures("runtimes", "figures")
def test_command(tmp_path: Path) -> None:
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(
            main, ["bench", "--choose", "--cache-dir", str(tmp_path), *arguments]
        )

    said = run().output
    assert [line.split()[:2] for line in said.splitlines()[1:4]] == [
        ["fp32", "fast"], ["fp32", "slow"], ["fp32", "broken"],
    ]  # fmt: skip
    assert "broken               -         -  it cannot" in said
    assert "fp32: --runtime auto takes fast" in said
    printed = json.loads(run("--json").output)
    assert printed["fastest"] == {"fp32": "fast"}
    rows = printed["candidates"]
    assert [row["runtime"] for row in rows] == ["fast", "slow", "broken"]
    assert rows[0]["report"]["batches"][0]["ms_a_step"] == 5.0
    refused = run("--variant", "fp32")
    assert (refused.exit_code, "leave --variant out" in refused.output) == (2, True)
    listed = CliRunner().invoke(main, ["cache", "list", "--cache-dir", str(tmp_path)]).output
    digest = choice._digest(Bundle.open().model()[1])
    assert f"model {digest[:12]}, device any: fast is the fastest" in listed
    CliRunner().invoke(main, ["cache", "clear", "--cache-dir", str(tmp_path)])
    assert opened(tmp_path) == "slow"


def test_for_real(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    found = choose(runs=1, steps=1, cache_dir=tmp_path)
    assert {c.runtime for c in found} == {*RUNTIMES}
    with Generator.load(cache_dir=tmp_path) as generator:
        assert generator.runtime.split()[0] == found[0].runtime
