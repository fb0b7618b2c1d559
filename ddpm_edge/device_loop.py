"""The loop with its state on a GPU: x, what it remembers of it and the noise never leave it.

A step there is `begin`, which goes to the next row of the table, the network, and `advance`, which
is the row's update (step.cu). All that changes from row to row is in the table, so that from its
second time on a step is the replay of one CUDA graph, where the engine can be captured.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Any, ClassVar, cast

import numpy as np

from ddpm_edge.arrays import Array
from ddpm_edge.errors import (
    ClosedError,
    DdpmEdgeError,
    EngineError,
    EngineLostError,
    RuntimeUnavailableError,
)
from ddpm_edge.guidance import Guidance, Labels
from ddpm_edge.manifest import Manifest
from ddpm_edge.plan import Clip, Plan, not_finite
from ddpm_edge.restoration import Mask, Measurement, ddnm_plus
from ddpm_edge.runtimes import cuda
from ddpm_edge.runtimes.base import GpuEngine, Resident

KEPT = 4  # loops that wait for the next call; a batch size with guidance is another
AHEAD = 2  # steps that are queued at most: the GPU does not wait, and whatever ends a call can

log = logging.getLogger("ddpm_edge")

POINTERS = ("row", "bad", "table", "b", "t", "x", "answer", "m", "x0", "push", "known", "y")
FLOATS = ("from_x", "from_answer", "signal", "noise", "eps_from_x", "eps_from_x0", "a", "s",
          "weight", "kept")  # fmt: skip
TABLE = np.dtype(
    [("t", np.int64), ("stream", np.uint64), ("number", np.uint64)]
    + [(name, np.float32) for name in FLOATS]
    + [("evaluate", np.int32), ("guided", np.int32)],
    align=True,
)


class Run(ctypes.Structure):
    """What the kernels know of a run: `Run` of step.cu, in the same order."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("seed", "first")),
        *((name, ctypes.c_int64) for name in ("batch", "values", "history", "questions")),
        ("form_eps", ctypes.c_int32),
        ("on_x0", ctypes.c_int32),
        ("limit", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in POINTERS),
    )


@dataclass(frozen=True, eq=False)
class Job:
    """A plan and what it runs for: the arguments of `sampling.sample_states`, and whether to ask.

    Attributes:
        x: the state to start from, float32 (B, C, H, W), left as it is.
        first: index of the first sample.
        ask: whether the network is evaluated; without, what is left is what the loop costs.
    """

    plan: Plan
    x: Array
    seed: int
    first: int
    labels: Labels = None
    guidance: Guidance | None = None
    measurement: Measurement | None = None
    ask: bool = True

    @property
    def on_x0(self) -> bool:
        """Whether every x0 is clipped or measured."""
        return self.plan.clip is not None or self.measurement is not None

    @cached_property
    def questions(self) -> list[int]:
        """How many questions the network gets in each row: none, B or 2 B."""
        batch, guidance = len(self.x), self.guidance
        twice = [guidance is not None and guidance.at(t) is not None for t in self.plan.t.tolist()]
        asked: list[int] = (self.ask * batch * self.plan.evaluate * np.where(twice, 2, 1)).tolist()
        return asked


def cannot(plan: Plan, measurement: Measurement | None) -> str:
    """Why the loop on the device does not run this; "" = it does."""
    clip = Clip.parse(plan.clip)
    if clip is not None and clip.percentile is not None:
        return f"it does not clip at a percentile (clip={plan.clip!r})"
    if measurement is not None and not isinstance(measurement.operator, Mask):
        return f"it imposes no {type(measurement.operator).__name__}, only a Mask"
    return ""


class DeviceState:
    """Where a plan that runs on a GPU is (see `plan.State`); what is read is copied back then."""

    loop: ClassVar[str] = "device"

    def __init__(self, loop: DeviceLoop, run: int, index: int, plan: Plan) -> None:
        self.index, self.t, self.plan = index, int(plan.t[index]), plan
        self._of, self._run = loop, run
        self._arrays: dict[str, Array] = {}

    @property
    def x(self) -> Array:
        """The state after the row; float32 (B, C, H, W)."""
        return self._copied("x")

    @property
    def m(self) -> Array:
        """The network's answer in the plan's form; float32 (B, C, H, W)."""
        return self._copied("m")

    @property
    def warm(self) -> bool:
        """Whether the steps that follow are as quick as they become."""
        return self._of.warm

    def x0(self) -> Array:
        """The x0 that this row saw; a new array."""
        return np.array(self._copied("x0"))

    def wait(self) -> None:
        """Until the row has been computed."""
        self._of.wait()

    def keep(self) -> None:
        """Copy back what somebody may still ask for: the loop goes on, or to another call."""
        missing = [name for name in ("x", "m", "x0") if name not in self._arrays]
        if missing:
            self._arrays |= self._of.read(missing, self._run, self.plan)

    def _copied(self, name: str) -> Array:
        if name not in self._arrays:
            self._arrays |= self._of.read([name], self._run, self.plan)
        return self._arrays[name]


class DeviceLoop:
    """The loop for batches of one size; one run at a time.

    Args:
        manifest: what is known of the network.
        engine: what evaluates it.
        lock: held while anything is queued on the engine's stream.
        kernels: of step.ptx.
        batch: samples.
        guided: whether there is room to ask twice.
    """

    def __init__(
        self,
        manifest: Manifest,
        engine: GpuEngine,
        lock: contextlib.AbstractContextManager[object],
        kernels: cuda.Kernels,
        batch: int,
        guided: bool,
    ) -> None:
        self.guided = guided
        self._manifest, self._engine, self._lock, self._kernels = manifest, engine, lock, kernels
        self._stream = cast(int, engine.stream)
        self._shape = (batch, *manifest.sample_shape)
        self._buffers = cuda.Buffers()
        self._residents: dict[int, Resident] = {}
        # By questions: None = it ran once and is not captured yet, False = it cannot be.
        self._graphs: dict[int, Any] = {}
        self._events: list[Any] = []
        self._queued = self._runs = 0
        self.ended: DdpmEdgeError | None = None  # what every further use raises
        with lock:
            try:
                cuda.use(engine.gpu)
                self._make_room(batch * (2 if guided else 1))
            except BaseException:
                self.free()
                raise

    def _make_room(self, questions: int) -> None:
        """Allocate all that does not depend on a plan."""
        batch, size = self._shape[0], math.prod(self._shape) * 4
        for name, bytes_ in {
            "x": size * questions // batch, "answer": size * questions // batch, "x0": size,
            "t": questions * 8, "label": questions * 8, "push": batch * 4, "row": 4,
            "bad": batch * 4, "run": ctypes.sizeof(Run),
        }.items():  # fmt: skip
            self._memory(name, bytes_)
        addresses = {"x": "x", "t": "t", "label": "label", "prediction": "answer"}
        known = {*self._engine.inputs, *self._engine.outputs}
        self._addresses = {
            name: self._memory(own, 0).address for name, own in addresses.items() if name in known
        }
        for _ in range(AHEAD):
            flags = cuda.WAIT_ASLEEP | cuda.NO_TIMES
            self._events.append(cuda.call("cudaEventCreateWithFlags", flags))

    def _memory(self, name: str, size: int) -> cuda.Memory:
        """Memory of the loop; host and GPU share what the host looks into after every step.

        Where there is one memory, they share x0 too, which the GPU writes and never reads: what is
        shared it does not cache (CUDA for Tegra, "Memory Selection").
        """
        shared = name == "bad" or (name == "x0" and self._engine.gpu.integrated)
        return self._buffers.of(name, size, shared)

    def prepare(self, job: Job) -> None:
        """Allocate what a job needs.

        Raises:
            EngineError: the engine does not take so many questions at once.
            MemoryError: too little memory on the GPU.
        """
        with self._lock:
            self._check_open()
            cuda.call("cudaStreamSynchronize", self._stream)  # whatever interrupted the last run
            self._memory("m", self._history(job.plan))
            self._memory("table", len(job.plan) * TABLE.itemsize)
            self._memory("b", job.plan.b.size * 4)
            for count in set(job.questions) - {0, *self._residents}:
                self._residents[count] = self._engine.resident(count, self._addresses)

    def _history(self, plan: Plan) -> int:
        """Bytes of the answers that a plan remembers."""
        return math.prod(self._shape) * int(plan.b.shape[1]) * 4

    def run(self, job: Job) -> Iterator[DeviceState]:
        """Run a job that was prepared (see `DeviceLoops.run`)."""
        plan, questions = job.plan, job.questions
        self._runs += 1
        state = None
        try:
            self._load(job, questions)
            for i, count in enumerate(questions):
                state = DeviceState(self, self._runs, i, plan)
                self._queue(lambda n=count: self._step(n))  # type: ignore[misc]
                if i + 1 == len(questions):
                    state.keep()
                else:
                    self._wait_for(self._queued - AHEAD)
                    self._check(plan)
                yield state
        finally:
            if state is not None:  # an error is met again by who reads what could not be kept
                with contextlib.suppress(DdpmEdgeError, MemoryError), cuda.unchanged():
                    state.keep()

    def _load(self, job: Job, questions: list[int]) -> None:
        """Write all that the steps need."""
        plan, labels, guidance = job.plan, job.labels, job.guidance
        measurement = job.measurement
        manifest, batch = self._manifest, self._shape[0]
        clip = Clip.parse(plan.clip)
        twice = 2 if self.guided else 1
        arrays = {
            "x": np.concatenate([job.x] * twice),
            "row": np.array([-1], np.int32),
            "bad": np.full(batch, -1, np.int32),
            "table": _table(job, questions, manifest),
            "b": plan.b.astype(np.float32),
        }
        if labels is None:
            labels = manifest.no_label(batch)
        if labels is not None:
            no_label = labels[:0] if guidance is None else manifest.no_label(batch)
            arrays["label"] = np.concatenate([labels, cast(Array, no_label)])
        if guidance is not None:
            has_label = labels != manifest.null_label
            arrays["push"] = np.where(has_label, guidance.scale - 1, 0).astype(np.float32)
        if measurement is not None:
            everywhere = np.ones(self._shape, np.float32)
            arrays["known"] = measurement.operator.forward(everywhere)
            arrays["y"] = np.broadcast_to(measurement.y, self._shape)
        run = Run(
            seed=job.seed, first=job.first, batch=batch, values=math.prod(self._shape[1:]),
            history=plan.b.shape[1], questions=batch * twice, form_eps=plan.form == "eps",
            on_x0=job.on_x0, limit=math.inf if clip is None else clip.limit,
        )  # fmt: skip

        def write() -> None:
            memory = {name: self._memory(name, array.nbytes) for name, array in arrays.items()}
            self._memory("m", 0).clear(self._history(plan), self._stream)
            for name, array in arrays.items():
                memory[name].write(array, self._stream)
            for name in POINTERS:
                there = measurement is not None or name not in ("known", "y")
                setattr(run, name, self._memory(name, 0).address if there else None)
            bytes_ = np.frombuffer(bytes(run), np.uint8)
            self._memory("run", len(bytes_)).write(bytes_, self._stream)

        self._queued = 0
        self._queue(write)

    # A step

    def _step(self, questions: int) -> None:
        """Queue a step that asks the network so many questions, by its graph if there is one."""
        if questions not in self._graphs:
            self._queue_step(questions)
            resident = self._residents.get(questions)
            capturable = resident is None or resident.capturable
            self._graphs[questions] = None if capturable else False
            return
        graph = self._graphs[questions]
        if graph is None:
            try:
                graph = cuda.capture(lambda: self._queue_step(questions), self._stream)
            except EngineLostError:
                raise
            except (EngineError, RuntimeUnavailableError, MemoryError) as error:
                log.warning("no CUDA graph of a step: %s", error)
                graph = False
            self._graphs[questions] = graph
        if graph is False:
            self._queue_step(questions)
        else:
            cuda.call("cudaGraphLaunch", graph, self._stream)

    def _queue_step(self, questions: int) -> None:
        """Queue the kernels of a step."""
        run = self._memory("run", 0).address
        self._kernels.launch("begin", 1, run, self._stream)
        if questions:
            self._residents[questions]()
        self._kernels.launch("advance", math.prod(self._shape), run, self._stream)

    # The stream

    def _queue(self, work: Callable[[], object]) -> None:
        """Queue work, and an event behind it."""
        with self._lock:
            self._check_open()
            work()
            cuda.call("cudaEventRecord", self._events[self._queued % AHEAD], self._stream)
            self._queued += 1

    def _check_open(self) -> None:
        """Make it this thread's GPU; raise unless something can be queued on it."""
        if self.ended is not None:
            raise self.ended
        self._engine.check_open()
        cuda.use(self._engine.gpu)

    def _wait_for(self, number: int) -> None:
        """Until that work, of the last `AHEAD`, is done."""
        cuda.call("cudaEventSynchronize", self._events[number % AHEAD])

    def wait(self) -> None:
        """Until all that was queued is done."""
        if self._queued:
            self._wait_for(self._queued - 1)

    def read(self, names: list[str], run: int, plan: Plan) -> dict[str, Array]:
        """Copies of the loop's arrays, as the last step of a run left them; float32 (B, C, H, W).

        Raises:
            NonFiniteError: the network has answered with NaN or infinity.
            EngineError: it is another run's now.
        """
        if run != self._runs:
            raise EngineError("the loop on the GPU has gone on to another call, or was freed")
        hosts: dict[str, Array] = {}

        def read() -> None:
            for name in names:
                hosts[name] = self._memory(name, 0).read(self._shape, np.float32, self._stream)

        self._queue(read)
        self.wait()
        self._check(plan)
        return {name: host.copy() for name, host in hosts.items()}

    def _check(self, plan: Plan) -> None:
        """Raise NonFiniteError if a step that is done has seen an answer that is not finite."""
        rows = self._memory("bad", 0).view(self._shape[:1], np.int32)
        if (rows >= 0).any():
            first = int(rows[rows >= 0].min())
            raise not_finite(plan, first, np.flatnonzero(rows == first).tolist(), len(rows))

    @property
    def warm(self) -> bool:
        """Whether its steps of every kind are as quick as they become."""
        known = [self._graphs.get(count) is not None for count in self._residents]
        return all(known) and bool(known)

    def fits(self, batch: int, guided: bool) -> bool:
        """Whether it is for batches of this size."""
        return self._shape[0] == batch and self.guided == guided

    def free(self) -> None:
        """Free what it holds on the GPU; its states have nothing to read any more."""
        self._runs, self._queued = self._runs + 1, 0
        with contextlib.suppress(EngineLostError):  # nothing can be freed on a lost GPU
            cuda.use(self._engine.gpu)
            with contextlib.suppress(ClosedError):  # closing has waited
                self._engine.check_open()
                cuda.call("cudaStreamSynchronize", self._stream)
            for graph in self._graphs.values():
                if graph:
                    cuda.call("cudaGraphExecDestroy", graph)
            self._graphs.clear()
            self._residents.clear()
            while self._events:
                cuda.call("cudaEventDestroy", self._events.pop())
            self._buffers.free()


class DeviceLoops:
    """The loops on an engine's GPU; those that are not at work wait for the next call.

    Args:
        manifest: what is known of the network.
        engine: what evaluates it.
        lock: of the engine's stream, and of what is here; reentrant, since a generator that nobody
            holds any more may be closed in the midst of anything.
    """

    def __init__(
        self,
        manifest: Manifest,
        engine: GpuEngine,
        lock: contextlib.AbstractContextManager[object],
    ) -> None:
        self._manifest, self._engine, self._lock = manifest, engine, lock
        self._pid = os.getpid()
        self._kernels: cuda.Kernels | None = None
        self._broken = ""
        self._idle: list[DeviceLoop] = []  # the last one used at the end
        self._lent: set[DeviceLoop] = set()
        self._ended: DdpmEdgeError | None = None

    def cannot(self) -> str:
        """Why no loop runs on this GPU; "" = they do."""
        with self._lock:
            if self._kernels is None and not self._broken and self._ended is None:
                try:
                    ptx = resources.files("ddpm_edge").joinpath("step.ptx").read_bytes()
                    cuda.use(self._engine.gpu)
                    self._kernels = cuda.Kernels(ptx, "begin", "advance")
                except EngineLostError as error:
                    self._ended = error
                    raise
                except EngineError as error:  # a driver or a GPU that is too old
                    self._broken = f"the GPU does not take its kernels: {error}"
                    log.warning("the loop runs on the host: %s", self._broken)
            return self._broken

    def is_warm(self, batch: int, guided: bool) -> bool:
        """Whether the steps of such a batch are as quick as they become."""
        with self._lock:
            return any(loop.fits(batch, guided) and loop.warm for loop in self._idle)

    def run(self, job: Job) -> Iterator[DeviceState]:
        """Run a job, yielding after every row.

        Raises:
            NonFiniteError: an answer with NaN or infinity; seen up to two steps later.
            EngineError: the GPU or the engine failed.
            MemoryError: too little memory on the GPU.
        """
        try:
            loop = self._take(job)
            try:
                yield from loop.run(job)
            finally:
                with cuda.unchanged():
                    self._give_back(loop)
        except EngineLostError as error:
            self._end(error)
            raise
        except MemoryError:  # in the midst of a run, such as ONNX Runtime's: the next call has room
            with self._lock:
                self._keep_idle(0)
            raise

    def _take(self, job: Job) -> DeviceLoop:
        with self._lock:
            if self._ended is not None:
                raise self._ended
            try:
                loop = self._prepared(job)
            except MemoryError:
                self._keep_idle(0)
                loop = self._prepared(job)
            self._lent.add(loop)
            return loop

    def _prepared(self, job: Job) -> DeviceLoop:
        batch, guided = len(job.x), job.guidance is not None
        for loop in reversed(self._idle):
            if loop.fits(batch, guided):
                self._idle.remove(loop)
                break
        else:
            kernels = cast(cuda.Kernels, self._kernels)
            loop = DeviceLoop(self._manifest, self._engine, self._lock, kernels, batch, guided)
        try:
            loop.prepare(job)
        except BaseException:  # an interrupt too: it stays known, and is freed one day
            self._idle.append(loop)
            raise
        return loop

    def _give_back(self, loop: DeviceLoop) -> None:
        with self._lock:
            self._lent.remove(loop)
            self._idle.append(loop)
            self._free()

    def close(self) -> None:
        """Free those that are not at work, and the others when they are given back."""
        with self._lock:
            self._end(ClosedError("the engine was closed; open it again"))
            self._free()

    def __del__(self) -> None:
        cuda.collected(self.close, self._pid)

    def _end(self, error: DdpmEdgeError) -> None:
        """Let every further use raise this."""
        with self._lock:
            self._ended = error
            for loop in tuple(self._lent):
                loop.ended = error

    def _free(self) -> None:
        """Free the loops that are too many; all that is not at work when no more calls may come."""
        self._keep_idle(KEPT if self._ended is None else 0)
        if self._ended is not None and not self._lent and self._kernels is not None:
            kernels, self._kernels = self._kernels, None
            with contextlib.suppress(EngineLostError):
                cuda.use(self._engine.gpu)
                kernels.free()

    def _keep_idle(self, count: int) -> None:
        """Free the loops that were used the longest ago, but for so many."""
        while len(self._idle) > count:
            self._idle.pop(0).free()


def _table(job: Job, questions: list[int], manifest: Manifest) -> Array:
    """The rows as `Row` of step.cu; TABLE (N,)."""
    plan, measurement = job.plan, job.measurement
    rows = plan.rows(manifest.prediction, "x0" if job.on_x0 else None)
    table = np.zeros(len(rows), TABLE)
    for name in ("t", "stream", "number", "from_x", "from_answer", "signal", "noise", "a", "s",
                 "evaluate"):  # fmt: skip
        table[name] = [getattr(row, name) for row in rows]
    table["t"] += manifest.timestep_offset
    table["eps_from_x"] = 1.0 / plan.noise
    table["eps_from_x0"] = -plan.signal / plan.noise
    table["guided"] = [count > len(job.x) for count in questions]
    table["weight"] = table["kept"] = 1.0
    if measurement is not None and measurement.sigma_y > 0.0:
        weight, kept = ddnm_plus(plan, measurement.operator.singular, measurement.sigma_y)
        table["weight"], table["kept"] = weight[:, 0], kept[:, 0]
    return table
