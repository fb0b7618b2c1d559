"""The parity gates: an exported network must answer, and sample, as torch does.

Three comparisons, each a largest absolute difference: the network's answers at timesteps spread
over 1..T, a short DDIM chain, and the end of Algorithm 2 (all of it with `full`). Chains use the
same noise on both sides.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import numpy as np

from ddpm_edge import noise, samplers
from ddpm_edge.arrays import Array
from ddpm_edge.errors import ParityError
from ddpm_edge.features import FeatureNetwork
from ddpm_edge.images import to_images
from ddpm_edge.metrics import Moments, frechet_distance
from ddpm_edge.reference import IMAGE_TOLERANCE, INT8, RATIO, Comparison, Reference, compare
from ddpm_edge.sampling import Network, sample_states

TAIL = 50  # steps of Algorithm 2 that the quick gate runs
SAMPLES = 500  # for the Frechet distance, which takes more of them than there are features
CHUNK = 20
GRID = 8
TINY = 1e-12  # a network whose samples are all the same
FRECHET_TOLERANCE = 0.1  # a tenth of what other noise changes is not seen

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
                f"{comparison.error:.3g}, tolerance {comparison.tolerance:.0e}; nothing was written"
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


class VariantGate:
    """The gate of every variant but float32, against torch's answers and float32's samples.

    Half precision is computed for real: every tensor is rounded to it (see `precision.rounded`).

    Args:
        single: the float32 model, on an engine.
        reference: torch's answers.
        full: also compare half precision by the Frechet distance of its samples, as int8 always
            is; it takes three times `samples` images.
        samples: how many are compared, more than there are features: 96 for 28 x 28 gray.
    """

    def __init__(
        self, single: Network, reference: Reference, full: bool, samples: int = SAMPLES
    ) -> None:
        self.single, self.reference, self.full, self.samples = single, reference, full, samples

    def comparisons(self, network: Network, precision: str) -> Iterator[Comparison]:
        """Hold a variant, its rounding done, against torch and float32."""
        yield from self.reference.compare(network, precision)
        # Errors of int8 are large enough to shift samples; what they may be follows from no type.
        if self.full or precision == INT8:
            same, another = self._single_moments
            distance = frechet_distance(_moments(network, 0, self.samples), same)
            floor = frechet_distance(another, same)
            what = (
                f"Frechet distance of {self.samples} samples to fp32's, over that of another seed's"
            )
            yield Comparison(what, distance / max(floor, TINY), FRECHET_TOLERANCE, RATIO)

    @functools.cached_property
    def _single_moments(self) -> tuple[Moments, Moments]:
        zero, one = (_moments(self.single, seed, self.samples) for seed in (0, 1))
        return zero, one


def _moments(network: Network, seed: int, count: int) -> Moments:
    """Of the features of so many images of the default plan, labels in turn."""
    manifest = network.manifest
    plan, classes = manifest.make_plan(), len(manifest.class_names)
    with _features(manifest.sample_shape, count) as features_of:
        features = []
        for first in range(0, count, CHUNK):
            samples = range(first, min(first + CHUNK, count))
            labels = np.array(samples) % classes if classes else None
            *_, last = sample_states(network, plan, seed, samples, labels)
            features.append(features_of(last.x))
    return Moments.of(np.concatenate(features))


@contextlib.contextmanager
def _features(shape: tuple[int, int, int], count: int) -> Iterator[Callable[[Array], Array]]:
    """What is compared of states (N, C, H, W): the feature network's view, or small means.

    There is no feature network for every kind of image. A difference between two precisions of one
    network, from the same noise, shows in the means over a grid as well.
    """
    if shape == (1, 28, 28):
        with FeatureNetwork.fashion_mnist(device="cpu") as network:
            yield lambda x: network(to_images(x, "float32")).features
        return
    cells = max(1, min(GRID, math.isqrt(count // 2 // shape[0])))  # fewer features than samples
    rows, columns = (np.array_split(np.arange(n), min(n, cells)) for n in shape[1:])
    yield lambda x: np.concatenate(
        [x[:, :, r][:, :, :, c].mean(axis=(2, 3)) for r in rows for c in columns], axis=1
    )
