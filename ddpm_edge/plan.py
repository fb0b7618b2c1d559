"""A sampler made concrete: a table with one row a step, and the one loop that runs any such table.

With m_i the network's answer at row i, turned into the plan's form ("x0" or "eps", of the clipped
x0 where a clip is asked for), every row is

    x_next = a_i x + sum_k b_{i,k} m_{i-k} + s_i z_i        k = 0..history

A sampler (`ddpm_edge.samplers`) only fills the table; nothing here knows which one it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from ddpm_edge import checks
from ddpm_edge.arrays import Array, Bool, Float64, Int64
from ddpm_edge.errors import ConfigError, NonFiniteError
from ddpm_edge.noise import Stream
from ddpm_edge.schedule import Schedule

FORMS = ("x0", "eps")
PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)%")
CLIP_RANGE = (1e-30, 1e30)  # of a limit: far inside what float32 holds
PREDICTIONS = ("eps", "x0", "v", "velocity")

Draw = Callable[[Stream, int], Array]
Impose = Callable[[Array, int], None]


class Clip(NamedTuple):
    """How far a predicted x0 may go.

    Attributes:
        limit: x0 ends within [-limit, limit].
        percentile: None: what is outside is cut. Else "dynamic thresholding" (Saharia et al. 2022,
            section 2.3): each sample is cut at this percentile of its |x0|, if that is above the
            limit, and scaled down to the limit.
    """

    limit: float
    percentile: float | None = None

    @classmethod
    def parse(cls, clip: Any) -> Clip | None:
        """From what a caller writes: None, a limit such as 1.0, or a percentile such as "99.5%".

        With a percentile the limit is 1.0, the range of images.
        """
        if clip is None:
            return None
        percent = isinstance(clip, str) and PERCENT.fullmatch(clip)
        try:
            value = float(percent[1]) if percent else checks.number("clip", clip)
        except ConfigError:
            value = np.nan
        least, most = (0.0, 100.0) if percent else CLIP_RANGE
        if not least < value <= most:
            raise ConfigError(
                "clip must be a number above 0, a percentile such as '99.5%', or None (at the "
                f"command line: off); got {checks.shown(clip)}"
            )
        return cls(1.0, value) if percent else cls(value)

    def __call__(self, x0: Array) -> None:
        """Clip x0 (B, ...) in place."""
        limit = self.limit
        if self.percentile is not None:
            size = np.abs(x0).reshape(len(x0), -1)  # (B, values)
            cut = np.percentile(size, self.percentile, axis=1).astype(x0.dtype)
            cut = np.maximum(cut, limit).reshape(-1, *[1] * (x0.ndim - 1))
            x0 *= limit / cut  # then cutting at the limit is cutting at `cut` before
        np.maximum(x0, -limit, out=x0)  # np.clip does the same, five times slower
        np.minimum(x0, limit, out=x0)


@dataclass(frozen=True, eq=False)
class Plan:
    """The table of a sampler, N rows in the order they run.

    Attributes:
        name: the call that made it, for people.
        form: what m is, "x0" or "eps".
        clip: how x0 is clipped before it is used, as `Clip.parse` takes it; None = not. In form
            "eps" m is then the eps that belongs to the clipped x0.
        t: timestep in 1..T of each row; int64 (N,).
        signal, noise: x_t = signal x_0 + noise eps at that timestep; float64 (N,).
        a: coefficient of x; float64 (N,).
        b: coefficients of this row's m and those before it; float64 (N, history + 1).
        s: coefficient of the row's normal draw; float64 (N,), 0 = no draw.
        evaluate: whether the row asks the network (if not, m stays); bool (N,).
        restart: whether earlier m are forgotten before the row; bool (N,).
        stream: the noise stream of the row's draw; int64 (N,).
        row: the row's number for its draw: a part of a plan draws as the whole does; int64 (N,).
    """

    name: str
    form: str
    t: Int64
    signal: Float64
    noise: Float64
    a: Float64
    b: Float64
    s: Float64
    clip: float | str | None = None
    evaluate: Bool = field(default_factory=lambda: np.empty(0, bool))
    restart: Bool = field(default_factory=lambda: np.empty(0, bool))
    stream: Int64 = field(default_factory=lambda: np.empty(0, np.int64))
    row: Int64 = field(default_factory=lambda: np.empty(0, np.int64))

    def __post_init__(self) -> None:
        """Fill what was left out and refuse a table that cannot run."""
        n = len(self.t)
        usual = {
            "evaluate": np.ones(n, bool),
            "restart": np.arange(n) == 0,
            "stream": np.full(n, Stream.STEP),
            "row": np.arange(n),
        }
        for name, value in usual.items():
            if not len(getattr(self, name)):
                object.__setattr__(self, name, value)
        for name, array in self._arrays().items():  # frozen: a Generator runs it again
            own = array.view()
            own.setflags(write=False)
            object.__setattr__(self, name, own)
        checks.choice("a plan's form", self.form, FORMS)
        Clip.parse(self.clip)
        if any(len(array) != n for array in self._arrays().values()) or self.b.ndim != 2:
            raise ConfigError(f"plan {self.name}: all columns must have the same length")
        asks_first = self.evaluate[self.restart].all() and self.evaluate[:1].all()
        if not (asks_first and self.b.shape[1] and (self.evaluate.all() or self.form == "x0")):
            raise ConfigError(
                f"plan {self.name}: the first row and every restart must ask the network, b needs "
                "a column, and rows that do not ask need form 'x0'"
            )
        if not all(np.isfinite(array).all() for array in self._arrays().values()):
            raise ConfigError(f"plan {self.name}: every coefficient must be finite")
        missing = never_asked(self.b, self.evaluate, self.restart)
        if missing.any():
            row = int(np.argmax(missing))
            raise ConfigError(f"plan {self.name}: row {row} uses an answer that was never asked")

    def _arrays(self) -> dict[str, Array]:
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("name", "form", "clip")
        }

    def __len__(self) -> int:
        return len(self.t)

    @property
    def evaluations(self) -> int:
        """How often the network is asked."""
        return int(self.evaluate.sum())

    @classmethod
    def empty(cls, name: str) -> Plan:
        """A plan without rows: what it starts from is the sample."""
        none = np.empty(0)
        return cls(name, "x0", none.astype(np.int64), none, none, none, none.reshape(0, 1), none)

    def tail(self, rows: int) -> Plan:
        """The last rows of a plan without history; they draw the noise that they always do."""
        if self.b.shape[1] > 1:
            raise ConfigError(f"plan {self.name} has history and cannot be entered in its middle")
        if checks.whole("rows", rows) > len(self):
            raise ConfigError(f"rows must be in 1..{len(self)}; got {rows}")
        part: dict[str, Any] = {name: array[-rows:] for name, array in self._arrays().items()}
        return replace(self, name=f"{self.name}.tail({rows})", **part)

    def rows(self, prediction: str, form: str | None = None) -> list[Row]:
        """The rows for a network that answers `prediction`: one of PREDICTIONS.

        Args:
            prediction: what the network answers.
            form: what `from_x` and `from_answer` lead to; None = the plan's form.

        Raises:
            ConfigError: an unknown prediction, or one that does not tell x0 where no signal is.
        """
        form = self.form if form is None else form
        from_x, from_answer = prediction_to_form(prediction, form, self.signal, self.noise)
        columns = zip(
            self.t.tolist(),
            self.evaluate.tolist(),
            self.restart.tolist(),
            from_x.tolist(),
            from_answer.tolist(),
            self.signal.tolist(),
            self.noise.tolist(),
            self.a.tolist(),
            self.b.tolist(),
            self.s.tolist(),
            [Stream(stream) for stream in self.stream.tolist()],
            self.row.tolist(),
            strict=True,
        )
        return [Row(*values) for values in columns]

    def table(self) -> str:
        """The plan for people, one line a row."""
        head = f"{'row':>4} {'t':>5} {'signal':>9} {'noise':>9} {'a':>10} {'s':>9}  b"
        lines = [f"{self.name}  form={self.form}", head]
        for i in range(len(self)):
            b = " ".join(f"{value + 0.0:.6f}" for value in self.b[i])  # + 0: no "-0.000000"
            lines.append(
                f"{self.row[i]:4d} {self.t[i]:5d} {self.signal[i]:9.6f} {self.noise[i]:9.6f} "
                f"{self.a[i]:10.6f} {self.s[i]:9.6f}  {b}"
            )
        return "\n".join(lines)


def never_asked(b: Float64, evaluate: Bool, restart: Bool) -> Bool:
    """Which rows of a plan use an answer from before their last restart, or the start; (N,)."""
    asked = np.cumsum(evaluate)
    forgotten = np.where(restart, asked - evaluate, 0)
    known: Int64 = asked - np.maximum.accumulate(forgotten)  # answers since the last restart
    missing: Bool = ((b != 0) & (np.arange(b.shape[1]) >= known[:, None])).any(axis=1)
    return missing


class Row(NamedTuple):
    """One row of a plan as the loop wants it.

    Python numbers: a NumPy float64 scalar would turn float32 arrays into float64 ones.
    """

    t: int
    evaluate: bool
    restart: bool
    from_x: float  # from_x x + from_answer (the network's answer) is m, or x0
    from_answer: float
    signal: float
    noise: float
    a: float
    b: list[float]
    s: float
    stream: Stream
    number: int


def prediction_to_form(
    prediction: str, form: str, signal: Float64, noise: Float64
) -> tuple[Float64, Float64]:
    """Coefficients (of x, of the network's answer) whose sum is m; float64 (N,) each.

    From x = signal x0 + noise eps; v = signal eps - noise x0 (Salimans and Ho 2022); and velocity
    = eps - x0, the derivative of rectified flow's x (Liu et al. 2023).

    Raises:
        ConfigError: an unknown prediction, or eps where nothing of x0 is left in x.
    """
    checks.choice("prediction", prediction, PREDICTIONS)
    if prediction == "eps" and form == "x0" and not signal.all():
        raise ConfigError(
            "eps does not tell x0 where the signal is 0, as at the end of rectified flow; the "
            "network must answer velocity, x0 or v"
        )
    one, zero = np.ones_like(signal), np.zeros_like(signal)
    if prediction == form:
        return zero, one
    to_x0: tuple[Float64, Float64]
    if prediction == "eps":
        to_x0 = one / signal, -noise / signal
    elif prediction == "v":
        power = signal**2 + noise**2  # 1 but for rectified flow
        to_x0 = signal / power, -noise / power
    elif prediction == "velocity":
        to_x0 = one / (signal + noise), -noise / (signal + noise)
    else:
        to_x0 = zero, one
    if form == "x0":
        return to_x0
    return (one - signal * to_x0[0]) / noise, -signal * to_x0[1] / noise


def check_prediction(prediction: str, schedule: Schedule) -> None:
    """Raise ConfigError unless a network that answers this tells x0 at every t in 1..T."""
    prediction_to_form(prediction, "x0", schedule.signal[1:], schedule.noise[1:])


class State(Protocol):
    """Where a running plan is, until the loop goes on: then it writes into its arrays.

    Attributes:
        index: of the row, 0..N - 1.
        t: the row's timestep.
        plan: what runs.
        x: the state after the row; (B, ...).
        m: the network's answer in the plan's form; (B, ...).
        loop: which one runs it, "host" or "device".
        warm: whether the steps that follow are as quick as they become.
    """

    index: int
    t: int
    plan: Plan
    loop: ClassVar[str]

    @property
    def x(self) -> Array:
        """See above."""
        ...

    @property
    def m(self) -> Array:
        """See above."""
        ...

    @property
    def warm(self) -> bool:
        """See above."""
        ...

    def x0(self) -> Array:
        """The x0 that this row saw in the state before it; a new array."""
        ...

    def wait(self) -> None:
        """Until the row has been computed."""
        ...


@dataclass(eq=False)
class HostState:
    """The state of the loop on the host (see `State`)."""

    loop: ClassVar[str] = "host"
    warm: ClassVar[bool] = True
    index: int
    t: int
    x: Array
    x_before: Array
    m: Array
    seen: Array | None  # the x0, where the loop came by it
    plan: Plan

    def wait(self) -> None:
        """It has been computed."""

    def x0(self) -> Array:
        """The x0 that this row saw in x_before; a new array."""
        if self.seen is not None:
            return np.copy(self.seen)
        signal, noise = float(self.plan.signal[self.index]), float(self.plan.noise[self.index])
        x0: Array = (self.x_before - noise * self.m) / signal
        return x0


def run_plan(
    plan: Plan,
    x: Array,
    ask: Callable[[Array, int], Array],
    draw: Draw,
    prediction: str = "eps",
    impose: Impose | None = None,
) -> Iterator[HostState]:
    """Run a plan from x, yielding after every row; the last state's x is the sample.

    Args:
        plan: the table.
        x: the state to start from, (B, ...), float32 (or float64, to check the mathematics). It is
            overwritten.
        ask: the network's answer (B, ...) for (x, t).
        draw: the normal draws of (stream, row number), of x's shape.
        prediction: what the network answers, one of PREDICTIONS.
        impose: changes the x0 (B, ...) of row number i, clipped, in place: what is known of it.

    Raises:
        ConfigError: see `Plan.rows`.
        NonFiniteError: an answer with NaN or infinity.
    """
    clip = Clip.parse(plan.clip)
    finite = np.empty(x.shape, bool)
    x_next, scratch = np.empty_like(x), np.empty_like(x)
    history: list[Array] = []
    spare = [np.empty_like(x) for _ in range(plan.b.shape[1])]
    on_x0 = clip is not None or impose is not None
    changed = np.empty_like(x) if plan.form == "eps" and on_x0 else None
    for i, row in enumerate(plan.rows(prediction, "x0" if on_x0 else None)):
        if row.restart:
            spare, history = spare + history, []
        if row.evaluate:
            m = spare.pop() if spare else history.pop()
            answer = ask(x, row.t)
            np.isfinite(answer, out=finite)  # before clipping, which would hide an infinity
            if np.count_nonzero(finite) < finite.size:  # not finite.all(), sooner
                bad = np.flatnonzero(~finite.reshape(len(finite), -1).all(axis=1))
                values = f"{finite.size - np.count_nonzero(finite)} of {finite.size} values, "
                raise not_finite(plan, i, bad.tolist(), len(finite), values)
            np.multiply(answer, row.from_answer, out=m)
            if row.from_x:
                m += np.multiply(x, row.from_x, out=scratch)
            if clip is not None:
                clip(m)
            if impose is not None:
                impose(m, i)
            if changed is not None:  # eps = (x - signal x0) / noise
                np.copyto(changed, m)
                np.multiply(m, -row.signal / row.noise, out=m)
                m += np.multiply(x, 1.0 / row.noise, out=scratch)
            history.insert(0, m)
        np.multiply(x, row.a, out=x_next)
        for b, m in zip(row.b, history, strict=False):
            if b:
                x_next += np.multiply(m, b, out=scratch)
        if row.s:
            x_next += np.multiply(draw(row.stream, row.number), row.s, out=scratch)
        x, x_next = x_next, x
        seen = history[0] if plan.form == "x0" else changed
        yield HostState(i, row.t, x, x_next, history[0], seen, plan)


def not_finite(
    plan: Plan, row: int, bad: list[int], batch: int, values: str = ""
) -> NonFiniteError:
    """What to raise where the answers for these samples of a batch are not finite at a row."""
    samples = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
    return NonFiniteError(
        f"the network's answer has NaN or infinity at step {row + 1} of {len(plan)}, t = "
        f"{plan.t[row]}: {values}in samples {samples} of the batch of {batch} (from 0); use "
        "another variant, such as fp32, verify the bundle, or export it again"
    )
