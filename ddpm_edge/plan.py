"""A sampler made concrete: a table with one row a step, and the one loop that runs any such table.

With m_i the network's answer at row i, turned into the plan's form ("x0" or "eps"), every row is

    x_next = a_i x + sum_k b_{i,k} m_{i-k} + s_i z_i        k = 0..history

A sampler (`ddpm_edge.samplers`) only fills the table; nothing here knows which one it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np

from ddpm_edge import checks
from ddpm_edge.arrays import Array, Bool, Float64, Int64
from ddpm_edge.errors import ConfigError, NonFiniteError
from ddpm_edge.noise import Stream

FORMS = ("x0", "eps")
PREDICTIONS = ("eps", "x0", "v")


@dataclass(frozen=True, eq=False)
class Plan:
    """The table of a sampler, N rows in the order they run.

    Attributes:
        name: the call that made it, for people.
        form: what m is, "x0" or "eps".
        clip: x0 is clipped to [-clip, clip] before it is used; None = not. Needs form "x0".
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
    clip: float | None = None
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
        if self.form not in FORMS or (self.clip is not None and self.form != "x0"):
            raise ConfigError(f"a plan of form {self.form!r} with clip={self.clip}: clip needs x0")
        if self.clip is not None and not (np.isfinite(self.clip) and self.clip > 0):
            raise ConfigError(f"clip must be a number above 0 or None; got {self.clip!r}")
        if n < 1 or any(len(array) != n for array in self._arrays().values()) or self.b.ndim != 2:
            raise ConfigError(f"plan {self.name}: all columns must have the same length >= 1")
        asks_first = self.evaluate[self.restart].all() and self.evaluate[0]
        if not (asks_first and self.b.shape[1] and (self.evaluate.all() or self.form == "x0")):
            raise ConfigError(
                f"plan {self.name}: the first row and every restart must ask the network, b needs "
                "a column, and rows that do not ask need form 'x0'"
            )
        if not all(np.isfinite(array).all() for array in self._arrays().values()):
            raise ConfigError(f"plan {self.name}: every coefficient must be finite")
        asked = np.cumsum(self.evaluate)
        forgotten = np.where(self.restart, asked - self.evaluate, 0)
        known: Int64 = asked - np.maximum.accumulate(forgotten)  # answers since the last restart
        missing = (self.b != 0) & (np.arange(self.b.shape[1]) >= known[:, None])
        if missing.any():
            row = int(np.argmax(missing.any(axis=1)))
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

    def tail(self, rows: int) -> Plan:
        """The last rows of a plan without history; they draw the noise that they always do."""
        if self.b.shape[1] > 1:
            raise ConfigError(f"plan {self.name} has history and cannot be entered in its middle")
        if checks.whole("rows", rows) > len(self):
            raise ConfigError(f"rows must be in 1..{len(self)}; got {rows}")
        part: dict[str, Any] = {name: array[-rows:] for name, array in self._arrays().items()}
        return replace(self, name=f"{self.name}.tail({rows})", **part)

    def rows(self, prediction: str) -> list[Row]:
        """The rows for a network that answers `prediction`: "eps", "x0" or "v"."""
        at_t = zip(self.signal.tolist(), self.noise.tolist(), strict=True)
        form = [prediction_to_form(prediction, self.form, *pair) for pair in at_t]
        columns = zip(
            self.t.tolist(),
            self.evaluate.tolist(),
            self.restart.tolist(),
            [from_x for from_x, _ in form],
            [from_answer for _, from_answer in form],
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
            b = " ".join(f"{value:.6f}" for value in self.b[i])
            lines.append(
                f"{self.row[i]:4d} {self.t[i]:5d} {self.signal[i]:9.6f} {self.noise[i]:9.6f} "
                f"{self.a[i]:10.6f} {self.s[i]:9.6f}  {b}"
            )
        return "\n".join(lines)


class Row(NamedTuple):
    """One row of a plan as the loop wants it.

    Python numbers: a NumPy float64 scalar would turn float32 arrays into float64 ones.
    """

    t: int
    evaluate: bool
    restart: bool
    from_x: float  # m = from_x x + from_answer (the network's answer)
    from_answer: float
    a: float
    b: list[float]
    s: float
    stream: Stream
    number: int


def prediction_to_form(
    prediction: str, form: str, signal: float, noise: float
) -> tuple[float, float]:
    """Coefficients (of x, of the network's answer) whose sum is m.

    From x = signal x0 + noise eps and v = signal eps - noise x0 (Salimans and Ho 2022, with
    signal^2 + noise^2 = 1).
    """
    if prediction not in PREDICTIONS:
        raise ConfigError(f"prediction must be one of {', '.join(PREDICTIONS)}; got {prediction!r}")
    if prediction == form:
        return 0.0, 1.0
    if prediction == "v":
        return (signal, -noise) if form == "x0" else (noise, signal)
    if form == "x0":  # from eps
        return 1.0 / signal, -noise / signal
    return 1.0 / noise, -signal / noise  # eps from x0


@dataclass(eq=False)
class State:
    """Where a running plan is. The arrays are the loop's own: they change when it goes on."""

    index: int
    t: int
    x: Array
    x_before: Array
    m: Array
    plan: Plan

    def x0(self) -> Array:
        """The x0 that this row saw in x_before; a new array."""
        if self.plan.form == "x0":
            return np.copy(self.m)
        signal, noise = float(self.plan.signal[self.index]), float(self.plan.noise[self.index])
        x0: Array = (self.x_before - noise * self.m) / signal
        return x0


def run_plan(
    plan: Plan,
    x: Array,
    ask: Callable[[Array, int], Array],
    draw: Callable[[Stream, int], Array],
    prediction: str = "eps",
) -> Iterator[State]:
    """Run a plan from x, yielding after every row; the last state's x is the sample.

    Args:
        plan: the table.
        x: the state to start from, (B, ...), float32 (or float64, to check the mathematics). It is
            overwritten.
        ask: the network's answer (B, ...) for (x, t).
        draw: the normal draws of (stream, row number), of x's shape.
        prediction: what the network answers: "eps", "x0" or "v".

    Raises:
        NonFiniteError: an answer with NaN or infinity.
    """
    finite = np.empty(x.shape, bool)
    x_next, scratch = np.empty_like(x), np.empty_like(x)
    history: list[Array] = []
    spare = [np.empty_like(x) for _ in range(plan.b.shape[1])]
    for i, row in enumerate(plan.rows(prediction)):
        if row.restart:
            spare, history = spare + history, []
        if row.evaluate:
            m = spare.pop() if spare else history.pop()
            answer = ask(x, row.t)
            np.isfinite(answer, out=finite)  # before clipping, which would hide an infinity
            if not np.logical_and.reduce(finite, axis=None):  # finite.all(), sooner
                raise NonFiniteError(_not_finite(finite, i + 1, plan))
            np.multiply(answer, row.from_answer, out=m)
            if row.from_x:
                m += np.multiply(x, row.from_x, out=scratch)
            if plan.clip is not None:  # np.clip does the same, five times slower
                np.maximum(m, -plan.clip, out=m)
                np.minimum(m, plan.clip, out=m)
            history.insert(0, m)
        np.multiply(x, row.a, out=x_next)
        for b, m in zip(row.b, history, strict=False):
            if b:
                x_next += np.multiply(m, b, out=scratch)
        if row.s:
            x_next += np.multiply(draw(row.stream, row.number), row.s, out=scratch)
        x, x_next = x_next, x
        yield State(i, row.t, x, x_next, history[0], plan)


def _not_finite(finite: Bool, step: int, plan: Plan) -> str:
    """What to say of an answer (B, ...) that is finite only where `finite` is."""
    bad = np.flatnonzero(~finite.reshape(len(finite), -1).all(axis=1)).tolist()
    samples = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
    return (
        f"the network's answer has NaN or infinity at step {step} of {len(plan)}, "
        f"t = {plan.t[step - 1]}: {finite.size - np.count_nonzero(finite)} of {finite.size} "
        f"values, in samples {samples} of the batch of {len(finite)} (from 0); use another "
        "variant, such as fp32, verify the bundle, or export it again"
    )
