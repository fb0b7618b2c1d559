"""How good a bundle is: its samples and its likelihoods against real images, and how sure that is.

Of n samples, their labels in turn where there are labels, against real images that the model was
not trained with. The same figures of n training images are the floor, those of the real images
under noise the ceiling: a figure means something between the two.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ddpm_edge import checks, noise
from ddpm_edge._version import __version__
from ddpm_edge.arrays import Array, Float64, Int64, UInt8
from ddpm_edge.data import Dataset, mixed
from ddpm_edge.errors import ConfigError
from ddpm_edge.features import FeatureNetwork
from ddpm_edge.generator import Generator
from ddpm_edge.images import to_images
from ddpm_edge.likelihood import Bound, check_timesteps, scipy_special
from ddpm_edge.manifest import Manifest
from ddpm_edge.metrics import (
    BLOCKS,
    Difference,
    Estimate,
    Moments,
    class_kl,
    covered,
    difference,
    frechet_distance,
    jackknife,
    kernel_estimate,
    mean_kernel,
    nearest,
)

CEILING_SIGNAL = 0.7  # of the noised images, whose noise has sqrt(1 - signal^2)
CHUNK = 64  # samples between two reports of progress
SHARES = {"samples": 0.6, "likelihood": 0.3, "figures": 0.1}  # of the time, about

FRECHET = "Frechet distance"

Progress = Callable[[float, str], object]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was found of a bundle.

    Attributes:
        settings: what was evaluated: model, digest, runtime, variant, plan, data, n, seed, ...
        figures: name -> figure of the samples, or of the images' likelihood.
        floor: the same of training images.
        ceiling: the same of noised images.
        samples: uint8 (n, H, W, C).
        alike: indices of the samples that are nearest to a training image, and of those.
        nearest_training: the images that these samples are nearest to; uint8.
        x0_mse: mean square error of x_0 predicted at t = 1..T; NaN where unknown.
        seconds: it took.
    """

    settings: dict[str, Any]
    figures: dict[str, Estimate]
    floor: dict[str, Estimate]
    ceiling: dict[str, Estimate]
    samples: UInt8
    alike: Int64
    nearest_training: UInt8
    x0_mse: Float64
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the images."""
        return {
            "settings": self.settings,
            "seconds": self.seconds,
            **{
                part: {name: _figure(e) for name, e in getattr(self, part).items()}
                for part in ("figures", "floor", "ceiling")
            },
        }


def evaluate(
    generator: Generator,
    test: Dataset,
    train: Dataset | None = None,
    *,
    n: int = 1_000,
    seed: int = 0,
    features: FeatureNetwork | None = None,
    likelihood_images: int = 100,
    timesteps: int | None = 50,
    guidance: float | None = None,
    beside: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **plan: Any,
) -> Evaluation:
    """Evaluate a bundle on the runtime that it was loaded on.

    Args:
        generator: the bundle.
        test: images that the model was not trained with.
        train: those that it was trained with; None = no floor, and no search for copies.
        n: samples, and images of each kind, >= 10; with features more than they have dimensions.
        seed: of the samples and of the likelihood's draws.
        features: sees the images; None = only what needs none.
        likelihood_images: how many images of each kind to find bits/dim of, at most n, >= 10; 0 =
            none. With their labels, where the model has the same classes.
        timesteps: of each of them, see `Generator.bound`; T or more are all.
        guidance: see `Generator.run`.
        beside: what this is to be compared with (see `compare`): refused before anything is done if
            it cannot be.
        progress: called now and then.
        **plan: sampler, steps and its options; see `Generator.plan`.

    Raises:
        ConfigError: an argument that cannot work, images of another shape, or too few.
        DdpmEdgeError: as `Generator.run` and `Generator.bound` raise them.
    """
    started = time.perf_counter()
    n, seed = checks.whole("n", n, least=BLOCKS), noise.check_seed(seed)
    manifest = generator.bundle.manifest
    wanted = min(n, checks.whole("likelihood_images", likelihood_images, least=0))
    if timesteps is not None and checks.whole("timesteps", timesteps) >= manifest.schedule.T:
        timesteps = None
    if 0 < wanted < BLOCKS:
        raise ConfigError(
            f"likelihood_images must be 0, or {BLOCKS} or more; got {likelihood_images}"
        )
    if wanted:  # what cannot work is refused before anything is sampled
        scipy_special()
        check_timesteps(timesteps, manifest.schedule.T)
    rest = mixed_images(test, generator, "test", n)
    real = rest.subset(np.arange(n))
    known = None
    if train is not None:
        known = _in_turn(mixed_images(train, generator, "training", n), generator.class_names, n)
    settings = {
        "ddpm_edge": __version__,
        "model": manifest.name,
        "digest": generator.bundle.digest,
        "variant": generator.variant,
        "runtime": generator.runtime,
        "plan": generator.plan(**plan).name,
        "guidance": guidance,
        "n": n,
        "seed": seed,
        "data": test.name,
        "images": test.sha256(),
        "training images": None if train is None else train.sha256(),
        "features": None if features is None else features.digest,
        "likelihood images": wanted,
        "timesteps": timesteps,
    }
    if beside is not None:
        check_comparable(beside["settings"], settings)
    labels = labels_in_turn(manifest, n)
    if wanted:
        _labels_of(real, generator)
    judge = None if features is None else Judge(features, pictures(rest), n)
    noised = Dataset("noised", _noised(real.images, seed), real.labels, real.class_names)
    kinds = {"floor": known, "ceiling": noised}
    others = {kind: data for kind, data in kinds.items() if data is not None}

    say: Progress = progress or _silent
    samples = draw_samples(
        generator, labels, n, seed, guidance, plan,
        lambda share, note: say(SHARES["samples"] * share, note),
    )  # fmt: skip
    found: dict[str, dict[str, Estimate]] = {"figures": {}, "floor": {}, "ceiling": {}}
    x0_mse = np.empty(0)
    if wanted:
        asked = {"figures": real, **others}
        bounds = _bounds(generator, asked, wanted, timesteps, seed, say)
        for kind, bound in bounds.items():
            found[kind]["bits/dim"] = jackknife(np.mean, bound.bits_per_dim)
        x0_mse = _x0_mse(bounds["figures"], manifest.schedule.T)
    say(1.0 - SHARES["figures"], "figures")
    if judge is not None:
        found["figures"] |= judge.figures(samples, labels)
        for kind, data in others.items():
            found[kind] |= judge.figures(pictures(data), data.labels)
    alike, copied = np.empty(0, np.int64), samples[:0]
    if train is not None:
        figure, alike, copied = _copies(samples, pictures(real), train)
        found["figures"]["nearest training image"] = figure
    return Evaluation(
        settings=settings,
        figures=found["figures"],
        floor=found["floor"],
        ceiling=found["ceiling"],
        samples=samples,
        alike=alike,
        nearest_training=copied,
        x0_mse=x0_mse,
        seconds=time.perf_counter() - started,
    )


class Compared(NamedTuple):
    """A figure of two evaluations, and how far b is above a."""

    name: str
    a: Estimate
    b: Estimate
    difference: Difference


def check_comparable(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raise ConfigError unless two evaluations with these settings can be compared."""
    for name in ("n", "images", "training images", "features", "likelihood images", "timesteps"):
        if one.get(name) != other.get(name):
            raise ConfigError(
                f"these evaluations cannot be compared: {name} is {one.get(name)} in one and "
                f"{other.get(name)} in the other; evaluate both alike"
            )


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Compared]:
    """What two evaluations have in common (see `Evaluation.to_dict`).

    Block by block, where images belong together: samples of one seed, made from the same noise,
    and the likelihood of the same images.

    Raises:
        ConfigError: they are of other images, of another number of them, or seen by other features.
    """
    check_comparable(a["settings"], b["settings"])
    same_noise = a["settings"]["seed"] == b["settings"]["seed"]
    rows = []
    for name in a["figures"]:
        if name in b["figures"]:
            x, y = _estimate(a["figures"][name]), _estimate(b["figures"][name])
            paired = same_noise or name == "bits/dim"
            rows.append(Compared(name, x, y, difference(x, y, paired)))
    return rows


class Judge:
    """Figures of n images by what a feature network sees in them, against the real ones.

    Precision and recall are against n real images, all else against all of them.
    """

    def __init__(self, network: FeatureNetwork, real: UInt8, n: int) -> None:
        self._network = network
        seen = network(real)
        self._real: Float64 = seen.features.astype(np.float64)
        self._classes = None if seen.logits is None else seen.logits.argmax(axis=1)
        self._some: Float64 = self._real[:n]
        dimensions = self._real.shape[1]
        # Without one of the blocks there must still be more images than dimensions.
        least = -(-(dimensions + 1) * BLOCKS // (BLOCKS - 1))
        if n < least:
            raise ConfigError(
                f"{n} images are too few for the covariance of {dimensions} features; give n >= "
                f"{least}"
            )
        self._moments = Moments.of(self._real)

    @functools.cached_property
    def _within(self) -> float:
        return mean_kernel(self._real)

    def frechet(self, x: Float64) -> Estimate:
        """The Frechet distance of features (n, D)."""
        return jackknife(lambda x: frechet_distance(self._moments, Moments.of(x)), x)

    def features(self, images: UInt8) -> Float64:
        """Of images uint8 (n, H, W, C); (n, D)."""
        return self._network(images).features.astype(np.float64)

    def figures(self, images: UInt8, labels: Array | None) -> dict[str, Estimate]:
        """Of images uint8 (n, H, W, C) and the labels that they were asked for, if any."""
        seen = self._network(images)
        x = seen.features.astype(np.float64)
        found = {
            FRECHET: self.frechet(x),
            "kernel distance": kernel_estimate(x, self._real, self._within),
            "precision": jackknife(np.mean, covered(self._some, x)),
            "recall": jackknife(lambda x: float(covered(x, self._some).mean()), x),
        }
        if seen.logits is not None and self._classes is not None:
            count = seen.logits.shape[1]
            real = np.bincount(self._classes, minlength=count)
            classes = seen.logits.argmax(axis=1)
            found["class KL"] = jackknife(
                lambda c: class_kl(np.bincount(c, minlength=count), real), classes
            )
            if labels is not None and labels.max() < count:
                found["recognised"] = jackknife(np.mean, (classes == labels).astype(np.float64))
        return found


def _silent(_: float, __: str) -> None:
    pass


def draw_samples(
    generator: Generator,
    labels: Int64 | None,
    n: int,
    seed: int,
    guidance: float | None,
    plan: Mapping[str, Any],
    say: Progress,
) -> UInt8:
    """Samples 0..n - 1 of a seed, uint8 (n, H, W, C), with labels (n,) where there are any."""
    parts = []
    for first in range(0, n, CHUNK):
        part = range(first, min(first + CHUNK, n))
        label = None if labels is None else labels[part.start : part.stop].tolist()
        parts.append(
            generator.sample(
                len(part), seed=seed, first=first, label=label, guidance=guidance, **plan
            )
        )
        say(part.stop / n, f"{part.stop} of {n} samples")
    return np.concatenate(parts)


def _bounds(
    generator: Generator,
    kinds: Mapping[str, Dataset],
    n: int,
    timesteps: int | None,
    seed: int,
    say: Progress,
) -> dict[str, Bound]:
    """The bounds of the first n images of each kind."""
    bounds: dict[str, Bound] = {}
    for kind, data in kinds.items():
        done = len(bounds)

        def said(fraction: float, done: int = done) -> None:
            part = SHARES["likelihood"] * (done + fraction) / len(kinds)
            say(SHARES["samples"] + part, f"likelihood of {n} images")

        label = _labels_of(data, generator, n)
        bounds[kind] = generator.bound(
            pictures(data)[:n], timesteps, seed, label=label, progress=said
        )
    return bounds


def mixed_images(data: Dataset, generator: Generator, name: str, n: int) -> Dataset:
    """The images, n or more, in no order: or a block of them would be a class."""
    if data.sample_shape != generator.sample_shape:
        raise ConfigError(
            f"the {name} images are (C, H, W) = {data.sample_shape}, the model's "
            f"{generator.sample_shape}; bring them to that size, or give other data"
        )
    if len(data.images) < n:
        raise ConfigError(
            f"{n} {name} images are needed, {data.name} has {len(data.images)}; give a smaller n"
        )
    return mixed(data)


def _in_turn(data: Dataset, class_names: tuple[str, ...], n: int) -> Dataset:
    """N of the images: with labels in turn, as the samples', where the data have these classes."""
    if data.labels is None or data.class_names != class_names:
        return data.subset(np.arange(n))
    rounds = np.empty(len(data.labels), np.int64)  # the i-th image of its class is in the i-th
    for label in range(len(class_names)):
        of_class = data.labels == label
        rounds[of_class] = np.arange(np.count_nonzero(of_class))
    return data.subset(np.lexsort([data.labels, rounds])[:n])


def _labels_of(data: Dataset, generator: Generator, n: int | None = None) -> list[int] | None:
    """The labels of the first n images, where the model has the same classes; None = no label."""
    manifest = generator.bundle.manifest
    if data.labels is not None and data.class_names == manifest.class_names:
        labels: list[int] = data.labels[:n].tolist()
        return labels
    if manifest.class_names and manifest.null_label is None:
        raise ConfigError(
            f"the model {manifest.name!r} knows no images without a label, and {data.name} has not "
            f"its labels, {', '.join(manifest.class_names)}; give such data, or likelihood_images 0"
        )
    return None


def labels_in_turn(manifest: Manifest, n: int) -> Int64 | None:
    """The labels of n samples, int64 (n,), where the model has labels."""
    names = manifest.class_names
    return np.arange(n) % len(names) if names else None


def pictures(data: Dataset) -> UInt8:
    """Its images (n, H, W, C)."""
    images: UInt8 = data.images.transpose(0, 2, 3, 1)
    return images


def _noised(images: UInt8, seed: int) -> UInt8:
    """Images (n, C, H, W) under noise."""
    eps = noise.Draws(seed, 0, images.shape)(noise.Stream.LIKELIHOOD, 0)
    x = CEILING_SIGNAL * (images / 127.5 - 1.0) + math.sqrt(1 - CEILING_SIGNAL**2) * eps
    noised: UInt8 = to_images(x).transpose(0, 3, 1, 2)
    return noised


def _copies(samples: UInt8, real: UInt8, train: Dataset) -> tuple[Estimate, Int64, UInt8]:
    """How near samples are to training images, as a share of how near test images are.

    Far below 1 they are copies. With the eight samples that are nearest, and to which images.
    """
    known = pictures(train)
    flat = known.reshape(len(known), -1)
    ours, index = nearest(samples.reshape(len(samples), -1), flat)
    theirs, _ = nearest(real.reshape(len(real), -1), flat)
    if (theirs == 0).mean() > 0.5:
        raise ConfigError(
            f"{np.count_nonzero(theirs == 0)} of {len(real)} test images are among the training "
            "images; give others"
        )
    ratio = jackknife(lambda a, b: float(a.mean() / b.mean()), ours, theirs)
    alike = np.argsort(ours)[:8]
    return ratio, alike, known[index[alike]]


def _x0_mse(bound: Bound, T: int) -> Float64:
    """The mean square error of x_0 at t = 1..T, of all images; NaN where none was looked at."""
    at = bound.t.ravel() - 1
    with np.errstate(invalid="ignore"):
        mean: Float64 = np.bincount(at, bound.x0_mse.ravel(), T) / np.bincount(at, minlength=T)
    return mean


def _figure(estimate: Estimate) -> dict[str, Any]:
    return {
        "value": estimate.value,
        "standard_error": estimate.standard_error,
        "replicates": estimate.replicates.tolist(),
    }


def _estimate(figure: Mapping[str, Any]) -> Estimate:
    return Estimate(float(figure["value"]), np.array(figure["replicates"], np.float64))


def read_report(text: str | bytes) -> dict[str, Any]:
    """The JSON of an evaluation.

    Raises:
        ConfigError: it is none.
    """
    try:
        found: dict[str, Any] = json.loads(text)
        for figure in found["figures"].values():
            _estimate(figure)
        found["settings"]["images"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"this is no report of `ddpm-edge evaluate` ({type(error).__name__}: {error})"
        ) from error
    return found
