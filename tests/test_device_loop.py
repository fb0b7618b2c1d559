"""The loop on the device against the one on the host, on a GPU of NumPy arrays (see fake_gpu).

Its kernels are those of step.cu, compiled for the CPU. A row without noise gives the same state bit
for bit; a draw may be rounded otherwise, as another library computes the logarithm.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import fake_gpu
import numpy as np
import pytest
import step_on_cpu
from fake_gpu import CudaError, FakeCuda, GpuToy

from ddpm_edge import Bundle, Generator, device_loop, samplers
from ddpm_edge.errors import (
    ClosedError,
    ConfigError,
    EngineError,
    EngineLostError,
    NonFiniteError,
    OutOfMemoryError,
)
from ddpm_edge.noise import Stream, standard_normal
from ddpm_edge.plan import PREDICTIONS
from ddpm_edge.restoration import AveragePool, Grayscale, Mask, Matrix
from ddpm_edge.runtimes import cuda
from ddpm_edge.samplers import SAMPLERS
from ddpm_edge.sampling import Network, sample_states
from ddpm_edge.schedule import Schedule
from ddpm_edge.tasks import Restore, Vary

A_DRAW = 5e-7  # how far two roundings to float32 of a normal draw are apart, at most 6 in size
B, SHAPE = 3, (1, 28, 28)

MASK = np.zeros((28, 28), bool)
MASK[5:20, 9:] = True


@pytest.fixture(params=[True, False], ids=["integrated", "discrete"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = fake_gpu.install(monkeypatch).cuda
    fake.integrated = request.param
    return fake


@pytest.fixture
def toy(gpu: FakeCuda) -> GpuToy:
    return GpuToy(gpu)


Load = Callable[..., Generator]


@pytest.fixture
def load(toy: GpuToy) -> Iterator[Load]:
    """A Generator of the toy network."""
    loaded = []

    def load_(loop: str = "auto", engine: GpuToy = toy) -> Generator:
        loaded.append(Generator(Bundle.open(), engine, "fp32", loop=loop))
        return loaded[-1]

    yield load_
    for generator in loaded:
        generator.close()


def both(load: Load, **arguments: Any) -> tuple[list[Any], list[Any]]:
    """The steps of a stream by the loop on the device, and by the one on the host."""
    ours, theirs = (list(load(loop).stream(**arguments)) for loop in ("device", "host"))
    assert [(s.index, s.total, s.t, s.first) for s in ours] == [
        (s.index, s.total, s.t, s.first) for s in theirs
    ]
    return ours, theirs


def largest(ours: list[Any], theirs: list[Any], what: str) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max(float(np.abs(getattr(a, what) - getattr(b, what)).max()) for a, b in pairs)


# The kernels


@pytest.mark.parametrize("stream", list(Stream))
@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_draws_are_those_of_noise_version_1(seed: int, stream: Stream) -> None:
    draw = step_on_cpu.step().draw
    for sample, row, count in [(0, 0, 64), (7, 999, 9), (2**40, 3, 17)]:
        words = [(seed, int(stream), sample, row, i) for i in range(count)]
        ours = [draw((ctypes.c_uint64 * 5)(*numbers)) for numbers in words]
        theirs = standard_normal(seed, stream, sample, row, count)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=A_DRAW)


def test_python_mirrors_the_structs() -> None:
    assert step_on_cpu.step().size_of(0) == device_loop.TABLE.itemsize
    assert step_on_cpu.step().size_of(1) == ctypes.sizeof(device_loop.Run)


def test_the_ptx_is_made_of_the_source() -> None:
    pytest.importorskip("nvidia.cuda_nvrtc", reason="pip install nvidia-cuda-nvrtc-cu12")
    from nvrtc import compile_ptx

    source = step_on_cpu.SOURCE.read_text()
    assert compile_ptx(source) == step_on_cpu.SOURCE.with_suffix(".ptx").read_text(), "make ptx"
    with pytest.raises(RuntimeError, match="is undefined"):
        compile_ptx(source.replace("fabsf", "fabs_of"))


def test_states_are_not_multiplied_and_added_at_once() -> None:
    """float32 is rounded after every operation, as NumPy does; the draws are float64."""
    ptx = step_on_cpu.SOURCE.with_suffix(".ptx").read_text()
    assert "fma.rn.f32" not in ptx
    # without a rounding of its own, ptxas may join one with the next
    assert set(re.findall(r"\b(?:add|sub|mul)(?:\.\w+)?\.f32", ptx)) == {
        "add.rn.f32", "sub.rn.f32", "mul.rn.f32"
    }  # fmt: skip


# Plans

TRAVEL = {"travel_length": 3, "travel_repeat": 2}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ddpm": [{"variance": "beta"}, {"variance": "beta-tilde"}, TRAVEL],
    "ddim": [{"eta": 0.0}, {"eta": 0.7}, TRAVEL],
    "dpmpp": [{"order": 1}, {"order": 2}, {"order": 3}, {"order": 2, "sde": True}],
    "dpm": [{"order": 1}, {"order": 3}, {"order": 2, "sde": True}],
    "unipc": [{"order": 2}, {"order": 3}],
    "ipndm": [{"order": 2}, {"order": 4}],
    "pc": [{"corrections": 2}],
}
CALLS = [
    (name, options | {"clip": clip})
    for name in sorted(set(SAMPLERS) - {"euler"})
    for options in OPTIONS.get(name, [{}])
    for clip in (None, 1.0, 0.3)
]


@pytest.mark.filterwarnings("ignore::ddpm_edge.samplers.SamplerWarning")  # few steps
@pytest.mark.parametrize(("sampler", "options"), CALLS, ids=str)
def test_every_sampler(load: Load, sampler: str, options: dict[str, Any]) -> None:
    arguments = {"sampler": sampler, "steps": 12, "seed": 5, "first": 4, "label": [1, None, 9]}
    plan = load().plan(sampler, 12, **options)
    ours, theirs = both(load, n=B, **arguments, **options)
    # What a draw's rounding becomes in the chain: the largest state over that of a draw.
    size = max(1.0, *(float(np.abs(s.x).max()) for s in theirs))
    drawn = 0.0 if not plan.s.any() else 8 * A_DRAW * size * max(1.0, np.abs(plan.s).max())
    assert largest(ours, theirs, "x") <= drawn
    assert largest(ours, theirs, "x0") <= drawn * max(1.0, float((1 / plan.signal).max()))


def test_every_sampler_is_among_them() -> None:
    assert {name for name, _ in CALLS} | {"euler"} == set(SAMPLERS)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", ["ddim", "ipndm", "unipc"])
def test_every_prediction(toy: GpuToy, prediction: str, sampler: str, clip: float | None) -> None:
    manifest = replace(Bundle.open().manifest, prediction=prediction)
    plan = SAMPLERS[sampler](Schedule.linear(), 7, clip=clip)
    ours, theirs = (
        [
            (s.x.copy(), s.x0())
            for s in sample_states(Network(toy, manifest, loop), plan, 3, range(2))
        ]
        for loop in ("device", "host")
    )
    np.testing.assert_array_equal(ours, theirs)


def test_rectified_flow(toy: GpuToy) -> None:
    flow = Schedule.rectified_flow(100)
    manifest = replace(Bundle.open().manifest, prediction="velocity", schedule=flow)
    plan = samplers.euler(flow, 9)
    ours, theirs = (
        [s.x.copy() for s in sample_states(Network(toy, manifest, loop), plan, 3, range(2))]
        for loop in ("device", "host")
    )
    np.testing.assert_array_equal(ours, theirs)


def test_a_plan_without_rows(load: Load) -> None:
    image = np.full((28, 28, 1), 77, np.uint8)
    result = load("device").run(task=Vary(image, 0.0), seed=1)
    np.testing.assert_array_equal(result.images[0], image)
    assert result.loop == "host"


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_varied_images_and_latents(load: Load, strength: float) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 28, 28, 1), np.uint8)
    ours, theirs = both(load, n=2, task=Vary(images, strength), seed=1, steps=6)
    assert largest(ours, theirs, "x") == 0
    latents = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    ours, theirs = both(load, n=2, latents=latents, seed=1, steps=6)
    assert largest(ours, theirs, "x") == 0


def test_inversion_stopped_too(load: Load) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 1), np.uint8)
    stop: Any = {}
    for stop in ({}, {"callback": lambda step: step.index == 3}):
        ours, theirs = (load(loop).invert(images, steps=8, **stop) for loop in ("device", "host"))
        np.testing.assert_array_equal(ours, theirs)


# Guidance

GUIDANCE = [
    {"guidance": 2.5},
    {"guidance": [1.0, 3.0, -0.5]},
    {"guidance": [2.0, 2.0, 2.0], "label": [3, None, 4]},
    {"guidance": 2.5, "guidance_interval": (200, 700)},
    {"guidance": 2.5, "guidance_interval": (990, 1000)},
    {"guidance": 2.5, "sampler": "ipndm"},
]


@pytest.mark.parametrize("arguments", GUIDANCE, ids=str)
def test_guidance(load: Load, arguments: dict[str, Any]) -> None:
    ours, theirs = both(load, n=B, seed=2, steps=9, **{"label": 3} | arguments)
    assert largest(ours, theirs, "x") == 0
    assert largest(ours, theirs, "x0") == 0


def test_guidance_asks_twice_where_it_acts_alone(load: Load, toy: GpuToy, gpu: FakeCuda) -> None:
    generator = load("device")
    call: dict[str, Any] = {"label": 1, "guidance": 2.0, "guidance_interval": (200, 800)}
    result = generator.run(2, steps=10, seed=0, **call)
    acts = int(((result.plan.t >= 200) & (result.plan.t <= 800)).sum())
    # Of each kind one is run and one captured; the others are the graphs' replays.
    assert sorted(toy.questions) == [2, 2, 4, 4]
    assert gpu.calls.count("cudaGraphInstantiate") == 2
    assert gpu.calls.count("cudaGraphLaunch") == 10 - 2
    asked = [len(call["x"]) for call in toy.calls]
    assert asked == [4 if 200 <= t <= 800 else 2 for t in result.plan.t.tolist()]
    assert asked.count(4) == acts == 4


def test_what_guidance_need_not_ask_does_not_matter(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's batch is twice the samples, also of those that are not guided."""
    usual = fake_gpu.ToyEngine.__call__

    def broken(self: Any, arrays: Any) -> Any:
        answers = usual(self, arrays)
        if len(arrays["x"]) == 4:
            answers["prediction"][2] = np.nan  # of the first sample, without its label
        return answers

    call: dict[str, Any] = {"label": 3, "guidance": [1.0, 2.0], "seed": 2, "steps": 5}
    theirs = load("host").sample(2, **call)
    monkeypatch.setattr(fake_gpu.ToyEngine, "__call__", broken)
    np.testing.assert_array_equal(load("device").sample(2, **call), theirs)


# Measurements


@pytest.mark.parametrize("sigma_y", [0.0, 0.1])
@pytest.mark.parametrize(
    "arguments",
    [{"sampler": "ddpm", "variance": "beta-tilde"}, {"sampler": "ddim", "eta": 1.0, "clip": None},
     TRAVEL | {"sampler": "ddim", "eta": 1.0}, {"sampler": "dpmpp", "sde": True}],
    ids=str,
)  # fmt: skip
def test_a_mask(load: Load, sigma_y: float, arguments: dict[str, Any]) -> None:
    image = np.random.default_rng(0).uniform(-1, 1, (28, 28, 1)).astype(np.float32)
    task = Restore(image, Mask(MASK), sigma_y)
    ours, theirs = both(load, n=B, task=task, seed=3, steps=8, **arguments)
    size = max(1.0, *(float(np.abs(s.x).max()) for s in theirs))
    assert largest(ours, theirs, "x") <= 8 * A_DRAW * size
    if sigma_y == 0.0:
        assert np.abs(ours[-1].x[:, 0] - image[..., 0])[:, ~MASK].max() <= 1e-6


def test_a_mask_for_each_and_no_noise(load: Load) -> None:
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (4, 28, 28, 1)).astype(np.float32)
    masks = np.stack([np.roll(MASK, i, axis=0) for i in range(4)])
    call: dict[str, Any] = {"task": Restore(images, Mask(masks)), "sampler": "ipndm", "seed": 0}
    ours, theirs = (
        load(loop).run(4, batch=3, steps=6, dtype="float32", **call) for loop in ("device", "host")
    )
    np.testing.assert_array_equal(ours.images, theirs.images)
    assert (ours.loop, theirs.loop) == ("device", "host")


# What it leaves to the host's loop

CANNOT = [
    ({"clip": "99.5%"}, "clip at a percentile"),
    ({"task": Restore(np.zeros((7, 7, 1), np.uint8), AveragePool(4))}, "no AveragePool, only a"),
    ({"task": Restore(np.zeros(3), Matrix(np.eye(3, 784), (28, 28, 1)))}, "no Matrix, only a Mask"),
]


@pytest.mark.parametrize(("arguments", "why"), CANNOT, ids=lambda value: str(value)[:30])
def test_what_it_cannot_do_runs_on_the_host(
    load: Load, arguments: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "ddpm_edge"):
        ours = load().run(steps=4, seed=0, **arguments)
    theirs = load("host").run(steps=4, seed=0, **arguments)
    assert ours.loop == theirs.loop == "host"
    np.testing.assert_array_equal(ours.images, theirs.images)
    (said,) = [r.getMessage() for r in caplog.records if "loop runs on the host" in r.getMessage()]
    assert why in said
    with pytest.raises(ConfigError, match=f"{why}.*leave loop out"):
        load("device").run(steps=4, seed=0, **arguments)


def test_colours_are_left_to_the_host() -> None:
    from ddpm_edge.restoration import Measurement

    measurement = Measurement(Grayscale(), np.zeros((1, 1, 4, 4), np.float32))
    assert "no Grayscale, only a Mask" in device_loop.cannot(
        samplers.ddim(Schedule.linear(), 5), measurement
    )


def test_loops_that_there_are_not(load: Load) -> None:
    with pytest.raises(ConfigError, match="loop must be one of auto, host, device; got 'gpu'"):
        load("gpu")
    with pytest.raises(ConfigError, match="loop='device' needs an engine .* toy on cpu is none"):
        Generator(Bundle.open(), fake_gpu.ToyEngine(), "fp32", loop="device")
    generator = Generator(Bundle.open(), fake_gpu.ToyEngine(), "fp32")
    assert generator.run(1, steps=1).loop == "host"


# One call after the other


def test_the_step_is_replayed(load: Load, toy: GpuToy, gpu: FakeCuda) -> None:
    generator = load("device")
    for seed in range(3):
        generator.sample(2, seed=seed, steps=20)
    assert toy.questions == [2, 2]  # once as it is, once captured
    assert len(toy.calls) == 60
    assert gpu.calls.count("cudaGraphLaunch") == 59
    assert gpu.calls.count("cudaStreamBeginCapture") == 1
    other = generator.plan("ipndm", 20)  # of more history, and without noise: the same graph
    generator.sample(2, seed=0, sampler="ipndm", steps=20)
    assert other.b.shape[1] > 1
    assert gpu.calls.count("cudaStreamBeginCapture") == 1


def test_an_engine_that_cannot_be_captured(load: Load, gpu: FakeCuda) -> None:
    engine = GpuToy(gpu, capturable=False)
    ours = load("device", engine).sample(2, seed=0, steps=5)
    assert engine.questions == [2] * 5
    assert "cudaStreamBeginCapture" not in gpu.calls
    np.testing.assert_array_equal(ours, load("host").sample(2, seed=0, steps=5))


@pytest.mark.parametrize("call", ["cudaStreamBeginCapture", "cudaGraphInstantiate"])
def test_a_capture_that_fails(
    load: Load, toy: GpuToy, gpu: FakeCuda, call: str, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.fail[call] = CudaError.cudaErrorStreamCaptureUnsupported
    generator = load("device")
    for _ in range(2):
        ours = generator.sample(2, seed=0, steps=5)
        np.testing.assert_array_equal(ours, load("host").sample(2, seed=0, steps=5))
    (said,) = [r.getMessage() for r in caplog.records]
    assert said.startswith(f"no CUDA graph of a step: CUDA failed: {call}")
    assert "cudaGraphLaunch" not in gpu.calls


def test_nothing_is_copied_between_two_steps(load: Load, gpu: FakeCuda) -> None:
    generator, copies = load("device"), []
    for steps in (2, 30):
        gpu.calls.clear()
        generator.sample(2, seed=0, sampler="ddim", eta=1.0, steps=steps)
        copies.append(gpu.calls.count("cudaMemcpyAsync"))
    assert 0 < copies[0] == copies[1] < 12
    gpu.calls.clear()
    for step in generator.stream(2, seed=0, steps=30):
        assert step.x.shape == (2, *SHAPE)
    # The state after a step, and the x0 that it saw, which a Jetson's CPU reads where it is.
    each = 1 if gpu.integrated else 2
    assert gpu.calls.count("cudaMemcpyAsync") - copies[0] == each * 29


@pytest.mark.parametrize("loop", ["device", "host"])
def test_a_callback_pays_for_what_it_looks_at(load: Load, gpu: FakeCuda, loop: str) -> None:
    generator, kept = load(loop), []
    expected = [(s.x, s.x0) for s in load(loop).stream(2, seed=0, steps=9)]
    copies = []
    for callback in (lambda step: step.index, lambda step: step.x0.sum(), kept.append):
        gpu.calls.clear()
        generator.sample(2, seed=0, steps=9, callback=callback)
        copies.append(gpu.calls.count("cudaMemcpyAsync"))
    none, one, two = copies
    x0, x = {"host": (0, 0), "device": (0 if gpu.integrated else 8, 8)}[loop]
    assert (one - none, two - none) == (x0, x0 + x)  # the last step's are copied in any case
    for step, (x, x0) in zip(kept, expected, strict=True):  # though it looks at them later
        np.testing.assert_array_equal(step.x, x)
        np.testing.assert_array_equal(step.x0, x0)


def test_states_are_copies(load: Load) -> None:
    steps = list(load("device").stream(2, seed=0, steps=8))
    for one, next_ in itertools.pairwise(steps):
        assert np.abs(one.x - next_.x).max() > 1e-3


def test_batches_and_first(load: Load) -> None:
    generator = load("device")
    whole = generator.sample(7, seed=1, steps=5, sampler="ddpm", variance="beta-tilde")
    parts = [
        generator.sample(1, seed=1, first=i, steps=5, sampler="ddpm", variance="beta-tilde")
        for i in range(7)
    ]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    split = generator.sample(7, seed=1, steps=5, sampler="ddpm", variance="beta-tilde", batch=3)
    np.testing.assert_array_equal(whole, split)


def test_memory_is_kept_and_freed(load: Load, gpu: FakeCuda) -> None:
    generator = load("device")

    def call(seed: int) -> int:
        generator.sample(2, seed=seed, steps=6)
        generator.sample(1, seed=seed, label=3, guidance=2.0, steps=3)
        generator.sample(2, seed=seed, sampler="unipc", steps=4)
        return sum(len(blocks) for blocks in gpu.blocks.values())

    blocks, graphs = call(0), len(gpu.graphs)
    for seed in range(1, 20):
        assert call(seed) == blocks
    assert len(gpu.graphs) == graphs
    for n in range(3, 12):  # no more than a few sizes are kept
        generator.sample(n, batch=n, seed=0, steps=2)
    assert sum(len(b) for b in gpu.blocks.values()) < 3 * blocks
    generator.close()
    assert gpu.blocks == {"device": {}, "host": {}}
    assert not gpu.graphs
    assert not gpu.events
    assert not gpu.modules
    assert not gpu.streams


# What ends a call early


def test_a_callback_stops_it(load: Load) -> None:
    for stop_at in (0, 1, 4):
        ours, theirs = (
            load(loop).run(2, seed=0, steps=9, dtype="float32",
                           callback=lambda step, i=stop_at: step.index == i)
            for loop in ("device", "host")
        )  # fmt: skip
        assert ours.stopped
        np.testing.assert_array_equal(ours.images, theirs.images)


def test_a_deadline_waits_for_the_steps(load: Load, gpu: FakeCuda) -> None:
    generator = load("device")
    generator.sample(1, seed=0, steps=5)
    waits = []
    for deadline_ms in (None, 60_000):
        gpu.calls.clear()
        assert not generator.run(1, seed=0, steps=5, deadline_ms=deadline_ms).stopped
        waits.append(gpu.calls.count("cudaEventSynchronize"))
    assert waits[1] - waits[0] == 5  # for each step, not for the one before it alone
    result = generator.run(1, seed=0, steps=5, deadline_ms=1e-3)
    assert result.stopped
    np.testing.assert_array_equal(
        result.images, load("host").run(1, seed=0, steps=5, deadline_ms=1e-3).images
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_leaves_it_usable(load: Load, gpu: FakeCuda, error: type) -> None:
    generator = load("device")
    expected = generator.sample(2, seed=0, steps=6)

    def callback(step: Any) -> None:
        if step.index == 2:
            raise error

    with pytest.raises(error):
        generator.sample(2, seed=9, steps=6, callback=callback)
    assert not any(gpu.streams.values())  # nothing is left behind
    np.testing.assert_array_equal(generator.sample(2, seed=0, steps=6), expected)


def test_an_interrupt_while_it_waits(load: Load, gpu: FakeCuda) -> None:
    generator = load("device")
    expected = generator.sample(2, seed=0, steps=6)
    usual, waits = FakeCuda.cudaEventSynchronize, itertools.count()

    def interrupted(event: int) -> Any:
        if next(waits) == 2:
            raise KeyboardInterrupt
        return usual(gpu, event)

    gpu.cudaEventSynchronize = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        generator.sample(2, seed=1, steps=6)
    assert not any(gpu.streams.values())
    np.testing.assert_array_equal(generator.sample(2, seed=0, steps=6), expected)


def test_a_stream_that_is_left(load: Load) -> None:
    generator = load("device")
    stream = generator.stream(2, seed=0, steps=9)
    first = next(stream)
    while_it_runs = generator.sample(2, seed=0, steps=9)  # by another loop
    second = next(stream)
    del stream
    again = list(generator.stream(2, seed=0, steps=9))
    np.testing.assert_array_equal(first.x, again[0].x)
    np.testing.assert_array_equal(second.x, again[1].x)
    np.testing.assert_array_equal(while_it_runs, generator.sample(2, seed=0, steps=9))


@pytest.mark.parametrize("clip", [1.0, None])  # without, the later answers are not finite either
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("steps", [1, 3, 40])
def test_an_answer_that_is_not_finite(
    load: Load,
    toy: GpuToy,
    monkeypatch: pytest.MonkeyPatch,
    bad: float,
    steps: int,
    clip: float | None,
) -> None:
    generator = load("device")
    answer, t_bad = (
        fake_gpu.ToyEngine.__call__,
        int(generator.plan(steps=steps).t[min(1, steps - 1)]),
    )

    def broken(self: Any, arrays: Any) -> Any:
        answers = answer(self, arrays)
        if arrays["t"][0] == t_bad - 1:
            answers["prediction"][1, 0, 3, 3] = bad
        return answers

    monkeypatch.setattr(fake_gpu.ToyEngine, "__call__", broken)
    at = min(2, steps)
    with pytest.raises(NonFiniteError, match=f"step {at} of {steps}, t = {t_bad}: in samples 1 of"):
        generator.sample(2, seed=0, steps=steps, clip=clip)
    assert len(toy.calls) <= at + device_loop.AHEAD  # it did not go on to the end


def test_threads(load: Load) -> None:
    generator = load("device")
    expected = [generator.sample(2, seed=seed, steps=7) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda seed: generator.sample(2, seed=seed, steps=7), range(6)))
    np.testing.assert_array_equal(got, expected)


def test_closing_ends_another_thread(load: Load, gpu: FakeCuda) -> None:
    generator, inside, go_on = load("device"), threading.Event(), threading.Event()

    def callback(step: Any) -> None:
        inside.set()
        go_on.wait(10)

    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(generator.sample, 2, seed=0, steps=9, callback=callback)
        inside.wait(10)
        generator.close()
        go_on.set()
        with pytest.raises(ClosedError):
            call.result(10)
    assert gpu.blocks == {"device": {}, "host": {}}
    assert not gpu.modules


@pytest.mark.parametrize("call", ["cudaGraphLaunch", "cudaEventSynchronize", "cuLaunchKernel"])
def test_a_lost_gpu(load: Load, gpu: FakeCuda, call: str) -> None:
    generator = load("device")
    generator.sample(1, seed=0, steps=3)
    gpu.fail[call] = CudaError.cudaErrorIllegalAddress
    for _ in range(2):  # also once CUDA itself seems to work again
        with pytest.raises(EngineLostError, match=r"IllegalAddress, .*restart the process"):
            generator.sample(2, seed=0, steps=3)
        gpu.fail.clear()


def test_too_little_memory(load: Load, gpu: FakeCuda) -> None:
    generator = load("device")
    gpu.memory = 40_000  # enough for one sample: x and x0, answers and those of before
    expected = generator.sample(1, seed=0, steps=3)
    with pytest.raises(OutOfMemoryError, match="not enough memory for 4 samples"):
        generator.sample(4, seed=0, steps=3)
    np.testing.assert_array_equal(generator.sample(1, seed=0, steps=3), expected)
    gpu.fail["cudaHostAlloc"] = CudaError.cudaErrorMemoryAllocation
    with pytest.raises(OutOfMemoryError):
        generator.sample(2, batch=1, first=3, label=1, guidance=2.0, seed=0, steps=3)
    gpu.fail.clear()
    np.testing.assert_array_equal(generator.sample(1, seed=0, steps=3), expected)


def test_loops_that_wait_make_room(load: Load, gpu: FakeCuda) -> None:
    if gpu.integrated:
        pytest.skip("the host's few bytes are of the same memory, and nothing makes room for them")
    generator = load("device")
    gpu.memory = 90_000
    for n in (1, 2, 1, 3, 2, 4):  # all at once are too many
        assert len(generator.sample(n, seed=0, steps=2)) == n


def test_a_batch_of_which_some_are_not_guided(load: Load, toy: GpuToy) -> None:
    """The host asks about 5, the device about 8."""
    toy.max_batch = 6  # type: ignore[assignment]
    call: dict[str, Any] = {"label": 1, "guidance": [1.0, 1.0, 1.0, 2.0], "steps": 3, "batch": 4}
    assert load().run(4, seed=0, **call).loop == "host"
    assert load().run(3, seed=0, label=1, guidance=2.0, steps=3, batch=3).loop == "device"


def test_a_gpu_that_refuses_the_kernels(
    load: Load, gpu: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.fail["cuModuleLoadData"] = CudaError.cudaErrorUnsupportedPtxVersion
    generator = load()
    assert [generator.run(1, seed=0, steps=2).loop for _ in range(2)] == ["host", "host"]
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "the loop runs on the host: the GPU does not take its kernels" in said
    with pytest.raises(ConfigError, match="UnsupportedPtxVersion.*leave loop out"):
        load("device").sample(1, seed=0, steps=2)


def test_a_batch_that_the_engine_refuses(load: Load, toy: GpuToy) -> None:
    def refuse(batch: int, addresses: Any) -> Any:
        raise EngineError(f"batches of 1 to 2; got {batch}")

    generator = load("device")
    toy.resident = refuse  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="got 3"):
        generator.sample(3, seed=0, steps=2)


def test_latency_waits_for_each_step(load: Load, gpu: FakeCuda) -> None:
    generator = load("device")
    usual, seconds = gpu.work, 2e-3

    def slow(stream: int, jobs: int) -> None:
        time.sleep(seconds * (jobs > 0))  # the GPU is slow, and calls return at once
        usual(stream, jobs)

    gpu.work = slow  # type: ignore[method-assign]
    assert generator.latency(2).step_ms >= seconds * 1e3


def test_what_cannot_be_captured_is_warmed_up_once(load: Load, gpu: FakeCuda) -> None:
    engine = GpuToy(gpu, capturable=False)
    generator = load("device", engine)
    call: dict[str, Any] = {"label": 1, "guidance": 2.0, "budget_ms": 1e6, "seed": 0}
    first = generator.run(2, **call)
    asked = len(engine.questions)
    generator.run(2, **call)
    assert len(engine.questions) - asked == first.plan.evaluations


@pytest.mark.parametrize(
    "call",
    [{}, {"label": 1, "guidance": 2.0},
     {"label": 1, "guidance": 2.0, "guidance_interval": (200, 700)}],
    ids=["plain", "guided", "guided within an interval"],
)  # fmt: skip
def test_what_is_warm_has_its_graphs(load: Load, gpu: FakeCuda, call: dict[str, Any]) -> None:
    generator = load("device")
    if call:  # a budget is kept by quick steps, and latencies are measured without guidance
        warm, known = generator._warm_up_for, []
        generator._warm_up_for = lambda request: (  # type: ignore[method-assign]
            warm(request), known.append(gpu.calls.count("cudaStreamBeginCapture"))
        )  # fmt: skip
        generator.run(2, budget_ms=1e6, seed=0, **call)
        assert gpu.calls.count("cudaStreamBeginCapture") == known[-1]  # none in what is timed
    else:
        generator.warmup(2)
    before = gpu.calls.count("cudaStreamBeginCapture")
    generator.sample(2, seed=0, steps=6, **call)
    assert gpu.calls.count("cudaStreamBeginCapture") == before > 0


def test_a_generator_that_is_collected_in_the_midst_of_a_call(load: Load, gpu: FakeCuda) -> None:
    """By the thread that holds the stream's lock, when Python happens to look for cycles."""
    generator = load("device")
    expected = generator.sample(2, seed=0, steps=6)

    class Widget:
        def __init__(self) -> None:
            self.me, self.stream = self, generator.stream(2, seed=1, steps=9)
            next(self.stream)

    usual = FakeCuda.cudaGraphLaunch

    def collecting(executable: int, stream: int) -> Any:
        gc.collect()
        return usual(gpu, executable, stream)

    gc.disable()
    try:
        Widget()
        gpu.cudaGraphLaunch = collecting  # type: ignore[method-assign]
        with ThreadPoolExecutor(1) as pool:
            got = pool.submit(generator.sample, 2, seed=0, steps=6).result(20)
    finally:
        gc.enable()
    np.testing.assert_array_equal(got, expected)


def test_a_collection_leaves_the_threads_gpu_as_it_is(load: Load, gpu: FakeCuda) -> None:
    gpu.names = ("Orin", "Orin")
    steps = load("device").stream(1, seed=0, steps=9)
    step = next(steps)
    gpu.cudaSetDevice(1)  # the app's own
    del steps
    gc.collect()
    assert np.isfinite(step.x).all()  # what is still held was copied all the same
    assert gpu.chosen[threading.get_ident()] == 1


def test_closing_by_a_thread_that_never_used_the_gpu(load: Load, gpu: FakeCuda) -> None:
    generator = load("device")
    generator.sample(1, seed=0, steps=2)
    generator._open()._loops._keep_idle(0)  # type: ignore[union-attr]  # as after a lack of memory
    with ThreadPoolExecutor(1) as pool:
        pool.submit(generator.close).result(20)
    assert not gpu.modules
    assert not gpu.streams


@pytest.mark.parametrize("forked", [False, True])
def test_what_nobody_closed_is_freed(
    gpu: FakeCuda, toy: GpuToy, monkeypatch: pytest.MonkeyPatch, forked: bool
) -> None:
    generator = Generator(Bundle.open(), toy, "fp32")
    generator.sample(1, seed=0, steps=2)
    gpu.calls.clear()
    with monkeypatch.context() as patch:
        if forked:
            patch.setattr("os.getpid", lambda: 0)
        del generator
        gc.collect()
    left = [gpu.events, gpu.modules, gpu.graphs, *gpu.blocks.values()]
    assert all(left) if forked else not any(left)
    assert bool(gpu.calls) != forked  # a child's locks may be held by a thread that it has not
    assert not toy.closed  # that is of whom it belongs to
    toy.close()


def test_a_step_of_another_run_is_not_read(load: Load, toy: GpuToy, gpu: FakeCuda) -> None:
    """Though copying it back failed when its own ended."""
    network = Network(toy, Bundle.open().manifest)
    states = sample_states(network, samplers.ddim(Schedule.linear(), 5), 0, range(2))
    state = next(states)
    gpu.fail["cudaEventRecord"] = CudaError.cudaErrorInvalidValue
    states.close()  # type: ignore[attr-defined]
    gpu.fail.clear()
    list(sample_states(network, samplers.ddim(Schedule.linear(), 5), 1, range(2)))
    with pytest.raises(EngineError, match="gone on to another call"):
        state.x0()
    network.close()
    state.wait()  # there is nothing to wait for
    with pytest.raises(EngineError, match="or was freed"):
        state.x0()


def test_nothing_is_collected_while_a_graph_is_captured(load: Load, gpu: FakeCuda) -> None:
    seen, usual = [], FakeCuda.cudaStreamEndCapture

    def end(stream: int) -> Any:
        seen.append(gc.isenabled())
        return usual(gpu, stream)

    gpu.cudaStreamEndCapture = end  # type: ignore[method-assign]
    load("device").sample(1, seed=0, steps=4)
    assert seen == [False]
    assert gc.isenabled()


def test_copies_go_where_they_should(gpu: FakeCuda) -> None:
    stream = cuda.new_stream(cuda.gpu())
    for shared in (True, False):
        memory = cuda.Memory(64, shared)
        memory.write(np.arange(8.0), stream)
        got = memory.read((8,), np.float64, stream)
        gpu.cudaStreamSynchronize(stream)
        np.testing.assert_array_equal(got, np.arange(8.0))
        memory.free()
    assert gpu.blocks == {"device": {}, "host": {}}
