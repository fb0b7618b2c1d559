"""The parity gate: an exported network must answer, and sample, as torch does.

Three comparisons, each a largest absolute difference: the network's answers at timesteps spread
over 1..T, a short DDIM chain, and the end of Algorithm 2 (all of it with `full`). Chains use the
same noise on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ddpm_edge import noise, samplers
from ddpm_edge.errors import ParityError
from ddpm_edge.reference import IMAGE_TOLERANCE, Comparison, Reference, compare
from ddpm_edge.sampling import Network

TAIL = 50  # steps of Algorithm 2 that the quick gate runs

Report = Callable[[Comparison], None]


def check(
    network: Network, torchs: Network, *, full: bool = False, report: Report | None = None
) -> tuple[list[Comparison], Reference]:
    """Hold an exported network against torch.

    Args:
        network: what was exported, on an engine.
        torchs: torch.
        full: run all T steps of Algorithm 2 instead of the last 50.
        report: called with each comparison.

    Returns:
        The comparisons, for the manifest, and torch's answers, for reference.npz.

    Raises:
        ParityError: a difference is outside its tolerance, or not finite.
    """
    reference = Reference.measure(torchs)
    comparisons = []
    for comparison in _comparisons(network, torchs, reference, full):
        comparisons.append(comparison)
        if report is not None:
            report(comparison)
        if not comparison.passed:
            raise ParityError(
                f"{comparison.what}: the exported network differs from torch by "
                f"{comparison.max_abs_error:.3g}, tolerance {comparison.tolerance:.0e}; nothing "
                "was written"
            )
    return comparisons, reference


def _comparisons(
    network: Network, torchs: Network, reference: Reference, full: bool
) -> Iterator[Comparison]:
    yield from reference.compare(network)
    schedule = network.manifest.schedule
    plan, start = samplers.ddpm(schedule, clip=1.0), None
    what = f"Algorithm 2, all {schedule.T} steps"
    if not full:
        plan = plan.tail(min(TAIL, schedule.T))
        what = f"Algorithm 2, last {len(plan)} steps"
        draws = noise.Draws(reference.seed, len(reference.images), reference.images.shape)
        eps = draws.prior()
        start = schedule.q_sample(reference.images, int(plan.t[0]), eps).astype(np.float32)
    ours, theirs = (reference.images_of(which, plan, start) for which in (network, torchs))
    yield compare(what, ours, theirs, IMAGE_TOLERANCE)
