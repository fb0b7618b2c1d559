"""The loop with its state on a GPU: x, what it remembers of it and the noise never leave it.

A step there is `begin`, which goes to the next row of the table, the network, and `advance`, which
is the row's update (step.cu). All that changes from row to row is in the table, so that from its
second time on a step is the replay of one CUDA graph.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import threading
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any, ClassVar, cast

import numpy as np

from ddpm_edge.arrays import Array
from ddpm_edge.errors import (
    ClosedError,
    DdpmEdgeError,
    EngineError,
    EngineLostError,
    NonFiniteError,
)
from ddpm_edge.guidance import Guidance, Labels
from ddpm_edge.manifest import Manifest
from ddpm_edge.plan import Clip, Plan, Row, not_finite
from ddpm_edge.restoration import Mask, Measurement, ddnm_plus
from ddpm_edge.runtimes import cuda
from ddpm_edge.runtimes.base import GpuEngine, Resident

KEPT = 4  # loops that wait for the next call of their batch size
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

    def __init__(self, loop: DeviceLoop, index: int, plan: Plan) -> None:
        self.index, self.t, self.plan = index, int(plan.t[index]), plan
        self._of = loop
        self._arrays: dict[str, Array] = {}

    @property
    def x(self) -> Array:
        """The state after the row; float32 (B, C, H, W)."""
        return self._copied("x")

    @property
    def m(self) -> Array:
        """The network's answer in the plan's form; float32 (B, C, H, W)."""
        return self._copied("m")

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
            self._arrays |= self._of.read(missing, self.plan)

    def _copied(self, name: str) -> Array:
        if name not in self._arrays:
            self._arrays |= self._of.read([name], self.plan)
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
        self._queued = 0
        self.ended: DdpmEdgeError | None = None  # what every further use raises
        try:
            with lock:
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
            "run": ctypes.sizeof(Run),
        }.items():  # fmt: skip
            self._memory(name, bytes_)
        self._buffers.of("bad", batch * 4, shared=True)  # the host looks into it after every step
        addresses = {"x": "x", "t": "t", "label": "label", "prediction": "answer"}
        known = {*self._engine.inputs, *self._engine.outputs}
        self._addresses = {
            name: self._memory(own, 0).address for name, own in addresses.items() if name in known
        }
        for _ in range(AHEAD):
            flags = cuda.WAIT_ASLEEP | cuda.NO_TIMES
            self._events.append(cuda.call("cudaEventCreateWithFlags", flags))

    def _memory(self, name: str, size: int) -> cuda.Memory:
        """Memory of the loop; where there is one memory, host and GPU share what both look at."""
        return self._buffers.of(name, size, self._engine.gpu.integrated and name != "answer")

    def run(
        self,
        plan: Plan,
        x: Array,
        seed: int,
        first: int,
        labels: Labels,
        guidance: Guidance | None,
        measurement: Measurement | None,
        ask: bool = True,
    ) -> Iterator[DeviceState]:
        """Run a plan, yielding after every row; arguments as of `sampling.sample_states`.

        Without `ask` it does all but to evaluate the network: what the loop itself costs.

        Raises:
            NonFiniteError: an answer with NaN or infinity; seen up to two steps later.
            EngineError: the GPU or the engine failed.
        """
        on_x0 = plan.clip is not None or measurement is not None
        rows = plan.rows(self._manifest.prediction, "x0" if on_x0 else None)
        guided = [guidance is not None and guidance.at(row.t) is not None for row in rows]
        state = None
        try:
            self._load(plan, rows, guided, x, seed, first, labels, guidance, measurement)
            for i, row in enumerate(rows):
                asks = ask and row.evaluate
                questions = self._shape[0] * (2 if guided[i] else 1) if asks else 0
                self._queue(lambda n=questions: self._step(n))  # type: ignore[misc]
                state = DeviceState(self, i, plan)
                if i + 1 == len(rows):
                    state.keep()
                else:
                    self._wait_for(self._queued - AHEAD)
                    self._check(plan)
                yield state
        finally:
            self._synchronize()
            if state is not None:
                with contextlib.suppress(ClosedError, EngineError, NonFiniteError):  # no one asked
                    state.keep()

    def _load(
        self,
        plan: Plan,
        rows: list[Row],
        guided: list[bool],
        x: Array,
        seed: int,
        first: int,
        labels: Labels,
        guidance: Guidance | None,
        measurement: Measurement | None,
    ) -> None:
        """Write all that the steps need."""
        manifest, batch = self._manifest, self._shape[0]
        clip = Clip.parse(plan.clip)
        twice = 2 if self.guided else 1
        arrays = {
            "x": np.concatenate([x] * twice),
            "row": np.array([-1], np.int32),
            "bad": np.full(batch, -1, np.int32),
            "table": _table(rows, guided, plan, measurement, manifest.timestep_offset),
            "b": plan.b.astype(np.float32),
        }
        history = math.prod(self._shape) * plan.b.shape[1] * 4
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
            seed=seed, first=first, batch=batch, values=math.prod(self._shape[1:]),
            history=plan.b.shape[1], questions=batch * twice, form_eps=plan.form == "eps",
            on_x0=plan.clip is not None or measurement is not None,
            limit=math.inf if clip is None else clip.limit,
        )  # fmt: skip

        def write() -> None:
            memory = {name: self._memory(name, array.nbytes) for name, array in arrays.items()}
            self._memory("m", history).clear(history, self._stream)
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
            if resident is None or resident.capturable:
                self._graphs[questions] = None
            return
        graph = self._graphs[questions]
        if graph is None:
            try:
                graph = cuda.capture(lambda: self._queue_step(questions), self._stream)
            except EngineLostError:
                raise
            except EngineError as error:
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
            if questions not in self._residents:
                self._residents[questions] = self._engine.resident(questions, self._addresses)
            self._residents[questions]()
        self._kernels.launch("advance", math.prod(self._shape), run, self._stream)

    # The stream

    def _queue(self, work: Callable[[], object]) -> None:
        """Queue work, and an event behind it."""
        with self._lock:
            if self.ended is not None:
                raise self.ended
            cuda.use(self._engine.gpu)
            work()
            cuda.call("cudaEventRecord", self._events[self._queued % AHEAD], self._stream)
            self._queued += 1

    def _wait_for(self, number: int) -> None:
        """Until that work, of the last `AHEAD`, is done."""
        cuda.call("cudaEventSynchronize", self._events[number % AHEAD])

    def wait(self) -> None:
        """Until all that was queued is done."""
        if self._queued:
            self._wait_for(self._queued - 1)

    def _synchronize(self) -> None:
        """Until the stream has nothing left of this loop, whatever interrupted it."""
        with self._lock:
            if self.ended is None:  # else who closed the engine has waited
                cuda.call("cudaStreamSynchronize", self._stream)

    def read(self, names: list[str], plan: Plan) -> dict[str, Array]:
        """Copies of the loop's arrays, as the last step left them; float32 (B, C, H, W).

        Raises:
            NonFiniteError: the network has answered with NaN or infinity.
        """
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
        rows = self._buffers.of("bad", 0, shared=True).view(self._shape[:1], np.int32)
        bad = np.flatnonzero(rows >= 0)
        if len(bad):
            raise not_finite(plan, int(rows[bad].min()), bad.tolist(), self._shape[0])

    def fits(self, batch: int, guided: bool) -> bool:
        """Whether it is for batches of this size."""
        return self._shape[0] == batch and self.guided == guided

    def free(self) -> None:
        """Free what it holds on the GPU, when nothing is queued."""
        with contextlib.suppress(EngineLostError):  # nothing can be freed on a lost GPU
            cuda.use(self._engine.gpu)
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
        lock: held while anything is queued on the engine's stream.
    """

    def __init__(
        self,
        manifest: Manifest,
        engine: GpuEngine,
        lock: contextlib.AbstractContextManager[object],
    ) -> None:
        self._manifest, self._engine, self._lock = manifest, engine, lock
        self._kernels: cuda.Kernels | None = None
        self._broken = ""
        self._idle: list[DeviceLoop] = []  # the last one used at the end
        self._lent: set[DeviceLoop] = set()
        self._lending = threading.Lock()
        self._ended: DdpmEdgeError | None = None

    def cannot(self) -> str:
        """Why no loop runs on this GPU; "" = they do."""
        with self._lending, self._lock:
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

    @contextlib.contextmanager
    def lent(self, batch: int, guided: bool) -> Iterator[DeviceLoop]:
        """A loop for a batch of this size, as long as the context lasts."""
        loop = self._take(batch, guided)
        try:
            yield loop
        except EngineLostError as error:
            self._end(error)
            raise
        finally:
            self._give_back(loop)

    def _take(self, batch: int, guided: bool) -> DeviceLoop:
        with self._lending:
            if self._ended is not None:
                raise self._ended
            for loop in reversed(self._idle):
                if loop.fits(batch, guided):
                    self._idle.remove(loop)
                    break
            else:
                loop = DeviceLoop(
                    self._manifest,
                    self._engine,
                    self._lock,
                    cast(cuda.Kernels, self._kernels),
                    batch,
                    guided,
                )
            self._lent.add(loop)
            return loop

    def _give_back(self, loop: DeviceLoop) -> None:
        with self._lending:
            self._lent.remove(loop)
            self._idle.append(loop)
            self._free()

    def close(self) -> None:
        """Free those that are not at work, and the others when they are given back."""
        self._end(ClosedError("the engine was closed; open it again"))
        with self._lending:
            self._free()

    def _free(self) -> None:
        """Free the loops that are too many, and all when no more calls may come."""
        with self._lock:
            while self._idle and (self._ended or len(self._idle) > KEPT):
                self._idle.pop(0).free()
            if self._ended and not self._lent and self._kernels is not None:
                kernels, self._kernels = self._kernels, None
                with contextlib.suppress(EngineLostError):
                    kernels.free()

    def _end(self, error: DdpmEdgeError) -> None:
        """Let every further use raise this."""
        with self._lending, self._lock:
            self._ended = error
            for loop in self._lent:
                loop.ended = error


def _table(
    rows: list[Row],
    guided: list[bool],
    plan: Plan,
    measurement: Measurement | None,
    timestep_offset: int,
) -> Array:
    """The rows as `Row` of step.cu; TABLE (N,)."""
    table = np.zeros(len(rows), TABLE)
    for name in ("t", "stream", "number", "from_x", "from_answer", "signal", "noise", "a", "s",
                 "evaluate"):  # fmt: skip
        table[name] = [getattr(row, name) for row in rows]
    table["t"] += timestep_offset
    table["eps_from_x"] = 1.0 / plan.noise
    table["eps_from_x0"] = -plan.signal / plan.noise
    table["guided"] = guided
    table["weight"] = table["kept"] = 1.0
    if measurement is not None and measurement.sigma_y > 0.0:
        weight, kept = ddnm_plus(plan, measurement.operator.singular, measurement.sigma_y)
        table["weight"], table["kept"] = weight[:, 0], kept[:, 0]
    return table
