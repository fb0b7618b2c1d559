"""ddpm-edge beside its peers on one CPU: the same weights, the same plan, one run.

    python tests/benchmarks/compare_peers.py                    all parts, into compare_peers.json
    python tests/benchmarks/compare_peers.py --part cifar10     one part anew
    python tests/benchmarks/compare_peers.py --checkpoint DIR --json mine.json     your own model
    python tests/benchmarks/compare_peers.py --table            Markdown from the JSON
    python tests/benchmarks/compare_peers.py --readme           what the README shows of it
    python tests/benchmarks/compare_peers.py --plot peers.png   a picture from the JSON

It takes an hour; let nothing else run. Linux only; needs the extras [bench], and the images of
Fashion-MNIST for the part `quality`.

A step: each contender (`peers/contenders.py`) is a process of its own. They take turns, and who has
no turn is stopped (SIGSTOP), because the threads of some runtimes spin on after a call and would
slow the next. A turn is one step that is not timed and a DDIM run of `--steps`. Where a process's
memory lies decides over 15 % at batch 8, for as long as it lives: so each of `--sittings` starts
all of them anew, and the median of its `--rounds` turns is one measurement. A ratio is of
measurements of one sitting; the geometric mean, and its 95 % t-interval over the sittings. The
images of every float32 contender are compared with diffusers' first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE / "compare_peers.json"
sys.path.insert(0, str(HERE / "peers"))

BASE = "diffusers"
NAIVE = "naive ONNX, ONNX Runtime"
FIRST = 16  # images of a fresh process
FIRST_STEPS = 20
# Of float32 images in 0..1. At t = T, where the signal is 0.006, x0 is off by 160 times what the
# answer is off by, some 1e-5. Other precisions are held to account by their gates.
TOLERANCE = 0.01

Row = dict[str, Any]


class CannotRunError(Exception):
    """A contender has died; str() = the last that it said."""


class Contender:
    """A process of `contenders.py`, stopped but for its turns."""

    def __init__(self, name: str, folder: Path, batch: int, kind: str = "step") -> None:
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        script = [sys.executable, str(HERE / "peers/contenders.py")]
        self._process = subprocess.Popen(
            [*script, kind, name, str(folder), str(batch)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._said, text=True, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *exc: object) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._said.close()

    def turn(self, steps: int, warm: bool = True, images: Path | None = None) -> dict[str, float]:
        """Sample; the "seconds" it took, after a step to warm up, and the "peak_memory_mb".

        Raises:
            CannotRunError: it has died.
        """
        self._signal(signal.SIGCONT)
        order = {"steps": steps, "warm": warm, "images": images and str(images)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._said.seek(0)
            said = [text.strip() for text in self._said.read().splitlines() if text.strip()]
            raise CannotRunError(said[-1] if said else f"exit code {self._process.wait()}")
        self._signal(signal.SIGSTOP)
        found: dict[str, float] = json.loads(line)
        return found

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def steps_of(
    folder: Path, names: Sequence[str], batch: int, options: argparse.Namespace
) -> list[Row]:
    """A row for every contender: a step's milliseconds in each sitting, or why it cannot run."""
    sittings: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, float] = {}
    difference: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    order = random.Random(0)
    for sitting in range(options.sittings):
        with contextlib.ExitStack() as stack:
            running: dict[str, Contender] = {}
            for name in names:  # diffusers is the first, with whose images the others are compared
                if name in reasons:
                    continue
                contender = stack.enter_context(Contender(name, folder, batch))
                images = folder / ("theirs.npy" if name == BASE else "other.npy")
                try:
                    contender.turn(options.steps, images=images)
                except CannotRunError as error:
                    reasons[name] = str(error)
                    continue
                difference[name] = differing(folder, name)
                running[name] = contender
            turns: dict[str, list[float]] = {name: [] for name in running}
            for _ in range(options.rounds):
                for name in order.sample(list(running), len(running)):
                    found = running[name].turn(options.steps)
                    turns[name].append(found["seconds"] / options.steps * 1e3)
                    memory[name] = found["peak_memory_mb"]
        for name, ms in turns.items():
            sittings[name].append(statistics.median(ms))
        print(f"  batch {batch}: sitting {sitting + 1}/{options.sittings}", file=sys.stderr)
    rows: list[Row] = []
    for name in names:
        row: Row = {"contender": name, "batch": batch}
        if name in reasons:
            rows.append(row | {"reason": reasons[name]})
            continue
        rows.append(row | {
            "ms_a_step": statistics.median(sittings[name]),
            "ms_of_each_sitting": sittings[name],
            "times_diffusers": ratio(sittings[BASE], sittings[name]),
            "times_naive": ratio(sittings[NAIVE], sittings[name]) if NAIVE in memory else None,
            "peak_memory_mb": memory[name],
            "max_abs_difference": difference[name],
        })  # fmt: skip
    return rows


def differing(folder: Path, name: str) -> float | None:
    """The largest difference of the last images to diffusers'; None = it makes none."""
    file = folder / "other.npy"
    if name == BASE or not file.exists():
        return 0.0 if name == BASE else None
    off = float(np.abs(np.load(file) - np.load(folder / "theirs.npy")).max())
    file.unlink()
    if not off <= TOLERANCE and not any(lower in name for lower in ("int8", "bf16")):
        raise SystemExit(f"{name} makes other images than diffusers: {off} apart")
    return off


def ratio(base: Sequence[float], other: Sequence[float]) -> list[float]:
    """How many times quicker: the geometric mean of base / other, and its 95 % t-interval."""
    from scipy.stats import t

    logs = np.log(np.array(base) / np.array(other))
    half = t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    return np.exp([logs.mean(), logs.mean() - half, logs.mean() + half]).tolist()


def model(folder: Path, gflop: float, options: argparse.Namespace) -> Row:
    """A step of every contender, and the loop's share of ours, in percent of a step of batch 1."""
    from contenders import CONTENDERS

    from ddpm_edge.bench import bench

    wanted = [
        name
        for name in CONTENDERS
        if not options.only or name == BASE or any(part in name for part in options.only)
    ]
    rows = [
        row for batch in options.batch or [1, 8] for row in steps_of(folder, wanted, batch, options)
    ]
    plans: dict[str, Row] = {"DDIM": {"sampler": "ddim"}, "default": {}}
    loop = {
        name: bench(
            folder / "bundle", batches=[1], runs=11, runtime="onnxruntime", device="cpu", **plan
        ).batches[0].loop_percent
        for name, plan in plans.items()
    }  # fmt: skip
    counts = {name: getattr(options, name) for name in ("sittings", "rounds", "steps")}
    return {"gflop": gflop, **counts, "rows": rows, "loop_percent": loop}


def first_images(folder: Path, rounds: int = 5) -> Row:
    """From the start of a process to its first 16 images of 20 steps, and its peak memory."""
    from contenders import CONTENDERS

    names = [n for n in CONTENDERS if "compile" not in n and "alone" not in n]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            start = time.perf_counter()
            with contextlib.suppress(CannotRunError), Contender(name, folder, FIRST) as contender:
                found = contender.turn(FIRST_STEPS, warm=False)
                seconds[name].append(time.perf_counter() - start)
                memory[name].append(found["peak_memory_mb"])
    rows = [
        {
            "contender": name,
            "seconds": statistics.median(seconds[name]),
            "peak_memory_mb": statistics.median(memory[name]),
        }
        for name in names
        if seconds[name]
    ]
    return {"rounds": rounds, "rows": rows}


def equal_quality(folder: Path, rounds: int = 5) -> Row:
    """Seconds of what gives images of equal quality: diffusers' 1000 DDPM steps, our default.

    That they are of equal quality is measured by `sampler_quality.py`.
    """
    from contenders import CHAINS

    from ddpm_edge import Bundle

    manifest = Bundle.open(folder / "bundle").manifest
    steps = dict(zip(CHAINS, (manifest.schedule.T, len(manifest.make_plan())), strict=True))
    seconds: dict[str, list[float]] = {name: [] for name in CHAINS}
    with contextlib.ExitStack() as stack:
        running = {
            name: stack.enter_context(Contender(name, folder, 1, "chain")) for name in CHAINS
        }
        for _ in range(rounds):
            for name, contender in running.items():
                seconds[name].append(contender.turn(steps[name])["seconds"])
    theirs, ours = CHAINS
    return {
        "rounds": rounds,
        "steps": steps,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "times": ratio(seconds[theirs], seconds[ours]),
        "times_fewer_steps": steps[theirs] / steps[ours],
        "times_a_step": ratio(
            [s / steps[theirs] for s in seconds[theirs]], [s / steps[ours] for s in seconds[ours]]
        ),
    }


def measured(part: str, folder_of: Callable[[str], tuple[Path, float]], options: Any) -> Row:
    """What one part of the comparison finds."""
    import footprint
    from growth import growth
    from models import BUILT_IN, CIFAR10
    from quality import quality

    if part in (BUILT_IN, CIFAR10) or options.checkpoint:
        return model(*folder_of(part), options)
    parts: dict[str, Callable[[], Row]] = {
        "first images": lambda: first_images(folder_of(BUILT_IN)[0]),
        "equal quality": lambda: equal_quality(folder_of(BUILT_IN)[0]),
        "quality": lambda: quality(folder_of(BUILT_IN)[0]),
        "imports": footprint.imports,
        "environments": footprint.environments,
        "growth": growth,
    }
    return parts[part]()


PARTS = (
    "built-in", "cifar10", "first images", "equal quality", "quality", "imports", "environments",
    "growth",
)  # fmt: skip


def main() -> None:
    import models
    from machine import machine
    from report import plot, readme, table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--checkpoint", type=Path, help="a folder that diffusers saved, instead")
    parser.add_argument("--only", action="append", help="part of a contender's name; needs --json")
    parser.add_argument("--batch", type=int, action="append", help="default: 1 and 8")
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of a sitting")
    parser.add_argument("--sittings", type=int, default=5, help="starts of all processes, >= 2")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    path = options.json or RESULTS
    if options.table or options.readme or options.plot:
        results = json.loads(path.read_text())
        if options.table:
            print(table(results))
        if options.readme:
            print(readme(results))
        if options.plot:
            plot(results, options.plot)
        return
    if options.json is None and (options.checkpoint or options.only or options.batch):
        parser.error("only a part of what compare_peers.json has, or another: give --json FILE")
    if options.sittings < 2:
        parser.error(f"an interval needs --sittings of 2 or more; got {options.sittings}")
    parts = [options.checkpoint.resolve().name] if options.checkpoint else options.part or PARTS

    with tempfile.TemporaryDirectory() as temporary:
        prepared: dict[str, tuple[Path, float]] = {}

        def folder_of(name: str) -> tuple[Path, float]:
            """The folder with the weights of a model in every form, and its GFLOP."""
            if name not in prepared:
                folder = Path(temporary) / name
                gflop = models.prepare(
                    folder, name, options.checkpoint, {*(options.batch or [1, 8]), FIRST}
                )
                prepared[name] = folder, gflop
            return prepared[name]

        where = machine()
        for part in parts:
            print(part, file=sys.stderr)
            found = measured(part, folder_of, options)
            results = json.loads(path.read_text()) if path.exists() else {}
            results[part] = {"machine": where, **found}
            path.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
