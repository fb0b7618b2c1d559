"""What an app calls: a bundle and an engine, and images out of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_edge import checks, noise
from ddpm_edge.arrays import Array
from ddpm_edge.bundle import REFERENCE, Bundle
from ddpm_edge.errors import BundleError, ClosedError, ConfigError, ForkError
from ddpm_edge.images import to_images
from ddpm_edge.plan import Plan, State
from ddpm_edge.reference import Comparison, Reference
from ddpm_edge.runtimes import Engine, open_engine
from ddpm_edge.sampling import Labels, Network, enough_memory, sample_states
from ddpm_edge.schedule import Schedule

Label = int | str | None
MAX_BATCH = 16  # samples in one engine call unless `batch` says otherwise


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a running generation. The arrays are copies: keep them.

    Attributes:
        index: 0..total - 1.
        total: steps of the whole call.
        t: the timestep that the network was asked about.
        first: index of the first sample in x.
        x: the state after the step; float32 (n, C, H, W).
        x0: what the step predicted of the final image; float32 (n, C, H, W).
    """

    index: int
    total: int
    t: int
    first: int
    x: Array
    x0: Array


Callback = Callable[[Step], object]


@dataclass(frozen=True, eq=False)
class Result:
    """What a run made.

    Attributes:
        images: uint8 or float32 (n, H, W, C). Fewer than asked for if stopped before all began.
        seed: what to pass to get the same images again.
        plan: what ran.
        runtime: on which runtime and device, such as "onnxruntime on cpu".
        variant: the network's precision.
        milliseconds: wall-clock time of the run.
        stopped: whether the callback ended it early; the images are then the x0 so far.
    """

    images: Array
    seed: int
    plan: Plan
    runtime: str
    variant: str
    milliseconds: float
    stopped: bool


class Generator:
    """A trained model, ready to make images. `Generator.load` makes one; close it or use `with`.

    Threads may share a Generator. A forked child must load its own. Ctrl-C in the main thread ends
    a call within one step, in the midst of a long one too, and so does any signal handler of the
    app that raises. After that, as after any error, nothing is locked or running and the Generator
    works on.
    """

    def __init__(self, bundle: Bundle, engine: Engine, variant: str) -> None:
        self.bundle = bundle
        self.variant = variant
        self._network: Network | None = Network(engine, bundle.manifest)
        self._pid = os.getpid()

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        runtime: str = "auto",
        device: str | None = None,
        variant: str | None = None,
        threads: int | None = None,
    ) -> Generator:
        """Load a bundle.

        Args:
            path: the bundle's directory; None = the built-in Fashion-MNIST model.
            runtime: "auto" or a runtime's name, such as "onnxruntime".
            device: such as "cpu", "cuda" or "cuda:1"; None = the runtime's best.
            variant: precision of the network; None = fp32.
            threads: CPU threads of one evaluation; None = the runtime's choice.

        Raises:
            BundleError: not a bundle, or changed since its export.
            RuntimeUnavailableError: the runtime or device is not there.
            EngineError: the runtime cannot load the model.
        """
        bundle = Bundle.open(path)
        name, model = bundle.model(variant)
        engine = open_engine(model, runtime=runtime, device=device, threads=threads)
        try:
            return cls(bundle, engine, name)
        except BaseException:
            engine.close()
            raise

    def __repr__(self) -> str:
        state = self.runtime if self._network else "closed"
        return f"Generator({self.bundle.manifest.name!r}, {self.variant}, {state})"

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the engine. Calling it again does nothing, and so does a forked child's call.

        Other threads that are sampling end with a ClosedError.
        """
        if os.getpid() != self._pid:  # its threads stayed in the parent: freeing it crashes
            return
        network, self._network = self._network, None
        if network is not None:
            network.close()

    @property
    def runtime(self) -> str:
        """The runtime and the device it really runs on, such as "onnxruntime on cpu"."""
        engine = self._open().engine
        return f"{engine.runtime} on {engine.device}"

    @property
    def schedule(self) -> Schedule:
        """The forward process the model was trained with."""
        return self.bundle.manifest.schedule

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample."""
        return self.bundle.manifest.sample_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels 0, 1, ...; empty if the model takes none."""
        return self.bundle.manifest.class_names

    # What a caller asks for

    def plan(self, sampler: str | None = None, steps: int | None = None, **options: Any) -> Plan:
        """What `sample` with the same arguments would run.

        Args:
            sampler: a name in `samplers.SAMPLERS`, such as "ddpm" (Algorithm 2) or "dpmpp"; None =
                the bundle's default.
            steps: of the sampler, 1..T; None = the default plan's, or the sampler's own default.
            **options: `spacing` (see `samplers.timesteps`), `clip` (see `plan.Clip.parse`; by
                default images are clipped to their range, 1.0), and what the sampler takes besides:
                `variance`, `eta`, `order`, `sde`, `corrections`, `snr`.

        Raises:
            ConfigError: an unknown sampler or option, or a value out of range.
        """
        return self.bundle.manifest.make_plan(sampler, steps, **options)

    def warmup(self, n: int = 1) -> None:
        """Evaluate the network once for n samples, so that the first image is not slower.

        Raises:
            OutOfMemoryError: too little memory for n samples at once.
        """
        network = self._open()
        labels = np.zeros(checks.whole("n", n), np.int64) if self.class_names else None
        with enough_memory(n):
            network(np.zeros((n, *self.sample_shape), np.float32), 1, labels)

    def verify(self) -> Iterator[Comparison]:
        """Recompute on this runtime what torch computed when the model was exported.

        Yields a comparison after the other, each with its tolerance; `all(c.passed for c in
        generator.verify())` proves that the model computes here what it computed there.

        Raises:
            BundleError: the bundle has no reference.npz, or it is not one of this model.
        """
        network = self._open()
        if REFERENCE not in self.bundle.files:
            raise BundleError(f"{self.bundle.path} has no {REFERENCE}; export the model again")
        data = self.bundle.read(REFERENCE)
        yield from Reference.from_bytes(data, self.bundle.manifest).compare(network)

    def sample(self, n: int = 1, **arguments: Any) -> Array:
        """Make n images: uint8 (n, H, W, C), or float32 in [-1, 1] with dtype="float32".

        The arguments are those of `run`.
        """
        return self.run(n, **arguments).images

    def run(
        self,
        n: int = 1,
        *,
        label: Label | Sequence[Label] = None,
        guidance: float | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        seed: int | None = None,
        first: int = 0,
        batch: int | None = None,
        dtype: str = "uint8",
        callback: Callback | None = None,
        **options: Any,
    ) -> Result:
        """Make n images and say how.

        Args:
            n: how many, >= 1.
            label: a class, by number or name, for all or one for each; None = no label (a model
                may know none: `manifest.null_label` is None).
            guidance: scale of classifier-free guidance, eps_u + scale (eps_c - eps_u); needs a
                label. None or 1.0 = plain conditioning.
            sampler: see `plan`.
            steps: see `plan`.
            **options: see `plan`.
            seed: 0..2**64 - 1; None draws a fresh one, found in the result.
            first: index of the first sample: `run(1, seed=s, first=5)` is the sixth image of
                `run(8, seed=s)`.
            batch: samples in one evaluation of the network; does not change the images.
            dtype: of the images, "uint8" or "float32".
            callback: called after every step; returning True stops the run with the x0 so far.

        Raises:
            ConfigError: an argument that cannot work; nothing has run then.
            NonFiniteError: the network answered with NaN or infinity.
            OutOfMemoryError: too little memory for the batch; a smaller one still works.
            ClosedError, ForkError: this Generator cannot be used, or no longer.
        """
        start = time.perf_counter()
        batch = MAX_BATCH if batch is None else batch
        request = self._request(n, label, guidance, sampler, steps, seed, first, batch, options)
        network, runtime = self._open(), self.runtime
        if dtype not in ("uint8", "float32"):
            raise ConfigError(f"dtype must be 'uint8' or 'float32'; got {dtype!r}")
        images: list[Array] = []
        stopped = False
        for chunk in request.chunks():
            state = None
            for state in request.states(network, chunk):
                if callback is not None:
                    answer = callback(request.step(state, chunk))
                    stopped = isinstance(answer, (bool, np.bool_)) and bool(answer)
                if stopped:
                    break
            if state is not None:  # always: a plan has at least one row
                images.append(to_images(state.x0() if stopped else state.x, dtype))
            if stopped:
                break
        return Result(
            images=np.concatenate(images),
            seed=request.seed,
            plan=request.plan,
            runtime=runtime,
            variant=self.variant,
            milliseconds=(time.perf_counter() - start) * 1e3,
            stopped=stopped,
        )

    def stream(
        self,
        n: int = 1,
        *,
        label: Label | Sequence[Label] = None,
        guidance: float | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        seed: int | None = None,
        first: int = 0,
        **options: Any,
    ) -> Iterator[Step]:
        """Every step of making n images, all together in one batch; arguments as for `run`.

        The last step's x is the result. Arguments are checked when `stream` is called; leaving the
        iteration early is fine.
        """
        request = self._request(n, label, guidance, sampler, steps, seed, first, n, options)
        (chunk,) = request.chunks()
        states = request.states(self._open(), chunk)
        return (request.step(state, chunk) for state in states)

    # How it is done

    def _request(
        self,
        n: int,
        label: Label | Sequence[Label],
        guidance: float | None,
        sampler: str | None,
        steps: int | None,
        seed: int | None,
        first: int,
        batch: int,
        options: dict[str, Any],
    ) -> _Request:
        """The checked form of a call's arguments."""
        self._open()
        n = checks.whole("n", n)
        labels = self._labels(label, n)
        if guidance is not None:
            if labels is None or label is None:
                raise ConfigError("guidance needs a label; give label=, or leave guidance out")
            if not np.isfinite(checks.number("guidance", guidance)):
                raise ConfigError(f"guidance must be a finite number; got {guidance!r}")
            if guidance != 1.0 and self.bundle.manifest.null_label is None:
                raise ConfigError(
                    f"guidance {guidance:g} needs what the model {self.bundle.manifest.name!r} "
                    "answers without a label, and it knows no images without one; leave guidance "
                    "out"
                )
        return _Request(
            n=n,
            labels=labels,
            guidance=None if guidance == 1.0 else guidance,
            plan=self.plan(sampler, steps, **options),
            seed=noise.check_seed(seed),
            first=checks.whole("first", first, least=0, most=checks.MOST - n),
            batch=checks.whole("batch", batch),
        )

    def _labels(self, label: Any, n: int) -> Labels:
        """int64 (n,) for the network, or None where it takes no label."""
        manifest = self.bundle.manifest
        if not manifest.class_names:
            if label is not None:
                raise ConfigError(
                    f"the model {manifest.name!r} was trained without labels; leave label out"
                )
            return None
        many = isinstance(label, (list, tuple, range)) or (
            isinstance(label, np.ndarray) and label.ndim == 1
        )
        labels = list(label) if many else [label] * n
        if len(labels) != n:
            raise ConfigError(f"got {len(labels)} labels for n = {n} images; give one or n of them")
        return np.array([manifest.label_number(value) for value in labels], np.int64)

    def _open(self) -> Network:
        if os.getpid() != self._pid:
            raise ForkError(
                f"this Generator was loaded in process {self._pid}, this is its forked child "
                f"{os.getpid()}; call Generator.load in the child, or start processes with 'spawn'"
            )
        if self._network is None:
            raise ClosedError("this Generator is closed; load it again")
        return self._network


@dataclass(frozen=True)
class _Request:
    """A checked call."""

    n: int
    labels: Labels
    guidance: float | None
    plan: Plan
    seed: int
    first: int
    batch: int

    def chunks(self) -> list[range]:
        """The sample indices of each batch."""
        end = self.first + self.n
        return [range(i, min(i + self.batch, end)) for i in range(self.first, end, self.batch)]

    def states(self, network: Network, chunk: range) -> Iterator[State]:
        """The loop over one chunk of samples."""
        part = slice(chunk.start - self.first, chunk.stop - self.first)
        labels = None if self.labels is None else self.labels[part]
        return sample_states(network, self.plan, self.seed, chunk, labels, self.guidance)

    def step(self, state: State, chunk: range) -> Step:
        """The public form of the loop's state."""
        rows = len(self.plan)
        before = (chunk.start - self.first) // self.batch * rows
        return Step(
            index=before + state.index,
            total=-(-self.n // self.batch) * rows,
            t=state.t,
            first=chunk.start,
            x=state.x.copy(),
            x0=state.x0(),
        )
