"""A call to the Generator, checked, and how its images are made batch by batch."""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ddpm_edge import checks, noise
from ddpm_edge.arrays import Array, Float32
from ddpm_edge.errors import ConfigError
from ddpm_edge.guidance import Guidance, Labels
from ddpm_edge.images import to_images
from ddpm_edge.manifest import Manifest
from ddpm_edge.plan import Plan, State
from ddpm_edge.restoration import part_of
from ddpm_edge.sampling import Network, enough_memory, sample_states
from ddpm_edge.tasks import Known, Task

Label = int | str | None
DTYPES = ("uint8", "float32")
MAX_SCALE = 1e6  # of guidance


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a running generation. The arrays are copies: keep them.

    They are made when they are first asked for, or when the loop goes on and somebody still holds
    the step: a callback that only counts costs nothing, where the loop runs on a GPU above all.

    Attributes:
        index: 0..total - 1.
        total: steps of the whole call.
        t: the timestep that the network was asked about.
        first: index of the first sample in x.
        x: the state after the step; float32 (n, C, H, W).
        x0: what the step predicted of the final image; float32 (n, C, H, W). Of a `Restore` task it
            agrees with what was measured, as the image will.
    """

    index: int
    total: int
    t: int
    first: int
    _x: Callable[[], Array] = field(repr=False)
    _x0: Callable[[], Array] = field(repr=False)

    @cached_property
    def x(self) -> Array:
        """See above."""
        return self._x()

    @cached_property
    def x0(self) -> Array:
        """See above."""
        return self._x0()

    def keep(self) -> None:
        """Make the arrays, if they are not: the loop goes on."""
        _ = self.x, self.x0


Callback = Callable[[Step], object]


class Deadline:
    """When a call must be done, in milliseconds from now; None = whenever.

    `step_s` says how long a step of so many samples takes, seconds, where that is known.
    """

    def __init__(self, milliseconds: float | None) -> None:
        self.step_s: dict[int, float] = {}
        self.start = time.perf_counter()
        self.end = np.inf
        if milliseconds is not None:
            self.end = self.start + check_milliseconds("deadline_ms", milliseconds) / 1e3
        self.begin(0)

    def pause(self, seconds: float) -> None:
        """Do not count the last so many seconds."""
        self.start += seconds
        self.end += seconds

    def milliseconds(self) -> float:
        """How long the call has taken."""
        return (time.perf_counter() - self.start) * 1e3

    def begin(self, samples: int) -> None:
        """Steps of so many samples begin."""
        self.samples, self.steps = samples, 0
        self.begun = self.before = time.perf_counter()

    def near(self, state: State, samples: int) -> bool:
        """After a step: whether another one, of so many samples, would end too late.

        It is as long as the last one; where it is known how long steps are, as long as that, or
        longer by what this call's steps are slower.
        """
        if self.end < np.inf:
            state.wait()
        now = time.perf_counter()
        step, self.before, self.steps = now - self.before, now, self.steps + 1
        if samples in self.step_s and self.samples in self.step_s:
            slower = (now - self.begun) / max(1e-9, self.steps * self.step_s[self.samples])
            step = self.step_s[samples] * max(1.0, slower)
        return now + step > self.end


class Made(NamedTuple):
    """A batch that is done, or was stopped.

    Attributes:
        chunk: the samples' indices.
        x: the state it ended with.
        state: the last step's; None where the plan has no rows.
        whole: whether nothing stopped it.
    """

    chunk: range
    x: Array
    state: State | None
    whole: bool

    @property
    def x0(self) -> Array:
        """The sample, or what was predicted of it so far."""
        return self.x if self.whole or self.state is None else self.state.x0()


@dataclass(frozen=True, eq=False)
class Request:
    """A checked call.

    Attributes:
        n: samples.
        labels: int64 (n,), or None where the model takes none.
        guidance: of the n samples; None = labels as they are.
        plan: what runs.
        seed: of all draws.
        first: index of the first sample.
        batch: samples in one evaluation.
        known: what is known of the images.
        latents: what to start from instead of the prior's draws, float32 (n or 1, C, H, W).
        sample_shape: (C, H, W).
        deadline: when it must be done.
    """

    n: int
    labels: Labels
    guidance: Guidance | None
    plan: Plan
    seed: int
    first: int
    batch: int
    known: Known
    latents: Float32 | None
    sample_shape: tuple[int, int, int]
    deadline: Deadline

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        n: int | None,
        *,
        label: Label | Sequence[Label] = None,
        guidance: float | Sequence[float] | None = None,
        guidance_interval: tuple[int, int] | None = None,
        task: Task | None = None,
        latents: Array | None = None,
        plan: Callable[[Known], Plan],
        seed: int | None = None,
        first: int = 0,
        batch: int | None = None,
        deadline_ms: float | None = None,
    ) -> Request:
        """The checked form of a call's arguments (see `Generator.run`); `batch` None = all at once.

        Raises:
            ConfigError: an argument that cannot work.
        """
        deadline = Deadline(deadline_ms)
        if isinstance(task, type) or (task is not None and not hasattr(task, "known")):
            raise ConfigError(f"task must be a Restore or a Vary; got {checks.shown(task)}")
        known = Known() if task is None else task.known(manifest.sample_shape)
        start = None if latents is None else _latents(latents, manifest.sample_shape)
        counts = {"task": known.count, "latents": 1 if start is None else len(start)}
        n = checks.whole("n", max(counts.values()) if n is None else n)
        for name, count in counts.items():
            if count not in (1, n):
                raise ConfigError(
                    f"got {count} images or states in {name} for n = {n}; give one, or n"
                )
        labels = label_numbers(manifest, label, n)
        return cls(
            n=n,
            labels=labels,
            guidance=_guidance(manifest, labels, label, guidance, guidance_interval),
            plan=plan(known),
            seed=noise.check_seed(seed),
            first=checks.whole("first", first, least=0, most=checks.MOST - n),
            batch=n if batch is None else checks.whole("batch", batch),
            known=known,
            latents=start,
            sample_shape=manifest.sample_shape,
            deadline=deadline,
        )

    def check(self) -> Request:
        """This, if its plan can do what is asked.

        Raises:
            ConfigError: it cannot.
        """
        if self.known.measurement is not None:
            self.known.measurement.check(self.plan)
        return self

    @property
    def asked_for_each(self) -> int:
        """How often the network is asked about each sample, at most."""
        return 1 if self.guidance is None else 2

    def chunks(self) -> list[range]:
        """The sample indices of each batch."""
        end = self.first + self.n
        return [range(i, min(i + self.batch, end)) for i in range(self.first, end, self.batch)]

    def part(self, chunk: range) -> slice:
        """Where a chunk's samples are in the arrays of the call."""
        return slice(chunk.start - self.first, chunk.stop - self.first)

    def start(self, chunk: range) -> Float32:
        """The states to start from; float32 (B, C, H, W).

        The prior's draws or the latents; noised images where there are any.
        """
        shape = (len(chunk), *self.sample_shape)
        with enough_memory(len(chunk)):
            if self.latents is None:
                z = noise.Draws(self.seed, chunk.start, shape).prior()
            else:
                z = np.array(np.broadcast_to(part_of(self.latents, self.part(chunk)), shape))
            image, strength = self.known.image, self.known.strength
            if image is None or strength == 1.0:  # x_T still has a trace of the image; z has none
                return z
            image = np.broadcast_to(part_of(image, self.part(chunk)), shape)
            if not len(self.plan):
                return np.array(image)
            signal, noise_ = float(self.plan.signal[0]), float(self.plan.noise[0])
            x: Float32 = signal * image + noise_ * z
            return x

    def made(self, network: Network, callback: Callback | None) -> Iterator[Made]:
        """One batch after the other, until one is stopped or the next would come too late."""
        if callback is not None and not callable(callback):
            raise ConfigError(
                f"callback must be a function of a Step; got {checks.shown(callback)}"
            )
        chunks = self.chunks()
        for chunk, following in itertools.zip_longest(chunks, chunks[1:], fillvalue=range(0)):
            x, state, asked, late = self.start(chunk), None, False, False
            self.deadline.begin(len(chunk))
            for state in self.states(network, chunk, x):
                if callback is not None:
                    asked = self.called(callback, state, chunk)
                last = state.index + 1 == len(self.plan)
                late = self.deadline.near(state, len(following if last else chunk))
                if asked or late:
                    break
            x = x if state is None else state.x
            whole = not asked and (state is None or state.index + 1 == len(self.plan))
            yield Made(chunk, x, state, whole)
            if late or not whole:
                return

    def called(self, callback: Callback, state: State, chunk: range) -> bool:
        """Call the callback; whether it asks to stop."""
        step = self.step(state, chunk)
        held = weakref.ref(step)
        answer = callback(step)
        del step
        if (still := held()) is not None:
            still.keep()
        return isinstance(answer, (bool, np.bool_)) and bool(answer)

    def steps(self, network: Network, chunk: range) -> Iterator[Step]:
        """Every step of one batch, as long as there is time."""
        start = self.start(chunk)
        self.deadline.begin(len(chunk))
        for state in self.states(network, chunk, start):
            step = self.step(state, chunk)
            yield step
            step.keep()  # the variable of a for loop, if nothing else, still holds it
            if self.deadline.near(state, len(chunk)):
                return

    def states(self, network: Network, chunk: range, start: Float32) -> Iterator[State]:
        """The loop over one chunk of samples."""
        part = self.part(chunk)
        measurement, guidance = self.known.measurement, self.guidance
        return sample_states(
            network,
            self.plan,
            self.seed,
            chunk,
            None if self.labels is None else self.labels[part],
            None if guidance is None else guidance._replace(scale=guidance.scale[part]),
            start,
            None if measurement is None else measurement.part(part),
        )

    def step(self, state: State, chunk: range) -> Step:
        """The public form of the loop's state."""
        rows = len(self.plan)
        before = (chunk.start - self.first) // self.batch * rows
        last = state.index + 1 == rows
        return Step(
            index=before + state.index,
            total=-(-self.n // self.batch) * rows,
            t=state.t,
            first=chunk.start,
            _x=lambda: self.finish(state.x, chunk) if last else state.x.copy(),
            _x0=lambda: self.finish(state.x0(), chunk),
        )

    def finish(self, x: Array, chunk: range) -> Array:
        """States that agree with what was measured; a new array."""
        measurement = self.known.measurement
        return x.copy() if measurement is None else measurement.part(self.part(chunk)).finish(x)

    def images(self, x: Array, chunk: range, dtype: str) -> Array:
        """The images of these states (see `to_images`)."""
        return to_images(self.finish(x, chunk), dtype)


def check_milliseconds(name: str, value: Any) -> float:
    """`value`, if it is a time to keep to.

    Raises:
        ConfigError: it is not.
    """
    if not 0.0 < checks.number(name, value) < np.inf:
        raise ConfigError(f"{name} must be a number of milliseconds above 0; got {value!r}")
    return float(value)


def check_dtype(dtype: Any) -> None:
    """Raise ConfigError unless images can be of this dtype."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be 'uint8' or 'float32'; got {checks.shown(dtype)}")


def label_numbers(manifest: Manifest, label: Any, n: int) -> Labels:
    """int64 (n,) for the network, or None where it takes no label."""
    if not manifest.class_names:
        if label is not None:
            raise ConfigError(
                f"the model {manifest.name!r} was trained without labels; leave label out"
            )
        return None
    labels = list(label) if is_many(label) else [label] * n
    if len(labels) != n:
        raise ConfigError(f"got {len(labels)} labels for n = {n} images; give one or n of them")
    return np.array([manifest.label_number(value) for value in labels], np.int64)


def _guidance(
    manifest: Manifest, labels: Labels, label: Any, scale: Any, interval: Any
) -> Guidance | None:
    """The checked form of `guidance` and `guidance_interval`; None where nothing is to be done."""
    if scale is None:
        if interval is not None:
            raise ConfigError("guidance_interval needs guidance; give its scale, such as 2.0")
        return None
    if labels is None or label is None:
        raise ConfigError("guidance needs a label; give label=, or leave guidance out")
    scales = list(scale) if is_many(scale) else [scale] * len(labels)
    if len(scales) != len(labels):
        raise ConfigError(
            f"got {len(scales)} scales of guidance for n = {len(labels)} images; give one or n"
        )
    for value in scales:
        if not abs(checks.number("guidance", value)) <= MAX_SCALE:
            raise ConfigError(f"guidance must be a number in +-{MAX_SCALE:g}; got {value!r}")
        if value != 1.0 and manifest.null_label is None:
            raise ConfigError(
                f"guidance {value:g} needs what the model {manifest.name!r} answers without a "
                "label, and it knows no images without one; leave guidance out"
            )
    T = manifest.schedule.T
    low, high = (1, T) if interval is None else _interval(interval, T)
    array = np.array(scales, np.float32)
    return None if (array == 1).all() else Guidance(array, (low, high))


def _interval(interval: Any, T: int) -> tuple[int, int]:
    """Two timesteps, the lower first."""
    if not is_many(interval) or len(interval) != 2:
        raise ConfigError(
            f"guidance_interval must be two timesteps (low, high); got {checks.shown(interval)}"
        )
    low, high = (checks.whole("a timestep of guidance_interval", t, most=T) for t in interval)
    if low > high:
        raise ConfigError(
            f"guidance_interval must be (low, high), low <= high; got ({low}, {high})"
        )
    return low, high


def _latents(latents: Any, sample_shape: tuple[int, int, int]) -> Float32:
    """States at T; float32 (n, C, H, W)."""
    values = checks.array("latents", latents)
    if values.shape[-3:] != sample_shape or values.ndim not in (3, 4) or not values.size:
        raise ConfigError(
            f"latents must be {sample_shape} (channels, height, width), or (n, ...) for several; "
            f"got {values.shape}: images are (height, width, channels), use invert or vary for them"
        )
    with np.errstate(over="ignore"):
        states = values.reshape(-1, *sample_shape).astype(np.float32)
    if values.dtype.kind != "f" or not np.isfinite(states).all():
        raise ConfigError(
            f"latents must be finite floats, about standard normal; got {values.dtype}, of which "
            f"{np.count_nonzero(np.isfinite(states))} of {states.size} are finite in float32"
        )
    return states


def is_many(value: Any) -> bool:
    """Whether a caller gave one for each sample: a list, a tuple, a range or an array."""
    return isinstance(value, (list, tuple, range)) or (
        isinstance(value, np.ndarray) and value.ndim == 1
    )
