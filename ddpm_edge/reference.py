"""What torch computed, kept in a bundle's `reference.npz`, and how far an engine is from it.

The export's gate measures it on torch and holds ONNX Runtime against it; `ddpm-edge verify` does
the same on the device, without torch.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields

import numpy as np

from ddpm_edge import noise, samplers
from ddpm_edge.arrays import Array, Int64
from ddpm_edge.errors import BundleError
from ddpm_edge.manifest import Manifest
from ddpm_edge.plan import Plan
from ddpm_edge.sampling import Network, sample_states

MAX_ABS = "max_abs_error"
RELATIVE = "relative_error"  # root mean square of the difference over that of torch's
RATIO = "ratio"
ANSWER_TOLERANCE = 1e-4  # float32 rounding through some 50 layers, values of about 1
IMAGE_TOLERANCE = 1e-3  # a quarter of one of 256 grey levels, values in [-1, 1]
# Half precision rounds every layer's tensors by up to this share, independently: ten times as much
# is what some 50 layers may add up to (7 if all rounded by the most, at random).
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8}
HALF_TOLERANCE = 10
# What int8 does to answers depends on the network, so the gate measures it, and lets pass a tenth
# of them (a hundredth of their energy). Another runtime rounds at other places: each value within a
# step of the gate's, which was within half a step of float32's, so no more than as much again.
INT8 = "int8"
INT8_TOLERANCE = 0.1
INT8_ELSEWHERE = 2
SEED = 20_200_619  # of all draws here
TIMESTEPS = 8
SAMPLES = 4
STEPS = 20
BATCHES = (1, 5)
MOST = 64  # answers or images that a reference may hold


@dataclass(frozen=True)
class Comparison:
    """A difference, and how large it may be.

    Attributes:
        what: was compared.
        error: the difference.
        tolerance: how large it may be.
        measure: of the difference: MAX_ABS, RELATIVE, or a RATIO of what `what` says.
    """

    what: str
    error: float
    tolerance: float
    measure: str = MAX_ABS

    @property
    def passed(self) -> bool:
        """Whether it is within the tolerance; NaN is not."""
        return self.error <= self.tolerance

    @property
    def figures(self) -> str:
        """Both numbers, for people."""
        measure = self.measure.replace("_", " ")
        return f"{measure} {self.error:.1e} (tolerance {self.tolerance:.0e})"

    def __str__(self) -> str:
        return f"{self.what}: {self.figures}"

    def figure(self) -> dict[str, float]:
        """Both numbers, for a bundle."""
        return {self.measure: self.error, "tolerance": self.tolerance}

    @classmethod
    def of_figure(cls, what: str, figure: Mapping[str, float]) -> Comparison:
        """The inverse of `figure`."""
        ((measure, error),) = ((k, v) for k, v in figure.items() if k != "tolerance")
        return cls(what, error, figure["tolerance"], measure)


def compare(
    what: str, ours: Array, torchs: Array, tolerance: float, measure: str = MAX_ABS
) -> Comparison:
    """Compare two arrays of one shape."""
    difference = ours.astype(np.float64) - torchs
    if measure == MAX_ABS:
        return Comparison(what, float(np.max(np.abs(difference))), tolerance, measure)
    if not difference.any():
        return Comparison(what, 0.0, tolerance, measure)  # of answers that are all 0 as well
    with np.errstate(divide="ignore"):
        error = np.sqrt(np.mean(difference**2) / np.mean(torchs.astype(np.float64) ** 2))
    return Comparison(what, float(error), tolerance, measure)


@dataclass(frozen=True)
class Reference:
    """Answers of a network, and the images of a short DDIM chain.

    Attributes:
        seed: of all draws.
        t: timesteps spread over 1..T; int64 (K,).
        answer: the answer to the START draw of sample i at t[i]; float32 (K, C, H, W).
        images: what the chain ends with for samples 0, 1, ...; float32 (n, C, H, W).
        steps: of the chain, DDIM with x0 clipped to [-1, 1].
        label: of each answer, int64 (K,); None where the network takes none.
        images_label: of each image, int64 (n,), or None.
    """

    seed: int
    t: Int64
    answer: Array
    images: Array
    steps: int
    label: Int64 | None = None
    images_label: Int64 | None = None

    @classmethod
    def measure(cls, network: Network) -> Reference:
        """What this network answers."""
        manifest = network.manifest
        T, labels = manifest.schedule.T, manifest.labels
        t = np.unique(np.linspace(1, T, TIMESTEPS).round().astype(np.int64))
        empty = cls(
            seed=SEED,
            t=t,
            answer=np.empty((len(t), *manifest.sample_shape), np.float32),
            images=np.empty((SAMPLES, *manifest.sample_shape), np.float32),
            steps=min(STEPS, T),
            label=np.arange(len(t)) % labels if labels else None,  # the null label too
            images_label=np.arange(SAMPLES) % labels if labels else None,
        )
        answer, images = empty.answers_of(network, 1), empty.images_of(network)
        return cls(**{**vars(empty), "answer": answer, "images": images})

    def answers_of(self, network: Network, batch: int) -> Array:
        """The network's answer to each question, computed in a batch of this size."""
        shape = (len(self.t), *network.manifest.sample_shape)
        x = noise.Draws(self.seed, 0, shape).prior()
        out = []
        for i, t in enumerate(self.t.tolist()):
            xs = np.repeat(x[i : i + 1], batch, axis=0)
            xs[: batch - 1] = x[np.arange(i + 1, i + batch) % len(x)]  # others beside it
            label = None if self.label is None else np.full(batch, self.label[i])
            out.append(network(xs, t, label)[-1])
        return np.stack(out)

    def plan(self, network: Network) -> Plan:
        """The chain."""
        return samplers.ddim(network.manifest.schedule, steps=self.steps, clip=1.0)

    def images_of(
        self, network: Network, plan: Plan | None = None, start: Array | None = None
    ) -> Array:
        """What the network samples by the chain, or by another plan from a given state."""
        chosen = self.plan(network) if plan is None else plan
        n, most = len(self.images), network.batch(guided=False)
        parts = []
        for i in range(0, n, most):  # an engine may take less than all of them
            part = slice(i, min(i + most, n))
            labels = None if self.images_label is None else self.images_label[part]
            begin = None if start is None else start[part]
            samples = range(part.start, part.stop)
            *_, last = sample_states(network, chosen, self.seed, samples, labels, start=begin)
            parts.append(last.x)
        return np.concatenate(parts)

    def compare(
        self,
        network: Network,
        variant: str = "fp32",
        recorded: Mapping[str, Mapping[str, float]] | None = None,
    ) -> Iterator[Comparison]:
        """Hold another network against it, one comparison after the other.

        Args:
            network: on any runtime.
            variant: its precision.
            recorded: the figures of its gate, which int8's tolerances elsewhere follow from; None
                = this is the gate.
        """
        if variant in ROUNDING:
            answers = images = HALF_TOLERANCE * ROUNDING[variant]
            measure = RELATIVE
        elif variant == INT8:
            answers, images, measure = INT8_TOLERANCE, INT8_TOLERANCE, RELATIVE
        else:
            answers, images, measure = ANSWER_TOLERANCE, IMAGE_TOLERANCE, MAX_ABS

        def tolerance(what: str, usual: float) -> float:
            error = (recorded or {}).get(what, {}).get(RELATIVE)
            if variant != INT8 or error is None:
                return usual
            return INT8_ELSEWHERE * error + ANSWER_TOLERANCE  # and float32's own rounding

        for batch in sorted({min(batch, network.batch(guided=False)) for batch in BATCHES}):
            what, ours = f"answers at batch {batch}", self.answers_of(network, batch)
            yield compare(what, ours, self.answer, tolerance(what, answers), measure)
        what = f"{self.steps}-step DDIM"
        ours = self.images_of(network)
        yield compare(what, ours, self.images, tolerance(what, images), measure)

    def to_bytes(self) -> bytes:
        """The content of reference.npz."""
        buffer = io.BytesIO()
        arrays = {name: value for name, value in asdict(self).items() if value is not None}
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, manifest: Manifest) -> Reference:
        """The inverse of `to_bytes`; sizes are checked before anything is allocated.

        Raises:
            BundleError: not what an export of this model writes.
        """
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                headers = {
                    name.removesuffix(".npy"): _header(archive, name) for name in archive.namelist()
                }
            _check_headers(headers, manifest)
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                arrays = {name: file[name] for name in headers}
        except (ValueError, TypeError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise BundleError(
                f"reference.npz is not what an export writes: {error}; export the model again"
            ) from error
        reference = cls(**{**arrays, "seed": int(arrays["seed"]), "steps": int(arrays["steps"])})
        T = manifest.schedule.T
        labels = [a for a in (reference.label, reference.images_label) if a is not None]
        in_range = reference.t.min() >= 1 and reference.t.max() <= T and 1 <= reference.steps <= T
        if (
            reference.seed < 0
            or not in_range
            or any(a.min() < 0 or a.max() >= manifest.labels for a in labels)
        ):
            raise BundleError(
                "reference.npz holds a seed, timesteps or labels that the model does not have"
            )
        return reference


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    """Shape and dtype of an array in an .npz, without reading it."""
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"{name} has .npy version {version}")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return shape, dtype


def _check_headers(
    headers: dict[str, tuple[tuple[int, ...], np.dtype[np.generic]]], manifest: Manifest
) -> None:
    """Raise ValueError unless the arrays are those of a Reference of this model."""
    labels = {"label", "images_label"}
    expected = {f.name for f in fields(Reference)} - (set() if manifest.class_names else labels)
    if headers.keys() != expected:
        raise ValueError(f"it holds {sorted(headers)}, expected {sorted(expected)}")
    k, n = headers["t"][0][:1] or (0,), headers["images"][0][:1] or (0,)
    shapes = {
        "seed": (), "steps": (), "t": k, "label": k, "images_label": n,
        "answer": (*k, *manifest.sample_shape), "images": (*n, *manifest.sample_shape),
    }  # fmt: skip
    for name, (shape, dtype) in headers.items():
        kind = np.float32 if name in ("answer", "images") else np.int64
        if shape != shapes[name] or dtype != kind or not all(0 < i <= MOST for i in shape[:1]):
            raise ValueError(f"{name} is {dtype} {shape}, expected {np.dtype(kind)} {shapes[name]}")
