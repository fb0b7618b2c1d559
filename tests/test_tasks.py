"""One model, many uses: guidance a sample, restoration, variation, inversion, deadlines."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import ToyEngine

from ddpm_edge import AveragePool, Bundle, Generator, Grayscale, Mask, Matrix, Restore, Step, Vary
from ddpm_edge.errors import ConfigError, EngineError
from ddpm_edge.images import ImageWarning
from ddpm_edge.noise import Draws
from ddpm_edge.restoration import EXACT
from ddpm_edge.samplers import SAMPLERS

SAME = 1e-5  # float32 sums in another order, through a few network evaluations
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 28, 28, 1), np.uint8)
HOLE = np.zeros((28, 28), bool)
HOLE[8:18, 9:19] = True
RGB_SHAPE = (3, 8, 8)


def pooled(images: np.ndarray, factor: int) -> np.ndarray:
    n, height, width, channels = images.shape
    blocks = images.reshape(n, height // factor, factor, width // factor, factor, channels)
    return blocks.astype(np.float64).mean(axis=(2, 4))


def rgb() -> Generator:
    """A toy network for RGB images, without labels."""
    bundle = Bundle.open()
    manifest = replace(bundle.manifest, sample_shape=RGB_SHAPE, class_names=())
    return Generator(replace(bundle, manifest=manifest), ToyEngine(RGB_SHAPE, False), "fp32")


# Guidance


def test_scale_1_is_plain_conditioning_to_the_last_bit(generator: Generator) -> None:
    arguments: dict[str, Any] = {"label": [3, 5, 7], "seed": 1, "steps": 5, "dtype": "float32"}
    plain = generator.sample(3, **arguments)
    assert (generator.sample(3, guidance=1.0, **arguments) == plain).all()
    assert (generator.sample(3, guidance=[1, 1.0, 1], **arguments) == plain).all()


def test_scales_and_labels_of_samples_equal_separate_calls(generator: Generator) -> None:
    labels, scales = [3, None, 7, 7], [4.0, 2.0, 1.0, 0.0]
    common: dict[str, Any] = {"seed": 1, "steps": 5, "dtype": "float32"}
    together = generator.sample(4, label=labels, guidance=scales, **common)
    for i, (label, scale) in enumerate(zip(labels, scales, strict=True)):
        guidance = None if label is None else scale  # no label: nothing to guide to
        alone = generator.sample(1, first=i, label=label, guidance=guidance, **common)
        assert np.abs(together[i : i + 1] - alone).max() <= SAME
    unlabelled = generator.sample(1, first=3, **common)
    assert np.abs(together[3:] - unlabelled).max() <= SAME  # scale 0 is the model without a label
    assert np.abs(together[2] - together[3]).max() > 0.1


def test_guidance_acts_in_its_interval_alone() -> None:
    engine = ToyEngine()
    generator = Generator(Bundle.open(), engine, "fp32")
    generator.sample(2, label=[3, None], guidance=2.0, guidance_interval=(300, 750), steps=4,
                     sampler="ddim", seed=0)  # fmt: skip
    asked = [(call["t"][0] + 1, call["label"].tolist()) for call in engine.calls]
    assert asked == [(1000, [3, 10]), (750, [3, 10, 10]), (500, [3, 10, 10]), (250, [3, 10])]
    whole = generator.sample(2, label=3, guidance=2.0, guidance_interval=(1, 1000), seed=0)
    assert (whole == generator.sample(2, label=3, guidance=2.0, seed=0)).all()


# Restoration


@pytest.mark.filterwarnings("ignore::ddpm_edge.samplers.SamplerWarning")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_known_pixels_come_back_and_means_are_kept(toy: Generator, sampler: str) -> None:
    plan: dict[str, Any] = {"sampler": sampler, "steps": 6, "seed": 0}
    painted = toy.inpaint(IMAGES, HOLE, **plan)
    assert (painted[:, ~HOLE] == IMAGES[:, ~HOLE]).all()
    assert (painted[:, HOLE] != IMAGES[:, HOLE]).mean() > 0.9
    for factor in (2, 7):
        small = np.rint(pooled(IMAGES, factor)).astype(np.uint8)
        small[0, :2] = 255  # as bright as can be
        large = toy.upscale(small, factor, **plan)
        assert np.abs(pooled(large, factor) - small).max() <= 0.6  # half a level, and a tenth


def test_the_built_in_model_keeps_what_is_known(generator: Generator) -> None:
    """With labels, guidance, time travel, one mask an image."""
    masks = np.stack([HOLE, ~HOLE, HOLE.T])
    painted = generator.inpaint(
        IMAGES, masks * 255, label=[1, 2, 3], guidance=2.0, steps=6, travel_length=2,
        travel_repeat=2, batch=2, seed=0,
    )  # fmt: skip
    assert (painted[~masks] == IMAGES[~masks]).all()


def test_colorize_keeps_the_gray() -> None:
    gray = RNG.integers(0, 256, (4, 8, 8), np.uint8)
    colour = rgb().colorize(gray, seed=0, steps=5)
    assert colour.shape == (4, 8, 8, 3)
    back = colour @ Grayscale().weights.reshape(3)
    assert np.abs(back - gray).max() <= 0.6  # half a level, and a tenth
    assert (colour.max(axis=3) != colour.min(axis=3)).any()


def test_restore_from_any_matrix(toy: Generator) -> None:
    A = RNG.standard_normal((50, 784))
    y = (IMAGES.reshape(3, -1) / 127.5 - 1) @ A.T
    restored = toy.restore(y, Matrix(A, (28, 28, 1)), dtype="float32", seed=0, steps=5)
    tolerance = EXACT * np.linalg.norm(A, axis=1).max()  # 0.02, of values of about 16
    assert np.abs(restored.reshape(3, -1) @ A.T - y).max() <= tolerance + 1e-3


def test_noisy_pixels_are_not_believed(generator: Generator) -> None:
    """Denoising: all but one pixel are known, with noise; the result is nearer to the truth."""
    truth = generator.sample(4, label=[1, 5, 7, 8], seed=3, dtype="float32")
    noisy = np.clip(truth + 0.2 * RNG.standard_normal(truth.shape), -1, 1)
    corner = np.zeros((28, 28), bool)
    corner[0, 0] = True
    error = {
        sigma_y: np.square(
            generator.inpaint(noisy, corner, sigma_y=sigma_y, dtype="float32", seed=0) - truth
        ).mean()
        for sigma_y in (0.0, 0.2)
    }
    assert error[0.2] < 0.5 * error[0.0]  # measured: 0.35


def test_draws_of_one_image_and_one_mask_for_many(toy: Generator) -> None:
    many = toy.inpaint(IMAGES[0], HOLE, n=3, seed=0)
    repeated = toy.inpaint(IMAGES[[0, 0, 0]], HOLE, seed=0)
    assert (many == repeated).all()
    assert (many[0] != many[1]).any()
    one = toy.inpaint(IMAGES[0, :, :, 0], HOLE.astype(np.float32), seed=0)
    assert (one == many[:1]).all()
    masks = np.stack([HOLE, HOLE.T])
    assert toy.inpaint(IMAGES[0], masks, seed=0).shape == (2, 28, 28, 1)


# Run, stream, callback, batches as in sample


BRIGHT = np.full((3, 14, 14), 250, np.uint8)
TASKS = {
    "inpaint": Restore(IMAGES, Mask(HOLE)),
    "upscale": Restore(BRIGHT, AveragePool(2)),
    "vary": Vary(IMAGES, 0.6),
    "vary at 1": Vary(IMAGES, 1.0),
}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_tasks_run_and_stream_and_split(toy: Generator, task: Any) -> None:
    result = toy.run(task=task, seed=4, steps=5, dtype="float32")
    assert result.images.shape == (3, 28, 28, 1)
    assert not result.stopped
    *_, last = toy.stream(task=task, seed=4, steps=5)
    assert (np.clip(last.x, -1, 1).transpose(0, 2, 3, 1) == result.images).all()
    split = toy.sample(task=task, seed=4, steps=5, dtype="float32", batch=2)
    assert np.abs(split - result.images).max() <= SAME
    again = toy.sample(task=task, seed=4, steps=5, dtype="float32", callback=lambda step: None)
    assert (again == result.images).all()


def test_previews_and_stopped_images_keep_what_is_known(toy: Generator) -> None:
    known = IMAGES[:, ~HOLE] / np.float32(127.5) - np.float32(1)
    for step in toy.stream(task=Restore(IMAGES, Mask(HOLE)), seed=0, steps=4):
        assert np.abs(step.x0.transpose(0, 2, 3, 1)[:, ~HOLE] - known).max() < 1e-6  # float32
    for step in toy.stream(task=TASKS["upscale"], seed=0, steps=4):
        assert np.abs(step.x0).max() <= 1.0
        assert np.abs(pooled(step.x0.transpose(0, 2, 3, 1), 2) - (250 / 127.5 - 1)).max() < 1e-3
    stop = toy.run(task=Restore(IMAGES, Mask(HOLE)), callback=lambda step: step.index == 1)
    assert stop.stopped
    assert (stop.images[:, ~HOLE] == IMAGES[:, ~HOLE]).all()


# Variation, latents, inversion, interpolation


def test_strength_from_the_image_to_an_independent_sample(generator: Generator) -> None:
    image = generator.sample(2, label=[2, 8], seed=9)
    assert (generator.vary(image, 0.0, seed=3) == image).all()
    assert (generator.vary(image, 1.0, seed=3) == generator.sample(2, seed=3)).all()
    moved = [
        np.abs(generator.vary(image, s, seed=3).astype(float) - image).mean()
        for s in (0.1, 0.4, 0.8)
    ]
    assert 0 < moved[0] < moved[1] < moved[2]
    assert list(generator.stream(task=Vary(image, 0.0))) == []


@pytest.mark.filterwarnings("ignore::ddpm_edge.samplers.SamplerWarning")
def test_vary_begins_at_strength_times_t(toy: Generator) -> None:
    def timesteps(strength: float, **plan: Any) -> list[int]:
        return toy.run(task=Vary(IMAGES[0], strength), seed=0, **plan).plan.t.tolist()

    assert timesteps(0.5)[0] == 500
    assert len(timesteps(0.5)) == 20
    assert timesteps(0.005) == [5, 4, 3, 2, 1]  # not more steps than timesteps
    assert timesteps(1e-9) == [1]
    assert timesteps(0.0018) == [2, 1]
    assert timesteps(0.3, sampler="ddpm") == list(range(300, 0, -1))
    assert timesteps(0.5, spacing=[900, 450, 10]) == [500, 450, 10]
    assert timesteps(0.5, spacing=[900, 600]) == [500]
    with pytest.raises(ConfigError, match="got 2000"):
        timesteps(0.5, steps=2000)


def test_latents_replace_the_draw(toy: Generator) -> None:
    first = next(iter(toy.stream(2, seed=6, sampler="ddim", steps=1)))
    z = Draws(6, 0, (2, 1, 28, 28)).prior()
    (again,) = toy.stream(latents=z, sampler="ddim", steps=1)
    assert (again.x == first.x).all()
    assert (toy.sample(latents=z, seed=6) == toy.sample(2, seed=6)).all()
    assert (toy.sample(latents=z.astype(np.float64), seed=6) == toy.sample(2, seed=6)).all()
    assert toy.sample(3, latents=z[0], seed=6).shape == (3, 28, 28, 1)


def test_invert_and_back(generator: Generator) -> None:
    image = generator.sample(2, label=[2, 8], seed=9, dtype="float32")
    errors = []
    for steps in (10, 40):
        z = generator.invert(image, steps=steps, batch=1)
        assert z.shape == (2, 1, 28, 28)
        back = generator.sample(latents=z, sampler="ddim", steps=steps, clip=None, dtype="float32")
        errors.append(np.square(back - image).mean())
    assert errors[1] < errors[0] / 4
    assert 10 * np.log10(4 / errors[1]) > 25


def test_a_stopped_inversion_goes_on_in_one_step(toy: Generator) -> None:
    whole = toy.invert(IMAGES, steps=2)
    stopped = toy.invert(IMAGES, steps=2, callback=lambda step: step.index == 0)
    assert stopped.shape == whole.shape
    eps = np.tanh(IMAGES.transpose(0, 3, 1, 2) / 127.5 - 1 + 499 / 1000 + 1.0)  # label 10
    signal, noise = (float(a[1000]) for a in (toy.schedule.signal, toy.schedule.noise))
    direct = signal * (IMAGES.transpose(0, 3, 1, 2) / 127.5 - 1) + noise * eps
    assert np.abs(stopped - direct).max() < 1e-5  # float32


def test_interpolation_ends_in_its_images(generator: Generator) -> None:
    a, b = generator.sample(2, label=[1, 1], seed=9)
    images = generator.interpolate(a, b, 5, steps=10, label=1, guidance=1.5)
    assert images.shape == (5, 28, 28, 1)
    assert (images[0] == a).all()
    assert (images[-1] == b).all()
    near = [np.abs(image.astype(float) - a).mean() for image in images]
    assert near == sorted(near)
    listed = generator.interpolate(a, b, 3, spacing=[900, 400, 50], guidance=[1, 2, 3], label=1)
    assert listed.shape == (3, 28, 28, 1)
    floats = generator.interpolate(a, b / np.float32(127.5) - 1, 2, steps=2, dtype="float32")
    assert np.abs(floats[0] - (a / 127.5 - 1)).max() < 1e-6  # float32


# Deadlines


class Slow(ToyEngine):
    """Takes 20 ms a call."""

    SECONDS = 0.02

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        time.sleep(self.SECONDS)
        return super().__call__(arrays)


def test_a_deadline_stops_with_the_x0_so_far() -> None:
    engine = Slow()
    generator = Generator(Bundle.open(), engine, "fp32")
    result = generator.run(2, seed=0, deadline_ms=130)
    assert result.stopped
    assert 1 <= len(engine.calls) <= 6  # a seventh would not have ended in time
    *_, last = itertools.islice(generator.stream(2, seed=0), len(engine.calls))
    expected = np.rint((np.clip(last.x0, -1, 1) + 1) * 127.5).astype(np.uint8)
    assert (result.images == expected.transpose(0, 2, 3, 1)).all()
    assert not generator.run(2, seed=0, steps=2, deadline_ms=60_000).stopped


def test_a_deadline_that_is_too_short_leaves_one_step(toy: Generator) -> None:
    for deadline in (1e-6, 0.001):
        result = toy.run(1, seed=0, deadline_ms=deadline)
        assert result.stopped
        assert result.images.shape == (1, 28, 28, 1)
    assert [step.index for step in toy.stream(1, seed=0, deadline_ms=1e-6)] == [0]
    assert toy.run(40, seed=0, batch=16, deadline_ms=1e-6).images.shape[0] == 16
    one_step = toy.run(40, seed=0, batch=16, steps=1, deadline_ms=1e-6)  # whole, but not all
    assert one_step.stopped
    assert len(one_step.images) == 16


@pytest.mark.parametrize(
    "use",
    [
        lambda g, **k: g.inpaint(IMAGES, HOLE, **k),
        lambda g, **k: g.vary(IMAGES, 0.5, **k),
        lambda g, **k: g.invert(IMAGES, **k),
        lambda g, **k: g.interpolate(IMAGES[0], IMAGES[1], 4, **k),
    ],
    ids=["inpaint", "vary", "invert", "interpolate"],
)
def test_every_call_keeps_a_deadline(use: Any) -> None:
    engine = Slow()
    generator = Generator(Bundle.open(), engine, "fp32")
    assert use(generator, deadline_ms=1).dtype in (np.uint8, np.float32)
    assert len(engine.calls) <= 2  # inversion and sampling: one step each


@pytest.mark.parametrize("task", [None, *TASKS.values()], ids=["sample", *TASKS])
@pytest.mark.parametrize("end", ["stop", "deadline", "error", "interrupt", "left"])
def test_after_a_call_that_ended_early_the_next_is_as_a_fresh_one(task: Any, end: str) -> None:
    class Fails(ToyEngine):
        broken = False

        def __call__(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            if self.broken and len(self.calls) == 2:
                raise EngineError("it failed")
            return super().__call__(arrays)

    def interrupt(step: Step) -> None:
        raise KeyboardInterrupt

    arguments: dict[str, Any] = {"task": task, "seed": 1, "steps": 5, "label": 3, "guidance": 2.0}
    engine = Fails()
    generator = Generator(Bundle.open(), engine, "fp32")
    if end == "stop":
        assert generator.run(callback=lambda step: True, **arguments).stopped
    elif end == "deadline":
        assert generator.run(deadline_ms=1e-6, **arguments).stopped
    elif end == "left":
        next(iter(generator.stream(**arguments)))
    else:
        engine.broken = end == "error"
        with pytest.raises((EngineError, KeyboardInterrupt)):
            generator.run(callback=interrupt if end == "interrupt" else None, **arguments)
        engine.broken = False
    fresh = Generator(Bundle.open(), ToyEngine(), "fp32")
    assert (generator.sample(**arguments) == fresh.sample(**arguments)).all()


# What does not fit


SMALL = np.zeros((14, 14), np.uint8)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda g: g.inpaint(SMALL, HOLE), r"image must be \(28, 28, 1\) .*got \(14, 14\): crop"),
        (lambda g: g.inpaint(IMAGES, HOLE[:20]), "the mask is 20 x 28, but .* 28 x 28"),
        (lambda g: g.inpaint(IMAGES, HOLE * 7), "0 and 255 .* got int64 with .*0, 7.*threshold"),
        (lambda g: g.inpaint(IMAGES, HOLE & False), "the mask is empty, nothing would be painted"),
        (lambda g: g.inpaint(IMAGES, HOLE | True), "the mask is full, no pixel would be known"),
        (lambda g: g.inpaint(IMAGES, [HOLE, HOLE]), "got 3 images and 2 masks"),
        (lambda g: g.inpaint(IMAGES, HOLE, n=2), "got 3 images or states in task for n = 2"),
        (lambda g: g.inpaint(IMAGES.astype(int), HOLE), "got int64: give np.asarray"),
        (lambda g: g.inpaint(IMAGES * 1.0, HOLE), r"look like \[0, 255\]: give uint8"),
        (lambda g: g.inpaint(IMAGES / 50 - 2, HOLE), r"got float64 in \[-2, 3.1\]: scale it"),
        (lambda g: g.inpaint(IMAGES, HOLE, sigma_y=-1), "sigma_y must be a number >= 0; got -1"),
        (
            lambda g: g.inpaint(IMAGES, HOLE, sigma_y=0.1, sampler="ddim"),
            r"sigma_y 0.1 needs a sampler that draws noise, and ddim\(.* does not",
        ),
        (lambda g: g.upscale(SMALL, 3), "factor 3 does not divide 28 x 28"),
        (lambda g: g.upscale(SMALL, 1), "factor must be a whole number >= 2; got 1"),
        (lambda g: g.upscale(SMALL, 2.0), "factor must be a whole number >= 2; got 2.0"),
        (lambda g: g.upscale(SMALL, 4), r"image must be \(7, 7, 1\)"),
        (lambda g: g.colorize(IMAGES), "by a model of RGB images only; this one makes 1 channel"),
        (lambda g: g.restore(SMALL, "pool"), "operator must be a Mask, .* got 'pool'"),
        (lambda g: g.vary(IMAGES, 1.5), "strength must be in 0..1; got 1.5"),
        (lambda g: g.vary(IMAGES, float("nan")), "strength must be in 0..1; got nan"),
        (lambda g: g.vary(IMAGES * np.nan), r"got float64 in \[nan, nan\]"),
        (lambda g: g.sample(task="inpaint"), "task must be a Restore or a Vary; got 'inpaint'"),
        (lambda g: g.sample(latents=IMAGES / 255.0), r"latents must be \(1, 28, 28\) .* use inv"),
        (lambda g: g.sample(latents=IMAGES.reshape(3, 1, 28, 28)), "finite floats.*got uint8"),
        (lambda g: g.sample(2, latents=np.zeros((3, 1, 28, 28))), "in latents for n = 2"),
        (lambda g: g.sample(1, latents=np.full((1, 28, 28), np.inf)), "latents must be finite"),
        (lambda g: g.invert(IMAGES, batch=0), "batch must be a whole number >= 1; got 0"),
        (lambda g: g.invert(IMAGES, steps=0), "steps must be a whole number >= 1; got 0"),
        (lambda g: g.sample(task=Restore), "task must be a Restore or a Vary; got <class"),
        (lambda g: g.sample(callback=3), "callback must be a function of a Step; got 3"),
        (lambda g: g.sample(latents=np.full((1, 28, 28), 1e300)), "0 of 784 are finite in float32"),
        (lambda g: g.inpaint([IMAGES[0], IMAGES[0, :9]], HOLE), "image must be an array of number"),
        (lambda g: g.interpolate(*IMAGES[:2], label=[]), "got 0 labels for n = 8"),
        (lambda g: g.interpolate(*IMAGES[:2], deadline_ms=-5), "milliseconds above 0; got -5"),
        (lambda g: g.interpolate(*IMAGES[:2], sampler="ddpm", steps=200), "draws noise, so that"),
        (lambda g: g.interpolate(*IMAGES[:2], dtype="int8"), "dtype must be 'uint8' or 'float32'"),
        (lambda g: g.interpolate(*IMAGES[:2], task=1), "interpolate takes no task"),
        (lambda g: g.interpolate(*IMAGES[:2], latents=1), "interpolate takes no latents"),
        (lambda g: g.interpolate(IMAGES, IMAGES[0]), "a must be one image; got 3"),
        (lambda g: g.interpolate(IMAGES[0], IMAGES[0], 1), "n must be a whole number >= 2; got 1"),
        (lambda g: g.sample(deadline_ms=0), "deadline_ms must be a number of milliseconds above"),
        (lambda g: g.sample(deadline_ms="5"), "deadline_ms must be a number; got '5'"),
        (lambda g: g.sample(label=1, guidance=[1, 2]), "got 2 scales of guidance for n = 1"),
        (lambda g: g.sample(label=1, guidance=1e9), "guidance must be a number in"),
        (lambda g: g.sample(label=1, guidance_interval=(1, 2)), "guidance_interval needs guidance"),
        (
            lambda g: g.sample(label=1, guidance=2.0, guidance_interval=(9, 2)),
            r"must be \(low, high\), low <= high; got \(9, 2\)",
        ),
        (
            lambda g: g.sample(label=1, guidance=2.0, guidance_interval=5),
            "must be two timesteps",
        ),
        (lambda g: g.sample(start=500), "'start'"),
        (lambda g: g.sample(travel_repeat=0), "travel_repeat must be a whole number >= 1"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_bad_input(toy: Generator, use: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        use(toy)


def test_floats_that_look_like_0_to_1_are_told(toy: Generator) -> None:
    with pytest.warns(ImageWarning, match=r"float64 in \[0, 1\], which looks like \[0, 1\]"):
        toy.inpaint(IMAGES / 255.0, HOLE, steps=1)


def test_labels_where_there_are_none() -> None:
    with pytest.raises(ConfigError, match="trained without labels; leave label out"):
        rgb().vary(np.zeros((8, 8, 3), np.uint8), label=1)
