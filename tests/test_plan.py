"""The table and the loop: history, rows that do not ask, validation."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ddpm_edge import samplers
from ddpm_edge.errors import ConfigError, NonFiniteError
from ddpm_edge.noise import Stream
from ddpm_edge.plan import PREDICTIONS, Clip, Plan, prediction_to_form, run_plan
from ddpm_edge.schedule import Schedule


def plan(n: int = 4, history: int = 1, **changes: Any) -> Plan:
    """A table of plain numbers, not a sampler that anybody should use."""
    i = np.arange(n, dtype=np.float64)
    b = 0.1 + i[:, None] * 0.01 + np.arange(history + 1) * 0.2
    b[0, 1:] = 0.0
    usual: dict[str, Any] = {
        "name": "test", "form": "eps", "t": np.arange(n, 0, -1), "signal": np.full(n, 0.6),
        "noise": np.full(n, 0.8), "a": 0.9 - 0.1 * i, "b": b, "s": np.where(i < n - 1, 0.3, 0.0),
    }  # fmt: skip
    return Plan(**(usual | changes))


def network(x: np.ndarray, t: int) -> np.ndarray:
    return np.sin(x) + t


def draw(stream: Stream, row: int) -> np.ndarray:
    return np.full((2, 3), 10.0 * stream + row)


def by_hand(p: Plan, x: np.ndarray) -> list[np.ndarray]:
    """The definition, one row at a time, nothing reused."""
    answers: list[np.ndarray] = []
    states = []
    for i in range(len(p)):
        if p.restart[i]:
            answers = []
        if p.evaluate[i]:
            answers.append(network(x, int(p.t[i])))
        x = p.a[i] * x + p.s[i] * draw(Stream(int(p.stream[i])), int(p.row[i]))
        for k in range(min(p.b.shape[1], len(answers))):
            x = x + p.b[i, k] * answers[-1 - k]
        states.append(x)
    return states


BLANK = np.zeros((4, 2))
PLANS = {
    "no history": plan(history=0),
    "history": plan(history=1),
    "long history": plan(6, 2, b=np.tril(np.full((6, 3), 0.2))),
    "rows that do not ask": plan(
        5, 1, form="x0", evaluate=np.array([True, True, False, True, False]), b=np.full((5, 2), 0.1)
        * np.array([[1, 0], [1, 1], [1, 1], [0, 1], [0, 0]])
    ),
    "restart": plan(
        4, 1, restart=np.array([True, False, True, False]),
        b=np.array([[0.1, 0.0], [0.1, 0.2], [0.3, 0.0], [0.1, 0.2]]),
    ),
    "streams and rows": plan(
        stream=np.array([0, 1, 0, 1]), row=np.array([7, 8, 9, 3]), s=np.full(4, 0.5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("p", PLANS.values(), ids=PLANS)
def test_the_loop_is_the_definition(p: Plan) -> None:
    x = np.linspace(-1, 1, 6).reshape(2, 3)
    states = [(s.x.copy(), s.index, s.t) for s in run_plan(p, x.copy(), network, draw, p.form)]
    expected = by_hand(p, x)
    assert [index for _, index, _ in states] == list(range(len(p)))
    assert [t for _, _, t in states] == p.t.tolist()
    for (got, _, _), want in zip(states, expected, strict=True):
        assert np.abs(got - want).max() < 1e-13  # float64 sums in another order


def test_float32_stays_float32() -> None:
    x = np.zeros((2, 3), np.float32)
    for state in run_plan(
        plan(), x, lambda x, t: x + np.float32(t), lambda s, r: x + np.float32(1)
    ):
        assert state.x.dtype == state.m.dtype == np.float32
        assert state.x0().dtype == np.float32


@pytest.mark.parametrize("form", ["eps", "x0"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_in_every_form(prediction: str, form: str) -> None:
    """On the circle signal^2 + noise^2 = 1, on rectified flow's line signal + noise = 1, beside."""
    signal, noise = np.array([0.6, 0.3, 0.5]), np.array([0.8, 0.7, 1.0])
    x0, eps = 0.5, -1.5
    x = signal * x0 + noise * eps
    answer = {
        "eps": eps, "x0": x0, "v": signal * eps - noise * x0, "velocity": eps - x0
    }[prediction]  # fmt: skip
    from_x, from_answer = prediction_to_form(prediction, form, signal, noise)
    want = np.full(3, {"eps": eps, "x0": x0}[form])
    assert from_x * x + from_answer * answer == pytest.approx(want)


@pytest.mark.parametrize("prediction", ["x0", "v", "velocity"])
def test_x0_where_no_signal_is_left(prediction: str) -> None:
    x0, eps = 0.5, -1.5
    answer = {"x0": x0, "v": -x0, "velocity": eps - x0}[prediction]
    from_x, from_answer = prediction_to_form(prediction, "x0", np.zeros(1), np.ones(1))
    assert from_x * eps + from_answer * answer == pytest.approx(x0)
    with pytest.raises(ConfigError, match="eps does not tell x0 where the signal is 0"):
        prediction_to_form("eps", "x0", np.zeros(1), np.ones(1))


@pytest.mark.filterwarnings("ignore::ddpm_edge.schedule.ScheduleWarning")
@pytest.mark.parametrize("clip", [None, 0.3])
def test_x0_of_a_state(clip: float | None) -> None:
    schedule = Schedule.linear(10, 0.1, 0.5)
    for p in (samplers.ddpm(schedule, clip=clip), samplers.ddim(schedule, 5, clip=clip)):
        x = np.full((1, 2), 0.4)
        before = x.copy()
        for state in run_plan(p, x.copy(), lambda x, t: x / 3, lambda s, r: np.ones((1, 2))):
            i = state.index
            x0 = (before - p.noise[i] * before / 3) / p.signal[i]
            expected = x0 if clip is None else np.clip(x0, -clip, clip)
            assert np.abs(state.x0() - expected).max() < 1e-12
            before = state.x.copy()


def test_tail_draws_and_moves_as_the_whole() -> None:
    whole = samplers.ddpm(Schedule.linear(), clip=1.0)
    rng = np.random.default_rng(0)
    z = rng.standard_normal((1000, 2, 3))
    states = [
        s.x.copy() for s in run_plan(whole, rng.standard_normal((2, 3)), lambda x, t: np.tanh(x),
                                     lambda stream, row: z[row])
    ]  # fmt: skip
    part = whole.tail(50)
    assert part.t.tolist() == list(range(50, 0, -1))
    *_, last = run_plan(part, states[949].copy(), lambda x, t: np.tanh(x), lambda s, row: z[row])
    assert (last.x == states[-1]).all()
    with pytest.raises(ConfigError, match="has history and cannot be entered"):
        plan().tail(2)
    for rows in (0, -1, 1.5, 1001):
        with pytest.raises(ConfigError, match=f"got {rows}"):
            whole.tail(rows)  # type: ignore[arg-type]


def test_unknown_prediction() -> None:
    with pytest.raises(ConfigError, match="must be one of eps, x0, v, velocity; got 'score'"):
        next(run_plan(plan(), np.zeros((2, 3)), network, draw, "score"))


def test_evaluations_and_table() -> None:
    p = PLANS["rows that do not ask"]
    assert (len(p), p.evaluations) == (5, 3)
    lines = p.table().splitlines()
    assert len(lines) == 7
    assert lines[2].split()[:2] == ["0", "5"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "score"}, "a plan's form must be one of x0, eps; got 'score'"),
        ({"clip": 0.0}, "clip must be a number above 0, .* got 0.0"),
        ({"clip": "101%"}, "a percentile such as '99.5%', or None .*; got '101%'"),
        ({"clip": "0%"}, "got '0%'"),
        ({"clip": "a%"}, "got 'a%'"),
        ({"clip": "nan%"}, "got 'nan%'"),
        ({"clip": "1"}, "got '1'"),
        ({"clip": " 99 %"}, "got ' 99 %'"),
        ({"clip": "1_0%"}, "got '1_0%'"),
        ({"clip": 1e300}, r"got 1e\+300"),
        ({"clip": 1e-300}, "got 1e-300"),
        ({"clip": True}, "got True"),
        ({"clip": np.inf}, "got inf"),
        ({"a": np.ones(3)}, "same length"),
        ({"b": np.ones(4)}, "same length"),
        ({"s": np.array([1.0, np.nan, 0.0, 0.0])}, "must be finite"),
        ({"a": np.full(4, np.inf)}, "must be finite"),
        ({"b": np.ones((4, 0))}, "b needs a column"),
        ({"form": "x0", "clip": np.nan}, "clip must be a number above 0, .* got nan"),
        ({"b": np.ones((4, 2))}, "row 0 uses an answer that was never asked"),
        ({"restart": np.array([True, False, True, False])}, "row 2 uses an answer"),
        ({"evaluate": np.array([True, False, True, True])}, "do not ask need form 'x0'"),
        ({"form": "x0", "evaluate": np.array([True, False, True, True])}, "row 1 uses an answer"),
        ({"form": "x0", "evaluate": np.arange(4) > 0}, "the first row .* must ask"),
    ],
)
def test_tables_that_cannot_run(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(plan(), **changes)


def test_a_percentile_is_imagens_dynamic_thresholding() -> None:
    """Against diffusers' `_threshold_sample`, whose default maximum of 1 makes it a plain clip."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e9
    )
    x0 = np.random.default_rng(0).standard_normal((3, 1, 8, 8))
    x0[0] *= 0.1  # nothing of it is above the limit: it stays as it is
    x0[2, 0, 0, 0] = 50.0
    expected = scheduler._threshold_sample(torch.from_numpy(x0)).numpy()
    got = x0.copy()
    clip = Clip.parse("90%")
    assert clip == Clip(1.0, 90.0)
    clip(got)
    assert np.abs(got - expected).max() < 1e-12
    assert np.array_equal(got[0], x0[0])
    assert np.abs(got).max() == 1.0


@pytest.mark.parametrize("form", ["x0", "eps"])
@pytest.mark.parametrize("clip", [None, 0.3, "80%"])
def test_x0_that_is_shown_is_the_one_that_was_used(clip: float | str | None, form: str) -> None:
    p = plan(form=form, clip=clip)
    before = np.linspace(-1, 1, 6).reshape(2, 3)
    for state in run_plan(p, before.copy(), network, draw):
        x0 = (before - p.noise[state.index] * network(before, state.t)) / p.signal[state.index]
        if clip is not None:
            Clip.parse(clip)(x0)
        assert np.abs(state.x0() - x0).max() < 1e-12
        eps = (before - p.signal[state.index] * x0) / p.noise[state.index]
        assert np.abs(state.m - (x0 if form == "x0" else eps)).max() < 1e-12
        before = state.x.copy()


@pytest.mark.parametrize("clip", [None, 0.3])
def test_x0_is_the_callers_own(clip: float | None) -> None:
    plan = samplers.ddim(Schedule.linear(), 5, clip=clip)
    x0, *later = (s.x0() for s in run_plan(plan, np.ones((1, 2)), lambda x, t: x / 3, lambda *_: 0))
    before = x0.copy()
    x0_again, *_ = later
    assert np.array_equal(x0, before)
    assert not np.shares_memory(x0, x0_again)


def test_the_loop_allocates_no_array_a_step() -> None:
    x, answer = np.ones((4, 65536), np.float32), np.zeros((4, 65536), np.float32)
    plan = samplers.ddpm(Schedule.linear(), 250, clip=1.0)
    states = run_plan(plan, x, lambda x, t: answer, lambda stream, row: answer, "x0")
    next(states)
    tracemalloc.start()
    for _ in states:
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < x.nbytes / 10  # Python's own numbers and tuples; one array would be ten times it


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_answer_that_is_not_finite_is_an_error_that_says_where(bad: float) -> None:
    whole = samplers.ddim(Schedule.linear(), 50, clip=1.0)  # clipping would hide an infinity

    def ask(x: np.ndarray, t: int) -> np.ndarray:
        answer = np.zeros_like(x)
        if t == whole.t[11]:
            answer[1, :2] = answer[3, 0] = bad
        return answer

    states = run_plan(whole, np.zeros((4, 3), np.float32), ask, draw)
    with pytest.raises(NonFiniteError) as caught:
        assert [next(states).index for _ in range(50)] == []
    assert isinstance(caught.value, ArithmeticError)
    message = (
        f"NaN or infinity at step 12 of 50, t = {whole.t[11]}: 3 of 12 values, in samples 1, 3 of"
    )
    assert message in str(caught.value)
    assert "use another variant, such as fp32, verify the bundle, or export" in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_large_answers_are_finite() -> None:
    large = np.full((2, 3), np.finfo(np.float32).max, np.float32)
    *_, last = run_plan(samplers.ddim(Schedule.linear(), 3, clip=1.0), np.zeros_like(large),
                        lambda x, t: large, draw, "x0")  # fmt: skip
    assert np.isfinite(last.x).all()
