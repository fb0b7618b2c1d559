"""How good fewer steps are: what a bundle must know before a time budget can be spent well."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddpm_edge import checks, noise
from ddpm_edge._version import __version__
from ddpm_edge.bundle import Bundle, write_bundle
from ddpm_edge.data import Dataset
from ddpm_edge.errors import ConfigError, RuntimeUnavailableError
from ddpm_edge.evaluate import (
    FRECHET,
    Judge,
    Progress,
    draw_samples,
    labels_in_turn,
    mixed_images,
    pictures,
)
from ddpm_edge.features import FeatureNetwork
from ddpm_edge.generator import Generator
from ddpm_edge.latency import Latency
from ddpm_edge.manifest import Manifest
from ddpm_edge.metrics import BLOCKS
from ddpm_edge.samplers import override
from ddpm_edge.tuned import MAX_PLANS, Tuned, TunedPlan

STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50)


def grid(
    manifest: Manifest, samplers: Sequence[str] = (), steps: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """Plans to measure: every sampler with every number of steps.

    Args:
        manifest: of the bundle. Its default plan's sampler keeps the options that it has there,
            others have their own defaults.
        samplers: their names; empty = that of the default plan.
        steps: 1..T each; empty = STEPS, as far as there are timesteps.

    Raises:
        ConfigError: an unknown sampler, or steps that it cannot do.
    """
    wanted = [checks.whole("steps", s) for s in steps] or [
        s for s in STEPS if s <= manifest.schedule.T
    ]
    own = manifest.plan.get("sampler")
    named = [{} if name == own else {"sampler": name} for name in samplers] or [{}]
    plans = [override(manifest.plan, {**name, "steps": s}) for name in named for s in wanted]
    for plan in plans:
        manifest.make_plan(**plan)  # what cannot work is refused before anything is sampled
    return plans


def tune(
    generator: Generator,
    test: Dataset,
    features: FeatureNetwork,
    plans: Sequence[Mapping[str, Any]] = (),
    *,
    n: int = 1_000,
    seed: int = 0,
    guidance: float | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Measure how good plans are: the Frechet distance of n samples of each to test images.

    Args:
        generator: the bundle.
        test: images that it was not trained with, n or more.
        features: sees the images.
        plans: arguments of each (see `Generator.plan`), at most 100; empty = those of `grid`.
        n: samples of each plan, their labels in turn; more than there are features.
        seed: of the samples, the same for every plan.
        guidance: see `Generator.run`.
        progress: called now and then.

    Raises:
        ConfigError: an argument that cannot work, images of another shape, or too few.
        DdpmEdgeError: as `Generator.run` raises them.
    """
    n, seed = checks.whole("n", n, least=BLOCKS), noise.check_seed(seed)
    manifest = generator.bundle.manifest
    plans = [_in_json(plan) for plan in plans] or grid(manifest)
    if len(plans) > MAX_PLANS:
        raise ConfigError(f"plans must be at most {MAX_PLANS}; got {len(plans)}")
    evaluations = [manifest.make_plan(**plan).evaluations for plan in plans]
    judge = Judge(features, pictures(mixed_images(test, generator, "test", n)), n)
    labels = labels_in_turn(manifest, n)
    found: list[TunedPlan] = []
    for plan, count in zip(plans, evaluations, strict=True):

        def say(share: float, note: str, count: int = count) -> None:
            if progress is not None:
                done = sum(evaluations[: len(found)]) + share * count
                progress(done / sum(evaluations), f"{count} evaluations, {note}")

        samples = draw_samples(generator, labels, n, seed, guidance, plan, say)
        figure = judge.frechet(judge.features(samples))
        found.append(TunedPlan(plan, count, figure.value, figure.standard_error))
    settings = {
        "ddpm_edge": __version__,
        "variant": generator.variant,
        "guidance": guidance,
        "n": n,
        "seed": seed,
        "data": test.name,
        "images": test.sha256(),
        "features": features.digest,
    }
    return Tuned(FRECHET, settings, tuple(found))


def _in_json(plan: Any) -> dict[str, Any]:
    """A plan's arguments as a bundle gives them back."""
    given = checks.mapping("a plan", plan)
    try:
        return dict(json.loads(json.dumps(dict(given), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"a plan must be of Python's numbers, texts and lists, to be kept in a bundle; got "
            f"{checks.shown(plan)} ({error})"
        ) from error


def write_tuned(bundle: Bundle, tuned: Tuned, path: str | Path) -> Bundle:
    """A bundle with these figures, at `path`; it may be the one that they are of.

    Raises:
        BundleError: a file of the bundle was changed; `path` is something else than a bundle.
        OSError: it cannot be written.
    """
    files = {name: bundle.read(name) for name in bundle.files}
    return write_bundle(path, replace(bundle.manifest, tuned=tuned), files)


def front_png(tuned: Tuned, latency: Latency, title: str) -> bytes:
    """A PNG of the plans' quality against the time that an image takes, with the Pareto front.

    Raises:
        RuntimeUnavailableError: matplotlib is missing.
    """
    figure_of = plotting()
    figure = figure_of(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    ms = [latency.of(plan.evaluations) for plan in tuned.plans]
    values = [plan.value for plan in tuned.plans]
    errors = [plan.standard_error for plan in tuned.plans]
    axis.errorbar(ms, values, errors, fmt=".", color="0.6", capsize=2)
    front = tuned.front()
    times, best = [latency.of(p.evaluations) for p in front], [p.value for p in front]
    axis.plot(times, best, ".-", color="C0", drawstyle="steps-post", label="the best that fits")
    for plan, time in zip(front, times, strict=True):
        axis.annotate(f"{plan.evaluations}", (time, plan.value), (3, 4), textcoords="offset points")
    axis.set(xscale="log", yscale="log")
    axis.set_title(title, parse_math=False)
    axis.set_ylabel(f"{tuned.figure}, lower is better", parse_math=False)
    axis.set_xlabel("milliseconds of one image on this device; numbers are evaluations")
    axis.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def plotting() -> Any:
    """Matplotlib's Figure, which needs no display.

    Raises:
        RuntimeUnavailableError: it is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"a picture needs matplotlib ({error}); pip install 'ddpm-edge[evaluate]'"
        ) from error
    return Figure
