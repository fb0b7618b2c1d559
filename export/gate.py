"""The parity gate: an exported network must answer, and sample, as torch does.

Three comparisons, each a largest absolute difference: the network's answers at timesteps spread
over 1..T, a short DDIM chain, and the end of Algorithm 2 (all of it with `full`). Chains use the
same noise on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ddpm_edge import noise, samplers
from ddpm_edge.arrays import Array
from ddpm_edge.errors import ParityError
from ddpm_edge.plan import Plan
from ddpm_edge.sampling import Network, sample_states

ANSWER_TOLERANCE = 1e-4  # float32 rounding through some 50 layers, values of about 1
IMAGE_TOLERANCE = 1e-3  # a quarter of one of 256 grey levels, values in [-1, 1]
SEED = 20_200_619  # of all draws here
TIMESTEPS = 8
SAMPLES = 4
BATCHES = (1, 5)

Report = Callable[[str, float, float], None]


def check(
    network: Network, reference: Network, *, full: bool = False, report: Report | None = None
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Hold an exported network against the reference.

    Args:
        network: what was exported, on an engine.
        reference: torch.
        full: run all T steps of Algorithm 2 instead of the last 50.
        report: called with (what, largest difference, tolerance) for each comparison.

    Returns:
        The figures for the manifest, and the arrays of reference.npz: torch's answers (`answer`
        for draw i of `seed` at `t[i]` with `label[i]`) and the `images` of the DDIM chain.

    Raises:
        ParityError: a difference is outside its tolerance, or not finite.
    """
    schedule, classes = network.manifest.schedule, len(network.manifest.class_names)
    figures: dict[str, Any] = {}

    def compare(what: str, ours: Array, torchs: Array, tolerance: float) -> None:
        difference = float(np.max(np.abs(ours - torchs)))
        figures[what] = {"max_abs_error": difference, "tolerance": tolerance}
        if report is not None:
            report(what, difference, tolerance)
        if not difference <= tolerance:  # NaN fails too
            raise ParityError(
                f"{what}: the exported network differs from torch by {difference:.3g}, tolerance "
                f"{tolerance:.0e}; nothing was written"
            )

    # Answers
    t = np.unique(np.linspace(1, schedule.T, TIMESTEPS).round().astype(np.int64))
    shape = network.manifest.sample_shape
    x = noise.Draws(SEED, 0, (len(t), *shape)).rows(noise.Stream.START, range(1))[0]
    labels = np.arange(len(t)) % (classes + 1) if classes else None  # the null label among them
    torchs = _answers(reference, x, t, labels, 1)
    for batch in BATCHES:
        ours = _answers(network, x, t, labels, batch)
        compare(f"answers at batch {batch}", ours, torchs, ANSWER_TOLERANCE)

    # Chains
    some = np.arange(SAMPLES) % (classes + 1) if classes else None

    def both(what: str, plan: Plan, start: Array | None = None) -> Array:
        def final(which: Network) -> Array:
            *_, last = sample_states(which, plan, SEED, range(SAMPLES), some, start=start)
            return last.x

        torchs = final(reference)
        compare(what, final(network), torchs, IMAGE_TOLERANCE)
        return torchs

    plan = samplers.ddim(schedule, steps=min(20, schedule.T), clip=1.0)
    images = both(f"{len(plan)}-step DDIM", plan)
    algorithm_2 = samplers.ddpm(schedule, clip=1.0)
    if full:
        both(f"Algorithm 2, all {schedule.T} steps", algorithm_2)
    else:
        tail = algorithm_2.tail(min(50, schedule.T))
        eps = noise.Draws(SEED, SAMPLES, images.shape).rows(noise.Stream.START, range(1))[0]
        start = schedule.q_sample(images, int(tail.t[0]), eps).astype(np.float32)
        both(f"Algorithm 2, last {len(tail)} steps", tail, start)

    arrays: dict[str, Array] = {
        "seed": np.array(SEED),
        "t": t,
        "answer": torchs,
        "images": images,
        "steps": np.array(len(plan)),
    }
    if labels is not None and some is not None:
        arrays |= {"label": labels, "images_label": some}
    return figures, arrays


def _answers(network: Network, x: Array, t: Array, labels: Array | None, batch: int) -> Array:
    """The network's answers to (x[i], t[i], labels[i]), each computed in a batch of this size."""
    out = []
    for i in range(len(t)):
        xs = np.repeat(x[i : i + 1], batch, axis=0)
        xs[: batch - 1] = x[np.arange(i + 1, i + batch) % len(x)]  # others beside it
        label = None if labels is None else np.full(batch, labels[i])
        out.append(network(xs, int(t[i]), label)[-1])
    return np.stack(out)
