"""Generator: same seed same picture, labels, guidance, stopping, threads, forks, bad arguments."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import ToyEngine

from ddpm_edge import Bundle, Generator, Step
from ddpm_edge.errors import (
    BundleError,
    ClosedError,
    ConfigError,
    EngineError,
    ForkError,
    NonFiniteError,
    OutOfMemoryError,
    RuntimeUnavailableError,
)

# float32 sums in another order, through a few network evaluations, values of about 1
SAME = 1e-5


def difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(np.float64) - b).max())


# Same seed, same picture


@pytest.mark.parametrize(
    "plan", [{"sampler": "ddim", "steps": 10}, {"sampler": "ddim", "steps": 10, "eta": 1.0}]
)
def test_batch_equals_single_calls(generator: Generator, plan: dict[str, Any]) -> None:
    together = generator.sample(8, seed=3, dtype="float32", **plan)
    singles = [generator.sample(1, seed=3, first=i, dtype="float32", **plan) for i in range(8)]
    split = generator.sample(8, seed=3, batch=3, dtype="float32", **plan)
    assert difference(np.concatenate(singles), together) <= SAME
    assert difference(split, together) <= SAME
    assert difference(together[0:1], together[1:2]) > 0.1  # they are not all one picture


def test_thread_counts_agree(generator: Generator) -> None:
    arguments: dict[str, Any] = {"seed": 3, "dtype": "float32", "steps": 10}
    with Generator.load(threads=1) as one, Generator.load(threads=2) as two:
        a, b = one.sample(4, **arguments), two.sample(4, **arguments)
    assert difference(a, b) <= SAME
    assert difference(a, generator.sample(4, **arguments)) <= SAME


def test_result_names_the_seed_that_repeats_it(toy: Generator) -> None:
    result = toy.run(2)
    assert (toy.sample(2, seed=result.seed) == result.images).all()
    assert (toy.sample(2) != result.images).any()  # a fresh seed


def test_uint8_is_the_rounded_float32(toy: Generator) -> None:
    bytes_, floats = (toy.sample(3, seed=1, dtype=d) for d in ("uint8", "float32"))
    assert bytes_.dtype == np.uint8
    assert bytes_.shape == (3, 28, 28, 1)
    assert floats.dtype == np.float32
    assert np.abs(floats).max() <= 1.0
    assert np.abs(bytes_ / 127.5 - 1.0 - floats).max() <= 0.5 / 127.5 + 1e-6  # half a grey level


# Labels and guidance


def test_labels_by_number_name_and_one_each(toy: Generator) -> None:
    sneaker = toy.sample(2, label=7, seed=1)
    assert (toy.sample(2, label="sneaker", seed=1) == sneaker).all()
    assert (toy.sample(2, label=[7, "sneaker"], seed=1) == sneaker).all()
    assert (toy.sample(2, label=np.array([7, 7]), seed=1) == sneaker).all()
    assert (toy.sample(2, label=np.int32(7), seed=1) == sneaker).all()
    assert (toy.sample(2, label=[7, None], seed=1)[0] == sneaker[0]).all()
    assert (toy.sample(2, label=[7, None], seed=1) != sneaker).any()


def test_no_label_is_the_null_label_and_t_counts_from_0() -> None:
    engine = ToyEngine()
    Generator(Bundle.open(), engine, "fp32").sample(2, seed=1, sampler="ddim", steps=4)
    assert [call["label"].tolist() for call in engine.calls] == [[10, 10]] * 4
    assert [call["t"][0] for call in engine.calls] == [999, 749, 499, 249]


def test_guidance_asks_both_halves_in_one_call() -> None:
    engine = ToyEngine()
    generator = Generator(Bundle.open(), engine, "fp32")
    *_, last = generator.stream(1, label=3, guidance=2.5, seed=1, steps=1, clip=None)
    (call,) = engine.calls
    assert call["label"].tolist() == [3, 10]
    assert (call["x"][0] == call["x"][1]).all()
    with_label, without = np.tanh(call["x"] + 0.999 + np.array([0.3, 1.0])[:, None, None, None])
    eps = without + 2.5 * (with_label - without)
    ab = generator.schedule.alpha_bar[1000]
    x0 = (call["x"][0] - np.sqrt(1 - ab) * eps) / np.sqrt(ab)
    assert np.abs(last.x[0] - x0).max() <= 1e-6 * np.abs(x0).max()  # float32 rounding


def test_guidance_1_is_plain_conditioning(toy: Generator) -> None:
    plain = toy.sample(2, label=3, seed=1)
    assert (toy.sample(2, label=3, guidance=1.0, seed=1) == plain).all()
    assert (toy.sample(2, label=3, guidance=3.0, seed=1) != plain).any()


# Steps, stopping, errors on the way


def test_stream_ends_with_the_sample(toy: Generator) -> None:
    steps = list(toy.stream(2, seed=5, steps=7))
    assert [step.index for step in steps] == list(range(7))
    assert {step.total for step in steps} == {7}
    assert steps[0].t == 1000
    assert steps[0].x.shape == steps[0].x0.shape == (2, 1, 28, 28)
    final = toy.sample(2, seed=5, steps=7, dtype="float32")
    assert (np.clip(steps[-1].x, -1, 1).transpose(0, 2, 3, 1) == final).all()
    assert (steps[0].x != steps[1].x).any()  # copies, not one buffer


def test_callback_sees_every_step_and_true_stops(toy: Generator) -> None:
    seen: list[Step] = []

    def watch(step: Step) -> bool:
        seen.append(step)
        return step.index == 4

    result = toy.run(5, seed=1, steps=3, batch=2, callback=watch)
    assert [step.index for step in seen] == [0, 1, 2, 3, 4]
    assert {step.total for step in seen} == {9}
    assert [step.first for step in seen] == [0, 0, 0, 2, 2]
    assert result.stopped
    assert len(result.images) == 4  # the third batch never began
    expected = np.rint((np.clip(seen[-1].x0, -1, 1) + 1) * 127.5).astype(np.uint8)
    assert (result.images[2:] == expected.transpose(0, 2, 3, 1)).all()


def test_only_true_stops(toy: Generator) -> None:
    assert not toy.run(1, steps=3, callback=lambda step: 1).stopped
    assert toy.run(1, steps=3, callback=lambda step: step.x0.std() >= 0).stopped  # NumPy's True


def test_closing_from_a_callback_ends_the_call(generator: Generator) -> None:
    with Generator.load() as other, pytest.raises(ClosedError, match="closed"):
        other.run(1, steps=3, callback=lambda step: other.close())
    with Generator.load() as other:  # on the last step nothing more is asked
        images = other.sample(1, steps=3, seed=0, callback=lambda s: s.index == 2 and other.close())
    assert (images == generator.sample(1, steps=3, seed=0)).all()


def test_an_exception_in_the_callback_passes_and_nothing_breaks(toy: Generator) -> None:
    def fail(step: Step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.sample(1, callback=fail)
    assert toy.sample(1, seed=0).shape == (1, 28, 28, 1)


def test_leaving_a_stream_early(toy: Generator) -> None:
    for _ in toy.stream(1, seed=0):
        break
    assert toy.sample(1, seed=0).shape == (1, 28, 28, 1)


class Fails(ToyEngine):
    """Raises at its third call, as Ctrl-C or a runtime would."""

    def __init__(self, error: BaseException, concurrent: bool) -> None:
        super().__init__()
        self.error, self.concurrent = error, concurrent  # type: ignore[misc]

    def __call__(self, arrays: Any) -> Any:
        answer = super().__call__(arrays)
        if len(self.calls) == 3:
            raise self.error
        return answer


@pytest.mark.parametrize("concurrent", [True, False])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (EngineError("it failed"), EngineError),
        (MemoryError("no room"), OutOfMemoryError),
    ],
)
def test_what_an_engine_raises_passes_and_nothing_stays_locked(
    error: BaseException, expected: type[BaseException], concurrent: bool
) -> None:
    generator = Generator(Bundle.open(), Fails(error, concurrent), "fp32")
    with pytest.raises(expected):
        generator.sample(2, seed=0)
    with ThreadPoolExecutor(1) as pool:  # a lock left behind would stop another thread
        images = pool.submit(generator.sample, 2, seed=0).result(timeout=30)
    assert (images == Generator(Bundle.open(), ToyEngine(), "fp32").sample(2, seed=0)).all()


@pytest.mark.parametrize(
    "use",
    [lambda g: g.sample(9, batch=5), lambda g: g.warmup(5), lambda g: list(g.stream(5))],
    ids=["sample", "warmup", "stream"],
)
@pytest.mark.parametrize(
    ("error", "said"), [(MemoryError("no room"), r" \(no room\)"), (MemoryError(), "")]
)
def test_too_little_memory_names_the_batch_and_the_remedy(
    use: Any, error: MemoryError, said: str
) -> None:
    class Full(ToyEngine):
        def __call__(self, arrays: Any) -> Any:
            raise error

    with pytest.raises(OutOfMemoryError, match=rf"for 5 samples at once{said}; give a smaller"):
        use(Generator(Bundle.open(), Full(), "fp32"))


def test_a_callback_s_memory_error_is_its_own(toy: Generator) -> None:
    def fail(step: Step) -> None:
        raise MemoryError("the app's")

    with pytest.raises(MemoryError, match="the app's") as caught:
        toy.sample(1, callback=fail)
    assert not isinstance(caught.value, OutOfMemoryError)


def test_an_answer_that_is_not_finite_is_an_error() -> None:
    class Broken(ToyEngine):
        def __call__(self, arrays: Any) -> Any:
            answer = super().__call__(arrays)
            if len(self.calls) == 2:
                answer["prediction"][1] = np.inf
            return answer

    generator = Generator(Bundle.open(), Broken(), "fp32")
    with pytest.raises(
        NonFiniteError, match=r"step 2 of 4, t = 604: 784 of 1568 values, in samples 1 of the batch"
    ):
        generator.sample(2, seed=0, steps=4)
    assert generator.sample(2, seed=0, steps=4).shape == (2, 28, 28, 1)


# Plans


def test_default_plan_and_what_changes_it(toy: Generator) -> None:
    rest = "order=2, sde=True, spacing=logsnr, clip=1)"
    assert toy.plan().name == f"dpmpp(steps=20, {rest}"
    assert toy.plan().clip == 1.0
    assert len(toy.plan(steps=10)) == 10
    assert (
        toy.plan(spacing=[900, 5]).name == "dpmpp(steps=2, order=2, sde=True, spacing=list, clip=1)"
    )
    assert toy.plan("ddim", eta=0.5).name == "ddim(steps=20, eta=0.5, clip=1)"
    assert toy.plan(clip=None).clip is None
    assert toy.plan("ddpm").name == "ddpm(steps=1000, variance=beta, clip=1)"
    assert toy.plan("ddpm").clip == 1.0
    assert toy.run(1, steps=3, seed=0).plan.name == f"dpmpp(steps=3, {rest}"


# Life cycle, threads, processes


def test_a_plan_is_made_once_and_nobody_changes_it(toy: Generator) -> None:
    plan = toy.run(1, sampler="ddim", steps=3).plan
    assert toy.plan("ddim", 3) is plan
    assert toy.plan("ddim", 4) is not plan
    for array in (plan.t, plan.a, plan.b, plan.s, plan.stream):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    toy.plan("ddim", 1)
    for equal in (True, 3.0):  # to what is remembered, but wrong
        with pytest.raises(ConfigError, match="steps"):
            toy.plan("ddim", equal)
    listed = [9, 5, 1]
    assert toy.plan("ddim", spacing=listed).t.tolist() == listed
    listed[1] = 4
    assert toy.plan("ddim", spacing=listed).t.tolist() == [9, 4, 1]


def test_closed() -> None:
    engine = ToyEngine()
    with Generator(Bundle.open(), engine, "fp32") as generator:
        assert "toy on cpu" in repr(generator)
    assert engine.closed
    assert "closed" in repr(generator)
    generator.close()
    with pytest.raises(ClosedError, match="load it again"):
        generator.sample(1)


def test_warmup_evaluates_once() -> None:
    engine = ToyEngine()
    Generator(Bundle.open(), engine, "fp32").warmup(3)
    assert [call["x"].shape for call in engine.calls] == [(3, 1, 28, 28)]


def test_eight_threads_share_a_generator(generator: Generator) -> None:
    def image(i: int) -> np.ndarray:
        return generator.sample(1, seed=i, label=i % 10, steps=1 + i % 2)

    expected = [image(i) for i in range(50)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda call: image(call % 50), range(8 * 50)))
    assert all((got[call] == expected[call % 50]).all() for call in range(8 * 50))


def test_close_while_others_sample(generator: Generator) -> None:
    expected = generator.sample(1, seed=0, steps=2)

    def sample_until_closed(shared: Generator, under_way: threading.Event) -> str:
        for i in itertools.count():
            try:
                assert (shared.sample(1, seed=0, steps=2) == expected).all()
            except ClosedError as error:
                return str(error)
            if i == 1:
                under_way.set()
        raise AssertionError

    for _ in range(3):  # and open it again
        shared = Generator.load(device="cpu")
        events = [threading.Event() for _ in range(3)]
        with ThreadPoolExecutor(3) as pool:
            ends = [pool.submit(sample_until_closed, shared, event) for event in events]
            assert all(event.wait(timeout=60) for event in events)
            shared.close()
            assert all("closed" in end.result(timeout=60) for end in ends)


def test_close_waits_for_a_call_that_must_not_be_overlapped() -> None:
    class Fragile(ToyEngine):
        concurrent = False
        began, go_on = threading.Event(), threading.Event()

        def __call__(self, arrays: Any) -> Any:
            self.began.set()
            assert self.go_on.wait(timeout=60)
            assert not self.closed
            return super().__call__(arrays)

    engine = Fragile()
    generator = Generator(Bundle.open(), engine, "fp32")
    with ThreadPoolExecutor(2) as pool:
        sampling = pool.submit(generator.warmup)
        assert engine.began.wait(timeout=60)
        closing = pool.submit(generator.close)
        time.sleep(0.05)
        assert not closing.done()
        engine.go_on.set()
        closing.result(timeout=60)
        sampling.result(timeout=60)
    assert engine.closed


def test_calls_of_an_engine_that_is_not_concurrent_do_not_overlap() -> None:
    class Fragile(ToyEngine):
        concurrent = False
        busy = threading.Lock()

        def __call__(self, arrays: Any) -> Any:
            assert self.busy.acquire(blocking=False), "two calls at once"
            try:
                return super().__call__(arrays)
            finally:
                self.busy.release()

    generator = Generator(Bundle.open(), Fragile(), "fp32")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: generator.sample(1, seed=i), range(16)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_gets_an_error_not_a_hang(toy: Generator) -> None:
    child = os.fork()
    if child == 0:
        try:
            toy.sample(1)
        except ForkError as error:
            os._exit(0 if "call Generator.load in the child" in str(error) else 2)
        os._exit(1)
    assert _end_of(child, seconds=30) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_close_in_a_forked_child_leaves_the_engine_alone() -> None:
    pytest.importorskip("onnxruntime")
    with Generator.load(device="cpu", threads=4) as generator:  # threads that the child lacks
        before = generator.sample(1, seed=0, steps=1)
        child = os.fork()
        if child == 0:
            with generator:
                pass
            generator.close()
            os._exit(0 if generator._network is not None else 1)
        assert _end_of(child, seconds=30) == 0
        assert (generator.sample(1, seed=0, steps=1) == before).all()


def _end_of(child: int, seconds: float) -> int:
    """The wait status of a child, which is killed if it takes longer."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


# What does not fit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be a whole number >= 1; got 0"),
        ({"n": -1}, "n must be a whole number >= 1; got -1"),
        ({"n": 1.5}, "n must be a whole number >= 1; got 1.5"),
        ({"n": True}, "n must be a whole number >= 1; got True"),
        ({"batch": 0}, "batch must be a whole number >= 1; got 0"),
        ({"first": -1}, "first must be a whole number >= 0; got -1"),
        ({"steps": 0}, "steps must be a whole number >= 1; got 0"),
        ({"steps": -5}, "steps must be a whole number >= 1; got -5"),
        ({"steps": 1001}, r"steps must be in 1..1000, .* got 1001"),
        ({"steps": 2.5}, "steps must be a whole number >= 1; got 2.5"),
        ({"sampler": "eular"}, "got 'eular'; did you mean 'euler'"),
        ({"sampler": "ddpm", "eta": 1.0}, "option of sampler 'ddpm' must be one of steps, .*'eta'"),
        ({"sampler": "ddim", "eta": 1.5}, r"eta must be in 0..1; got 1.5"),
        ({"clip": -1.0}, "clip must be a number above 0, a percentile such as .* got -1.0"),
        ({"seed": True}, r"seed must be a whole number in 0..2\*\*64 - 1 or None; got True \(bool"),
        ({"seed": 1.0}, r"got 1.0 \(float\)"),
        ({"seed": -1}, "seed must be in"),
        ({"seed": 2**64}, "seed must be in"),
        ({"label": 10}, "no label 10; labels are 0 t-shirt, 1 trouser"),
        ({"label": -1}, "no label -1"),
        ({"label": "hat"}, "no label 'hat'"),
        ({"label": True}, "no label True"),
        ({"n": 3, "label": [1, 2]}, "got 2 labels for n = 3 images; give one or n of them"),
        ({"guidance": 2.0}, "guidance needs a label"),
        ({"label": 1, "guidance": float("nan")}, "guidance must be a number in .*; got nan"),
        ({"first": 2**64}, "first must be a whole number <= "),
        ({"label": 1.5}, "no label 1.5; labels are 0 t-shirt"),
        ({"label": np.array(3)}, r"no label array\(3\)"),
        ({"label": np.zeros((1, 1), int)}, "no label array"),
        ({"label": {}}, "no label {}"),
        ({"sampler": "ddim", "eta": 10**400}, "eta must be a number that float64 can hold"),
        ({"label": 1, "guidance": 10**400}, "guidance must be a number that float64 can hold"),
        ({"dtype": "float16"}, "dtype must be 'uint8' or 'float32'; got 'float16'"),
    ],
)
def test_bad_arguments(toy: Generator, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        toy.sample(**arguments)


def test_stream_checks_its_arguments_at_once(toy: Generator) -> None:
    with pytest.raises(ConfigError, match="n must be a whole number"):
        toy.stream(0)


def test_a_label_where_there_are_none() -> None:
    bundle = Bundle.open()
    bundle = replace(bundle, manifest=replace(bundle.manifest, class_names=()))
    generator = Generator(bundle, ToyEngine(labelled=False), "fp32")
    assert generator.sample(2, seed=0, steps=3).shape == (2, 28, 28, 1)
    with pytest.raises(ConfigError, match="trained without labels; leave label out"):
        generator.sample(1, label=1)
    with pytest.raises(ConfigError, match="guidance needs a label"):
        generator.sample(1, guidance=2.0)


def test_a_model_with_labels_but_no_null_label() -> None:
    bundle, engine = Bundle.open(), ToyEngine()
    bundle = replace(bundle, manifest=replace(bundle.manifest, has_null_label=False))
    generator = Generator(bundle, engine, "fp32")
    generator.warmup(2)
    assert generator.sample(2, label=[0, "bag"], seed=0, steps=3).shape == (2, 28, 28, 1)
    assert generator.sample(1, label=3, guidance=1.0, seed=0, steps=3).shape == (1, 28, 28, 1)
    assert max(call["label"].max() for call in engine.calls) < 10
    for label in (None, [3, None]):
        with pytest.raises(ConfigError, match="knows no images without a label, and got none; giv"):
            generator.sample(2, label=label)
    with pytest.raises(ConfigError, match="no label 10; labels are 0 t-shirt"):
        generator.sample(1, label=10)
    with pytest.raises(ConfigError, match="guidance 2 needs what the model 'fashion-mnist' answe"):
        generator.sample(1, label=3, guidance=2.0)
    with pytest.raises(ConfigError, match="knows no images without a label"):
        generator._open()(np.zeros((1, 1, 28, 28), np.float32), 1, None)


def test_a_model_that_does_not_fit_its_manifest() -> None:
    with pytest.raises(BundleError, match="takes x, t and gives prediction; expected x, t, label"):
        Generator(Bundle.open(), ToyEngine(labelled=False), "fp32")
    with pytest.raises(BundleError, match=r"sample_shape \(1, 28, 28\)"):
        Generator(Bundle.open(), ToyEngine(sample_shape=(3, 28, 28)), "fp32")


def test_unknown_runtime_and_device() -> None:
    with pytest.raises(
        RuntimeUnavailableError, match="unknown runtime 'tflite'; runtimes are auto"
    ):
        Generator.load(runtime="tflite")
    pytest.importorskip("onnxruntime")
    with pytest.raises(RuntimeUnavailableError, match="ONNX Runtime has no device 'tpu'"):
        Generator.load(device="tpu")
