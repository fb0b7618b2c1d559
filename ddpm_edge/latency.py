"""How long a step takes on this device: measured once for each batch, then remembered.

What is known goes along with what plain calls take since, in this process: a board that gets hot,
or another program, is seen within a few calls.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddpm_edge import checks
from ddpm_edge.errors import CacheWarning, ConfigError, DdpmEdgeError, warn
from ddpm_edge.plan import State
from ddpm_edge.runtimes import Engine, cuda
from ddpm_edge.runtimes.base import gpu_engine
from ddpm_edge.runtimes.measured import Measured

FILE = "latency.json"
STEPS, RUN_SECONDS = 5, 0.3  # of a run, or fewer if they take longer than that
WARM_UP = 3  # runs that are not counted
RUNS, LEAST_RUNS, SECONDS = 100, 3, 1.5  # of a measurement, likewise
KEPT = 0.9  # of the runs took no longer
RECENT = 30  # runs that count
OLD_SECONDS = 60.0  # is a measurement that nothing is refused by

log = logging.getLogger("ddpm_edge")


class Latency(NamedTuple):
    """Milliseconds that a batch takes; nine runs of ten took no longer.

    Attributes:
        call_ms: what is done once: the draws to start from, the images in the end.
        step_ms: a step, with one evaluation of the network.
    """

    call_ms: float
    step_ms: float

    def of(self, evaluations: int) -> float:
        """Milliseconds of a plan."""
        return self.call_ms + evaluations * self.step_ms


@dataclass
class Known:
    """What is known of a batch.

    Attributes:
        call_ms: see `Latency`; as it was measured.
        measured_at: when, by `time.perf_counter`; -infinity = by another process.
        recent_ms: a step in each of the last runs and calls.
    """

    call_ms: float
    measured_at: float
    recent_ms: deque[float]

    def latency(self) -> Latency:
        """As it is now."""
        return Latency(self.call_ms, usual(self.recent_ms))


class Latencies:
    """The latencies of one engine, by batch; threads may share it.

    Args:
        measured: where they are remembered; None = only here.
        model: SHA-256 of the ONNX file.
        engine: says what else they depend on besides the machine, such as "onnxruntime on cpu".
    """

    def __init__(self, measured: Measured | None, model: str, engine: Callable[[], str]) -> None:
        self._measured, self._model, self._engine = measured, model, engine
        self._known: dict[int, Known] = {}
        self._lock, self._measuring = threading.Lock(), threading.Lock()

    def of(self, batch: int, run: Callable[[], Latency], again: bool = False) -> Latency:
        """The latency of a batch; `run` takes the times of one run where it must be measured.

        Warns:
            CacheWarning: it cannot be remembered.
        """
        known = None if again else self._now(batch)
        if known is not None:
            return known
        with self._measuring:  # one at a time, while others use what is known
            known = None if again else self._now(batch)  # by now
            if known is not None:
                return known
            _several(run, WARM_UP, 1)
            recalled = None if again else self._recalled(batch)
            if recalled is not None:
                return self._know(batch, [recalled] * RECENT, -math.inf)
            found = self._measure(batch, run)
            self._remember(batch, found)
            return found

    def renew(self, batch: int, run: Callable[[], Latency]) -> None:
        """Measure what was measured more than a minute ago, for this process alone."""
        with self._measuring:
            if time.perf_counter() - self._known[batch].measured_at > OLD_SECONDS:
                self._measure(batch, run)

    def note(self, batch: int, milliseconds: float, evaluations: int) -> None:
        """What a call took, of a batch whose latency is known."""
        with self._lock:
            known = self._known[batch]
            if milliseconds > known.call_ms:
                known.recent_ms.append((milliseconds - known.call_ms) / evaluations)

    def _now(self, batch: int) -> Latency | None:
        with self._lock:
            return self._known[batch].latency() if batch in self._known else None

    def _measure(self, batch: int, run: Callable[[], Latency]) -> Latency:
        return self._know(batch, _several(run, RUNS, LEAST_RUNS), time.perf_counter())

    def _know(self, batch: int, runs: list[Latency], measured_at: float) -> Latency:
        """Take these runs for what is known; what all of them say."""
        call_ms, step_ms = zip(*runs, strict=True)
        found = Latency(usual(call_ms), usual(step_ms))
        with self._lock:
            self._known[batch] = Known(found.call_ms, measured_at, deque(step_ms, RECENT))
        return found

    def _key(self, batch: int) -> str:
        return f"{self._engine()}, batch {batch}"

    def _recalled(self, batch: int) -> Latency | None:
        record = self._measured.find(self._model, self._key(batch)) if self._measured else {}
        try:
            found = Latency(*(checks.number(name, record[name]) for name in Latency._fields))
        except (KeyError, ConfigError):  # never measured, or damaged
            return None
        return found if 0 <= found.call_ms < math.inf and 0 < found.step_ms < math.inf else None

    def _remember(self, batch: int, latency: Latency) -> None:
        log.info("%s: %.3g ms a step here", self._key(batch), latency.step_ms)
        if self._measured is None:
            return
        try:
            self._measured.note(self._model, self._key(batch), latency._asdict())
        except OSError as error:
            warn(f"latencies cannot be remembered in {self._measured.file} ({error})", CacheWarning)


def measured_in(directory: Path) -> Measured:
    """All latencies that are remembered in the device's cache."""
    return Measured(directory / FILE)


def engine_name(engine: Engine, threads: int | None, loop: str = "auto") -> str:
    """What a latency depends on besides the model and the machine."""
    words = [f"{engine.runtime} on {engine.device}"]
    if engine.device.startswith("cuda"):
        with contextlib.suppress(DdpmEdgeError, MemoryError):  # an engine may do without
            words.append(cuda.gpu(engine.device).name)
        if loop != "host" and gpu_engine(engine) is not None:
            words.append("loop on the device")
    if threads is not None:
        words.append(f"{threads} threads")
    return ", ".join(words)


def _several(run: Callable[[], Latency], most: int, least: int) -> list[Latency]:
    """What several runs took."""
    end = time.perf_counter() + SECONDS
    runs: list[Latency] = []
    while len(runs) < most and (len(runs) < least or time.perf_counter() < end):
        runs.append(run())
    return runs


def usual(times: Collection[float]) -> float:
    """What nine of ten keep."""
    return sorted(times)[math.ceil(KEPT * len(times)) - 1]


def timed(start: Callable[[], object], states: Iterable[State]) -> Latency:
    """The times of one run: of `start`, and of an evaluation, by the first rows of a plan."""
    before = time.perf_counter()
    start()
    begun = time.perf_counter()
    for state in states:
        state.wait()
        evaluations = int(np.count_nonzero(state.plan.evaluate[: state.index + 1]))
        seconds = time.perf_counter() - begun
        if evaluations == STEPS or seconds > RUN_SECONDS:
            break
    return Latency((begun - before) * 1e3, seconds / evaluations * 1e3)
