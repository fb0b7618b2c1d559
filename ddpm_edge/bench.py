"""How fast a bundle runs here: loading, the first image, a step, and what the loop itself costs."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddpm_edge import checks, processor
from ddpm_edge.arrays import Array
from ddpm_edge.bundle import Bundle
from ddpm_edge.errors import (
    CacheWarning,
    ConfigError,
    EngineError,
    EngineMissingError,
    NonFiniteError,
    RuntimeUnavailableError,
    warn,
)
from ddpm_edge.generator import Generator, open_bundle
from ddpm_edge.runtimes import RUNTIMES, choice
from ddpm_edge.runtimes.base import Engine, WrappedEngine
from ddpm_edge.runtimes.engine_cache import cache_directory
from ddpm_edge.sampling import seconds_without_network

CANNOT_RUN = (
    EngineError, EngineMissingError, MemoryError, NonFiniteError, RuntimeUnavailableError,
)  # fmt: skip
PROC_STATUS = "/proc/self/status"  # Linux

Progress = Callable[[float, str], object]  # the share that is done, 0..1, and a note


class TimedEngine(WrappedEngine):
    """An engine that adds up the `seconds` of its calls, which must not overlap.

    Evaluations whose arrays stay on a GPU go past it.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.seconds = 0.0
        self.direct = engine

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate the model (see `Engine`)."""
        start = time.perf_counter()
        try:
            return super().__call__(arrays)
        finally:
            self.seconds += time.perf_counter() - start


@dataclass(frozen=True)
class BatchReport:
    """What was measured at one batch size; medians over the runs.

    Attributes:
        batch: images at once.
        steps: rows of the plan.
        ms_a_step: wall-clock time of a step, milliseconds.
        ms_a_step_min, ms_a_step_max: of the fastest and the slowest run.
        loop_us: of a step, what was spent outside the engine, microseconds; where the loop runs on
            the device, what a step takes there without the network.
        loop_percent: the same as a share of the step.
    """

    batch: int
    steps: int
    ms_a_step: float
    ms_a_step_min: float
    ms_a_step_max: float
    loop_us: float
    loop_percent: float

    @property
    def steps_a_second(self) -> float:
        """Steps of the whole batch."""
        return 1e3 / self.ms_a_step

    @property
    def images_a_second(self) -> float:
        """Finished images, all steps of the plan."""
        return self.batch * 1e3 / (self.ms_a_step * self.steps)


@dataclass(frozen=True)
class Report:
    """What `bench` measured.

    Attributes:
        name: of the model.
        path: of the bundle.
        plan: what ran.
        variant: precision of the network.
        runtime: runtime and device that really ran, such as "onnxruntime on cpu".
        cpus: CPUs that this process may use.
        runs: how often each batch size ran.
        load_ms: from nothing to a Generator, with the runtime's import if this process had not
            imported it yet; milliseconds.
        first_image_ms: from the start of loading to the first image, milliseconds.
        batches: one a batch size.
        peak_memory_mb: the most memory that this process has held so far, resident, in units of
            10**6 bytes; None where the system does not say.
        loop: where the loop ran, "host" or "device".
    """

    name: str
    path: str
    plan: str
    variant: str
    runtime: str
    cpus: int
    runs: int
    load_ms: float
    first_image_ms: float
    batches: tuple[BatchReport, ...]
    peak_memory_mb: float | None
    loop: str = "host"

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON, with the steps and images a second."""
        rates = [
            asdict(b) | {"steps_a_second": b.steps_a_second, "images_a_second": b.images_a_second}
            for b in self.batches
        ]
        return asdict(self) | {"batches": rates}


def bench(
    path: str | Path | None = None,
    *,
    batches: Sequence[int] = (1, 4),
    runs: int = 5,
    runtime: str = "auto",
    device: str | None = None,
    variant: str | None = None,
    threads: int | None = None,
    cache_dir: str | Path | None = None,
    build: str = "never",
    loop: str = "auto",
    progress: Progress | None = None,
    **plan: Any,
) -> Report:
    """Measure a bundle on this machine, in this process.

    Args:
        path: the bundle's directory; None = the built-in model.
        batches: batch sizes to measure, each >= 1.
        runs: whole plans that run for each batch size, >= 1, after one evaluation to warm up.
        runtime: see `Generator.load`.
        device: see `Generator.load`.
        variant: see `Generator.load`.
        threads: see `Generator.load`.
        cache_dir: see `Generator.load`.
        build: see `Generator.load`.
        loop: see `Generator.load`.
        progress: called after every run.
        **plan: sampler, steps and the sampler's options; see `Generator.plan`.

    Raises:
        ConfigError: an argument that cannot work; nothing has run then.
        DdpmEdgeError: as `Generator.load` and `Generator.run` raise them.
    """
    batches = [checks.whole("batch", batch) for batch in batches]
    runs = checks.whole("runs", runs)
    if not batches:
        raise ConfigError("batches is empty; give at least one batch size, such as 1")
    start = time.perf_counter()
    bundle = Bundle.open(path)
    plan_name = bundle.manifest.make_plan(**plan).name
    if bundle.manifest.class_names:
        plan["label"] = 0  # not every model can do without
    variant, opened = open_bundle(bundle, runtime, device, variant, threads, cache_dir, build)
    engine = TimedEngine(opened)
    with engine, Generator(bundle, engine, variant, loop=loop) as generator:
        load_ms = (time.perf_counter() - start) * 1e3
        ran_on = generator.run(1, seed=0, **plan).loop
        first_image_ms = (time.perf_counter() - start) * 1e3
        reports, done = [], 0
        for batch in batches:
            generator.warmup(batch)
            measured = []
            for _ in range(runs):
                measured.append(_run(generator, engine, batch, plan))
                done += batch  # about what it costs
                if progress is not None:
                    progress(done / (runs * sum(batches)), f"batch {batch}")
            reports.append(_batch_report(batch, measured))
        where = generator.runtime
    return Report(
        name=bundle.manifest.name,
        path=str(bundle.path),
        plan=plan_name,
        variant=variant,
        runtime=where,
        loop=ran_on,
        cpus=processor.cpus(),
        runs=runs,
        load_ms=load_ms,
        first_image_ms=first_image_ms,
        batches=tuple(reports),
        peak_memory_mb=_peak_memory_mb(),
    )


@dataclass(frozen=True)
class Candidate:
    """A variant of a bundle on a runtime.

    Attributes:
        variant: precision of the network.
        runtime: name of the runtime.
        report: what was measured; None = it cannot run here.
        reason: why not; "" = it can.
    """

    variant: str
    runtime: str
    report: Report | None
    reason: str

    @property
    def ms_a_step(self) -> float:
        """Of the batch that was measured, milliseconds; infinite where it cannot run."""
        return self.report.batches[0].ms_a_step if self.report else math.inf

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON."""
        report = self.report.to_dict() if self.report else None
        return {"variant": self.variant, "runtime": self.runtime, "reason": self.reason} | {
            "report": report
        }


def choose(
    path: str | Path | None = None,
    *,
    batch: int = 1,
    device: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    **arguments: Any,
) -> list[Candidate]:
    """Measure every variant of a bundle on every runtime, and remember the fastest runtimes.

    One after the other: the threads of two runtimes would slow each other. Afterwards
    `runtime="auto"` takes, for each variant, the runtime that was the fastest here, until the
    machine or a runtime changes. Which variant to take stays the caller's decision.

    Args:
        path: see `bench`.
        batch: samples at once, >= 1.
        device: see `bench`.
        cache_dir: where it is remembered as well; see `bench`.
        progress: called after every candidate.
        **arguments: see `bench`.

    Returns:
        One a variant and runtime, the fastest first.

    Raises:
        ConfigError: an argument that cannot work.
        BundleError: not a bundle.
        RuntimeUnavailableError: nothing can run here.

    Warns:
        CacheWarning: the choice could not be remembered.
    """
    bundle = Bundle.open(path)
    pairs = [(variant, runtime) for variant in bundle.manifest.variants for runtime in RUNTIMES]
    candidates = []
    for done, (variant, runtime) in enumerate(pairs, 1):
        report, reason = None, ""
        try:
            report = bench(
                path, batches=[batch], variant=variant, runtime=runtime, device=device,
                cache_dir=cache_dir, **arguments,
            )  # fmt: skip
        except CANNOT_RUN as error:
            reason = str(error)
        candidates.append(Candidate(variant, runtime, report, reason))
        if progress is not None:
            progress(done / len(pairs), f"{variant} by {runtime}")
    if not any(candidate.report for candidate in candidates):
        raise RuntimeUnavailableError("; ".join(f"{c.runtime}: {c.reason}" for c in candidates))
    directory = cache_directory(cache_dir)
    for variant in bundle.manifest.variants:
        of_variant = {
            c.runtime: c.ms_a_step for c in candidates if c.variant == variant and c.report
        }
        try:
            if of_variant:
                choice.remember(directory, bundle.model(variant)[1], device, of_variant)
        except OSError as error:
            warn(f"the choice cannot be remembered in {directory} ({error})", CacheWarning)
    return sorted(candidates, key=lambda candidate: candidate.ms_a_step)


def _run(
    generator: Generator, engine: TimedEngine, batch: int, plan: Mapping[str, Any]
) -> tuple[int, float, float]:
    """One plan: its rows, the seconds of all and those outside the engine."""
    engine.seconds = 0.0
    result = generator.run(batch, batch=batch, seed=0, **plan)
    seconds = result.milliseconds / 1e3
    outside = seconds - engine.seconds
    if result.loop == "device":
        outside = seconds_without_network(generator._open(), result.plan, batch)
    return len(result.plan), seconds, outside


def _batch_report(batch: int, measured: Sequence[tuple[int, float, float]]) -> BatchReport:
    steps = measured[0][0]
    ms = [seconds / steps * 1e3 for _, seconds, _ in measured]
    return BatchReport(
        batch=batch,
        steps=steps,
        ms_a_step=statistics.median(ms),
        ms_a_step_min=min(ms),
        ms_a_step_max=max(ms),
        loop_us=statistics.median(loop / steps * 1e6 for _, _, loop in measured),
        loop_percent=statistics.median(100 * loop / seconds for _, seconds, loop in measured),
    )


def _peak_memory_mb() -> float | None:
    with contextlib.suppress(OSError), open(PROC_STATUS, encoding="utf-8") as file:
        for line in file:  # Linux's ru_maxrss would be that of the parent, if larger
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
