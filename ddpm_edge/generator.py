"""What an app calls: a bundle and an engine, and images out of them."""

from __future__ import annotations

import functools
import logging
import math
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_edge import checks
from ddpm_edge.arrays import Array, Float32, Float64, Int64
from ddpm_edge.bundle import BUILT_IN, REFERENCE, Bundle
from ddpm_edge.errors import (
    BundleError,
    ClosedError,
    ConfigError,
    EngineMissingError,
    ForkError,
)
from ddpm_edge.images import from_images, to_images
from ddpm_edge.latency import Latencies, Latency, engine_name, measured_in, timed
from ddpm_edge.latents import slerp
from ddpm_edge.likelihood import Bound, levels, variational_bound
from ddpm_edge.plan import Plan
from ddpm_edge.reference import Comparison, Reference
from ddpm_edge.request import (
    Callback,
    Label,
    Made,
    Request,
    Step,
    check_dtype,
    check_milliseconds,
    is_many,
    label_numbers,
)
from ddpm_edge.restoration import AveragePool, Grayscale, Mask, Operator
from ddpm_edge.runtimes import Engine, open_engine
from ddpm_edge.runtimes.engine_cache import cache_directory
from ddpm_edge.samplers import inversion
from ddpm_edge.sampling import Network, enough_memory, until_warm, warm_up
from ddpm_edge.schedule import Schedule
from ddpm_edge.tasks import Known, Restore, Task, Vary
from ddpm_edge.tuned import Tuned, TunedPlan

INVERSION_STEPS = 100
BUILD = ("never", "missing")

log = logging.getLogger("ddpm_edge")


@dataclass(frozen=True, eq=False)
class Result:
    """What a run made.

    Attributes:
        images: uint8 or float32 (n, H, W, C). Fewer than asked for if stopped before all began.
        seed: what to pass to get the same images again.
        plan: what ran.
        runtime: on which runtime and device, such as "onnxruntime on cpu".
        variant: the network's precision.
        milliseconds: wall-clock time of the run, without what had to be measured for a budget.
        stopped: whether the callback or the deadline ended it early; the last images are then the
            x0 so far.
        expected_ms: how long the plan that was chosen for a budget was expected to take,
            milliseconds; None without a budget.
        loop: where the loop around the network ran, "host" or "device" (see `Generator.load`).
    """

    images: Array
    seed: int
    plan: Plan
    runtime: str
    variant: str
    milliseconds: float
    stopped: bool
    expected_ms: float | None = None
    loop: str = "host"


class Generator:
    """A trained model, ready to make images. `Generator.load` makes one; close it or use `with`.

    Threads may share a Generator. A forked child must load its own. Ctrl-C in the main thread ends
    a call within one step, in the midst of a long one too, and so does any signal handler of the
    app that raises. After that, as after any error, nothing is locked or running and the Generator
    works on.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        variant: str,
        latencies: Latencies | None = None,
        loop: str = "auto",
    ) -> None:
        self.bundle = bundle
        self.variant = variant
        self._network: Network | None = Network(engine, bundle.manifest, loop)
        self._latencies = latencies or Latencies(
            None, "", functools.partial(engine_name, engine, None, loop)
        )
        self._pid = os.getpid()
        # A plan takes longer to make than a step of the loop to run; the same call makes the same,
        # and a budget looks at all that were tuned.
        self._remembered_plan = functools.lru_cache(128, typed=True)(bundle.manifest.make_plan)

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        runtime: str = "auto",
        device: str | None = None,
        variant: str | None = None,
        threads: int | None = None,
        cache_dir: str | Path | None = None,
        build: str = "never",
        loop: str = "auto",
    ) -> Generator:
        """Load a bundle.

        Args:
            path: the bundle's directory; None = the built-in Fashion-MNIST model.
            runtime: "auto" (what `bench --choose` measured to be the fastest here, or else the best
                that works without building anything), "tensorrt", "onnxruntime" or "openvino".
            device: such as "cpu", "cuda" or "cuda:1"; None = the runtime's best.
            variant: precision of the network; None = fp32.
            threads: CPU threads of one evaluation; None = the runtime's choice.
            cache_dir: where engines that were built on this device are; None = DDPM_EDGE_CACHE, or
                the user's cache.
            build: "missing" builds a TensorRT engine that was asked for by name and is not there,
                which takes minutes on a Jetson; "never" says how to.
            loop: where the loop around the network runs. "device": on the GPU with the network,
                so that no state is copied between two steps. "host": in NumPy. "auto": on the
                device where there is one; what that cannot do (clipping at a percentile, operators
                other than a `Mask`) runs on the host, which is logged.

        Raises:
            ConfigError: there is no such loop here.
            BundleError: not a bundle, or changed since its export.
            RuntimeUnavailableError: the runtime or device is not there.
            EngineMissingError: TensorRT was asked for, and its engine must be built first.
            EngineError: the runtime cannot load the model.
        """
        bundle = Bundle.open(path)
        name, engine = open_bundle(bundle, runtime, device, variant, threads, cache_dir, build)
        try:
            model = bundle.files[bundle.manifest.variants[name]["file"]]["sha256"]
            told = functools.partial(engine_name, engine, threads, loop)
            latencies = Latencies(measured_in(cache_directory(cache_dir)), model, told)
            return cls(bundle, engine, name, latencies, loop)
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
                `variance`, `eta`, `order`, `sde`, `corrections`, `snr`. `travel_length` and
                `travel_repeat` of any, see `samplers.time_travel`.

        Raises:
            ConfigError: an unknown sampler or option, or a value out of range.
        """
        return self._plan_from(Known(), sampler, steps, options)

    def warmup(self, n: int = 1) -> None:
        """Evaluate the network for n samples, so that the first image is not slower.

        Raises:
            OutOfMemoryError: too little memory for n samples at once.
        """
        network = self._open()
        labels = np.zeros(checks.whole("n", n), np.int64) if self.class_names else None
        with enough_memory(n):
            warm_up(network, self.plan(), n, labels)

    def latency(self, n: int = 1, *, again: bool = False) -> Latency:
        """How long a step takes on this device for n samples at once, in milliseconds.

        Measured where it is not known, for 1.5 seconds or the time of three steps, and remembered
        in the device's cache until the machine, its power mode or a runtime changes. In this
        process it then follows what plain calls with a `budget_ms` take. An app that has such calls
        asks for it when it starts, or its first image waits for it; that also warms up, for up to
        15 steps.

        Args:
            n: samples of one batch (see `run`), or twice as many with guidance.
            again: measure it even if it is known.

        Raises:
            EngineError: more samples than the engine takes at once.
            OutOfMemoryError: too little memory for them.

        Warns:
            CacheWarning: it cannot be remembered.
        """
        self._open()
        return self._latencies.of(checks.whole("n", n), lambda: self._timed(n), again)

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
        reference = Reference.from_bytes(data, self.bundle.manifest)
        figures = self.bundle.manifest.variants[self.variant].get("parity", {})
        yield from reference.compare(network, self.variant, figures)

    def sample(self, n: int | None = None, **arguments: Any) -> Array:
        """Make n images: uint8 (n, H, W, C), or float32 in [-1, 1] with dtype="float32".

        The arguments are those of `run`.
        """
        return self.run(n, **arguments).images

    def run(
        self,
        n: int | None = None,
        *,
        label: Label | Sequence[Label] = None,
        guidance: float | Sequence[float] | None = None,
        guidance_interval: tuple[int, int] | None = None,
        task: Task | None = None,
        latents: Array | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        seed: int | None = None,
        first: int = 0,
        batch: int | None = None,
        dtype: str = "uint8",
        callback: Callback | None = None,
        deadline_ms: float | None = None,
        budget_ms: float | None = None,
        **options: Any,
    ) -> Result:
        """Make n images and say how.

        Args:
            n: how many, >= 1; None = one, or as many as `task` and `latents` are for.
            label: a class, by number or name, for all or one for each; None = no label (a model
                may know none: `manifest.null_label` is None).
            guidance: scale of classifier-free guidance, eps_u + scale (eps_c - eps_u), for all or
                one for each; needs a label. None or 1.0 = plain conditioning.
            guidance_interval: the lowest and the highest timestep at which guidance acts;
                elsewhere the network is asked once instead of twice. None = everywhere.
            task: what is known of the images, a `Restore` or a `Vary`; None = nothing. One image
                with n = 8 gives eight answers.
            latents: states at T to start from, float32 (C, H, W) or (n, C, H, W), such as `invert`
                gives; None = drawn from the seed. To a `Vary` they are its noise.
            sampler: see `plan`.
            steps: see `plan`. From a timestep below T, as `Vary` begins at, at most so many.
            **options: see `plan`.
            seed: 0..2**64 - 1; None draws a fresh one, found in the result.
            first: index of the first sample: `run(1, seed=s, first=5)` is the sixth image of
                `run(8, seed=s)`.
            batch: samples in one evaluation of the network; does not change the images.
            dtype: of the images, "uint8" or "float32".
            callback: called after every step; returning True stops the run with the x0 so far.
            deadline_ms: milliseconds from the call's start. A step that would end later is not
                begun, but for the first: the run stops with the x0 so far.
            budget_ms: milliseconds for which the best plan is taken that is expected to fit, of
                those that `ddpm-edge tune` measured; in the place of sampler, steps and options.
                The deadline too, unless another one is given. How long a step takes here must be
                known: where it is measured first (see `latency`), the call, and a deadline as well,
                begin after that.

        Raises:
            ConfigError: an argument that cannot work, such as a budget that nothing fits into;
                nothing has run then.
            NonFiniteError: the network answered with NaN or infinity.
            OutOfMemoryError: too little memory for the batch; a smaller one still works.
            ClosedError, ForkError: this Generator cannot be used, or no longer.
        """
        network, runtime = self._open(), self.runtime
        check_dtype(dtype)
        tuned = None
        if budget_ms is not None:
            tuned = self._tuned_for(budget_ms, sampler=sampler, steps=steps, **options)
        request = self._request(
            n,
            sampler,
            steps,
            options,
            label=label,
            guidance=guidance,
            guidance_interval=guidance_interval,
            task=task,
            latents=latents,
            seed=seed,
            first=first,
            batch=network.batch(guidance is not None) if batch is None else batch,
            deadline_ms=budget_ms if deadline_ms is None else deadline_ms,
        )
        expected_ms = None
        if budget_ms is None or tuned is None:
            request.check()
        else:
            request, expected_ms = self._fitting(request, budget_ms, tuned)
        images = []
        for made in request.made(network, callback):
            images.append(request.images(made.x0, made.chunk, dtype))
        milliseconds = request.deadline.milliseconds()
        plain = callback is None and task is None and guidance is None
        if tuned is not None and plain and made.state and request.n <= request.batch:
            evaluations = np.count_nonzero(request.plan.evaluate[: made.state.index + 1])
            self._latencies.note(request.n, milliseconds, int(evaluations))
        return Result(
            images=np.concatenate(images),
            seed=request.seed,
            plan=request.plan,
            runtime=runtime,
            variant=self.variant,
            loop=made.state.loop if made.state else "host",
            milliseconds=milliseconds,
            stopped=not made.whole or made.chunk.stop < request.first + request.n,
            expected_ms=expected_ms,
        )

    def stream(
        self,
        n: int | None = None,
        *,
        label: Label | Sequence[Label] = None,
        guidance: float | Sequence[float] | None = None,
        guidance_interval: tuple[int, int] | None = None,
        task: Task | None = None,
        latents: Array | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        seed: int | None = None,
        first: int = 0,
        deadline_ms: float | None = None,
        **options: Any,
    ) -> Iterator[Step]:
        """Every step of making n images, all together in one batch; arguments as for `run`.

        The last step's x is the result; where a deadline ended it early, the last step's x0. A
        `Vary` of strength 0 has no steps.
        Arguments are checked when `stream` is called; leaving the iteration early is fine.
        """
        request = self._request(
            n,
            sampler,
            steps,
            options,
            label=label,
            guidance=guidance,
            guidance_interval=guidance_interval,
            task=task,
            latents=latents,
            seed=seed,
            first=first,
            deadline_ms=deadline_ms,
        )
        (chunk,) = request.check().chunks()
        return request.steps(self._open(), chunk)

    # One model, many uses: `sample` with a task, which `run` and `stream` take as well

    def restore(
        self, y: Any, operator: Operator, *, sigma_y: float = 0.0, **arguments: Any
    ) -> Array:
        """Images of which a linear measurement y = A x + sigma_y n is known (DDNM).

        Args:
            y: see `Restore`.
            operator: A: `Mask`, `AveragePool`, `Grayscale` or `Matrix`.
            sigma_y: standard deviation of the noise in y, for values in [-1, 1].
            **arguments: see `run`.

        Returns:
            uint8 (n, H, W, C), or as `dtype` says. Where sigma_y is 0, what a mask, pooling or gray
            makes of them is y within one grey level; of a `Matrix`, about y, as far as images in
            [-1, 1] can be so.
        """
        return self.sample(task=Restore(y, operator, sigma_y), **arguments)

    def inpaint(self, image: Any, mask: Any, **arguments: Any) -> Array:
        """Images painted anew where a mask says so.

        Args:
            image: one or many, uint8 or float32 in [-1, 1], (H, W, C).
            mask: (H, W) for all or (n, H, W): bool, {0, 1} or {0, 255}, not 0 where pixels are to
                be painted. All others are returned as they came (floats to 1e-4).
            **arguments: see `restore`.
        """
        return self.restore(image, Mask(mask), **arguments)

    def upscale(self, image: Any, factor: int, **arguments: Any) -> Array:
        """Larger images whose means over blocks of factor x factor pixels are the given ones.

        Args:
            image: one or many, uint8 or float32 in [-1, 1], (H / factor, W / factor, C).
            factor: 2 or more.
            **arguments: see `restore`.
        """
        return self.restore(image, AveragePool(factor), **arguments)

    def colorize(self, image: Any, **arguments: Any) -> Array:
        """Colour images whose gray is the given one, for models of RGB images.

        Args:
            image: one or many, uint8 or float32 in [-1, 1], (H, W) or (H, W, 1).
            **arguments: see `restore`.
        """
        return self.restore(image, Grayscale(), **arguments)

    def vary(self, image: Any, strength: float = 0.5, **arguments: Any) -> Array:
        """Variations of images, by noise and its removal (SDEdit).

        Args:
            image: one or many, uint8 or float32 in [-1, 1], (H, W, C).
            strength: 0 = the image itself .. 1 = independent of it.
            **arguments: see `run`.
        """
        return self.sample(task=Vary(image, strength), **arguments)

    def invert(
        self,
        image: Any,
        *,
        steps: int | None = None,
        spacing: str | Sequence[int] = "trailing",
        label: Label | Sequence[Label] = None,
        guidance: float | Sequence[float] | None = None,
        guidance_interval: tuple[int, int] | None = None,
        batch: int | None = None,
        callback: Callback | None = None,
        deadline_ms: float | None = None,
    ) -> Float32:
        """The latents that DDIM makes these images of, float32 (n, C, H, W).

        `sample(latents=..., sampler="ddim", steps=100, clip=None)`, with these steps, the same
        spacing, label and guidance, leads back to about the images. Draws nothing.

        Args:
            image: one or many, uint8 or float32 in [-1, 1], (H, W, C).
            steps: 1..T; None = 100, or T where that is less.
            spacing: see `plan`.
            label: see `run`.
            guidance: see `run`.
            guidance_interval: see `run`.
            batch: see `run`.
            callback: see `run`. If it stops, what is left is done in a single step, and batches
                that have not begun are left out.
            deadline_ms: see `run`; it stops as the callback does.
        """
        return self._invert(
            from_images(image, self.sample_shape),
            steps,
            callback,
            spacing=spacing,
            label=label,
            guidance=guidance,
            guidance_interval=guidance_interval,
            batch=batch,
            deadline_ms=deadline_ms,
        )

    def interpolate(
        self,
        a: Any,
        b: Any,
        n: int = 8,
        *,
        label: Label | Sequence[Label] = None,
        guidance: float | Sequence[float] | None = None,
        guidance_interval: tuple[int, int] | None = None,
        sampler: str = "ddim",
        steps: int | None = None,
        spacing: str | Sequence[int] = "trailing",
        clip: float | str | None = None,
        seed: int | None = None,
        batch: int | None = None,
        dtype: str = "uint8",
        callback: Callback | None = None,
        deadline_ms: float | None = None,
        **options: Any,
    ) -> Array:
        """Images from a to b: spherical between their latents.

        Args:
            a: an image, uint8 or float32 in [-1, 1], (H, W, C); the first of the result.
            b: another one; the last of the result.
            n: how many with both, >= 2.
            label: see `run`; the first and the last are those of a and b.
            guidance: see `run`; as label.
            guidance_interval: see `run`.
            sampler: see `plan`; one that draws no noise.
            steps: of the inversion and of the sampling, see `invert`.
            spacing: of both, see `plan`.
            clip: see `plan`.
            seed: as for `run`; nothing is drawn.
            batch: see `run`.
            dtype: see `run`.
            callback: see `run`; called after the steps of the sampling.
            deadline_ms: see `run`; inversion may take half of it.
            **options: see `plan`.
        """
        started = time.perf_counter()
        for name in ("task", "latents"):
            if name in options:
                raise ConfigError(f"interpolate takes no {name}: it starts from its two images")
        n = checks.whole("n", n, least=2)
        ends = np.concatenate([self._one_state(a, "a"), self._one_state(b, "b")])
        half = None if deadline_ms is None else checks.number("deadline_ms", deadline_ms) / 2
        steps = self._inversion_steps(steps, spacing)
        check_dtype(dtype)
        options = {"spacing": spacing, "clip": clip} | options
        both: dict[str, Any] = {"guidance_interval": guidance_interval, "batch": batch}
        sampling = {"label": label, "guidance": guidance, "seed": seed} | both
        blank = np.zeros((n, *self.sample_shape), np.float32)  # found now, not after the inversion
        plan = self._request(
            n, sampler, steps, options, latents=blank, deadline_ms=deadline_ms, **sampling
        ).plan
        if plan.s.any():
            raise ConfigError(
                f"{plan.name} draws noise, so that it does not lead back to the images; use ddim, "
                "dpmpp or unipc"
            )
        latents = self._invert(
            ends, steps, spacing=spacing, label=_ends(label), guidance=_ends(guidance),
            deadline_ms=half, **both,
        )  # fmt: skip
        if deadline_ms is not None:
            deadline_ms = max(1e-3, deadline_ms - (time.perf_counter() - started) * 1e3)
        images = self.sample(
            n,
            latents=slerp(latents[0], latents[1], n),
            sampler=sampler,
            steps=steps,
            dtype=dtype,
            callback=callback,
            deadline_ms=deadline_ms,
            **sampling,
            **options,
        )
        first, last = to_images(ends, dtype)
        images[0] = first
        if len(images) == n:
            images[-1] = last
        return images

    # How likely images are

    def bound(
        self,
        images: Any,
        timesteps: int | None = None,
        seed: int | None = None,
        *,
        label: Label | Sequence[Label] = None,
        first: int = 0,
        batch: int | None = None,
        progress: Callable[[float], object] | None = None,
    ) -> Bound:
        """The variational bound on -ln p of images, in its parts (see `ddpm_edge.likelihood`).

        p is this model with Algorithm 2 in all T steps, clipped as the default plan is.

        Args:
            images: one or many, of 256 levels: uint8 (or float32 in [-1, 1]), (H, W, C).
            timesteps: how many evaluations each image gets, 4..T - 1, in pairs (an odd number is
                one less), for an estimate with its standard error; None or T = every timestep once.
            seed: see `run`. Image i depends on (seed, first + i) alone.
            label: see `run`; what the images are said to show.
            first: index of the first image.
            batch: evaluations at once; None = what `run` takes.
            progress: called with the share that is done, 0..1.

        Raises:
            ConfigError: an argument that cannot work.
            NonFiniteError: the network answered with NaN or infinity.
            RuntimeUnavailableError: SciPy is missing.
        """
        x0 = levels(from_images(images, self.sample_shape))
        manifest, network = self.bundle.manifest, self._open()
        labels = label_numbers(manifest, label, len(x0))
        batch = network.batch(False) if batch is None else checks.whole("batch", batch)

        def ask(x: Float32, t: Int64, image: Int64) -> Array:
            return network(x, t, None if labels is None else labels[image])

        with enough_memory(batch):
            return variational_bound(
                ask, self.schedule, x0, prediction=manifest.prediction, variance=manifest.variance,
                clip=self.plan("ddpm").clip, timesteps=timesteps, seed=seed,
                first=checks.whole("first", first, least=0, most=checks.MOST - len(x0)),
                batch=batch, progress=progress,
            )  # fmt: skip

    def log_likelihood(
        self, images: Any, timesteps: int | None = None, seed: int | None = None, **arguments: Any
    ) -> Float64:
        """The evidence lower bound on ln p of each image, nats; float64 (n,). See `bound`."""
        return -self.bound(images, timesteps, seed, **arguments).nats

    def bits_per_dim(
        self, images: Any, timesteps: int | None = None, seed: int | None = None, **arguments: Any
    ) -> Float64:
        """The upper bound on -log2 p of each image, over its values; float64 (n,). See `bound`."""
        return self.bound(images, timesteps, seed, **arguments).bits_per_dim

    # How it is done

    def _request(
        self,
        n: int | None,
        sampler: str | None,
        steps: int | None,
        options: dict[str, Any],
        **call: Any,
    ) -> Request:
        """The checked form of a call: `options` are the plan's, `call` is for `Request.of`."""
        self._open()
        if "budget_ms" in options:
            raise ConfigError("only run and sample take a budget_ms; give steps and deadline_ms")

        def plan(known: Known) -> Plan:
            return self._plan_from(known, sampler, steps, options)

        with enough_memory(1 if n is None else n):
            return Request.of(self.bundle.manifest, n, plan=plan, **call)

    def _tuned_for(self, budget_ms: float, **plan: Any) -> Tuned:
        """How good plans are, for a call with a budget and these arguments of a plan.

        Raises:
            ConfigError: there may be none of them, or nobody measured it.
        """
        check_milliseconds("budget_ms", budget_ms)
        given = [k for k, v in plan.items() if v is not None or k not in ("sampler", "steps")]
        if given:
            raise ConfigError(
                f"budget_ms chooses the plan; leave {', '.join(given)} out, or give deadline_ms"
            )
        tuned = self.bundle.manifest.tuned
        if tuned is None:
            raise ConfigError(
                f"budget_ms needs to know how good plans are, and the bundle "
                f"{self.bundle.manifest.name!r} does not say: `ddpm-edge tune` measures it"
            )
        return tuned

    def _fitting(self, request: Request, budget_ms: float, tuned: Tuned) -> tuple[Request, float]:
        """The request by the best plan that fits, and the milliseconds that it should take."""
        best_first = sorted(tuned.plans, key=lambda plan: (plan.value, plan.evaluations))
        sizes = [len(chunk) for chunk in request.chunks()]
        whole = request.known.strength == 1.0
        for renew in (False, True):  # where nothing fits: has that been measured lately?
            known = self._known_latencies(request, renew)
            least, cannot = math.inf, None
            for candidate in best_first:
                count = candidate.evaluations
                try:
                    if not whole:  # it has fewer evaluations, whatever their number
                        count = self._tuned_plan(request.known, candidate).evaluations
                    expected_ms = sum(known[size].of(count) for size in sizes)
                    least = min(least, expected_ms)
                    if expected_ms <= budget_ms:
                        plan = self._tuned_plan(request.known, candidate)
                        return replace(request, plan=plan).check(), expected_ms
                except ConfigError as error:  # such as noise in y, and a plan that draws none
                    cannot = error
            if cannot is not None:
                raise cannot
        raise ConfigError(
            f"budget_ms {budget_ms:g} is too little: the least here is "
            f"{math.ceil(10 * least) / 10:g} ms, for {request.n} image{'s' * (request.n > 1)}; "
            "give more, or ask for fewer images"
        )

    def _tuned_plan(self, known: Known, candidate: TunedPlan) -> Plan:
        """The plan that was tuned, from where a task begins."""
        plan = self._plan_from(known, None, None, dict(candidate.plan))
        if known.strength == 1.0 and plan.evaluations != candidate.evaluations:
            raise BundleError(
                f"the bundle says that {plan.name} has {candidate.evaluations} evaluations; it has "
                f"{plan.evaluations}: tune it again"
            )
        return plan

    def _known_latencies(self, request: Request, renew: bool) -> dict[int, Latency]:
        """By samples of a batch. What must be measured for it does not count as the call's time."""
        before, known = time.perf_counter(), {}
        for size in {len(chunk) for chunk in request.chunks()}:
            asked = size * request.asked_for_each
            if renew:
                self._latencies.renew(asked, functools.partial(self._timed, asked))
            known[size] = self.latency(asked)
        self._warm_up_for(request)
        request.deadline.pause(time.perf_counter() - before)
        request.deadline.step_s = {size: known[size].step_ms / 1e3 for size in known}
        return known

    def _warm_up_for(self, request: Request) -> None:
        """Let the first steps of a call be as quick as the others, where it asks twice on a GPU.

        Latencies are measured without guidance, which warms the loop up for that.
        """
        network, guided = self._open(), request.guidance is not None
        for chunk in request.chunks() if guided else []:
            measured = request.known.measurement
            loops = network.loops_for(request.plan, measured, len(chunk), guided)
            if loops is not None and not loops.is_warm(len(chunk), guided):
                until_warm(request.states(network, chunk, request.start(chunk)))

    def _timed(self, n: int) -> Latency:
        """What n samples took now."""
        label = 0 if self.class_names else None  # not every model can do without
        request = self._request(n, None, None, {}, label=label, seed=0)
        (chunk,) = request.chunks()
        steps = request.states(self._open(), chunk, request.start(chunk))
        return timed(lambda: request.images(request.start(chunk), chunk, "uint8"), steps)

    def _one_state(self, image: Any, name: str) -> Float32:
        """One image as a state, float32 (1, C, H, W)."""
        states = from_images(image, self.sample_shape, name)
        if len(states) != 1:
            raise ConfigError(f"{name} must be one image; got {len(states)}")
        return states

    def _inversion_steps(self, steps: int | None, spacing: str | Sequence[int]) -> int | None:
        """`steps`, or how many there are unless told otherwise or listed."""
        if steps is None and isinstance(spacing, str):
            return min(INVERSION_STEPS, self.schedule.T)
        return steps

    def _invert(
        self,
        states: Float32,
        steps: int | None,
        callback: Callback | None = None,
        spacing: str | Sequence[int] = "trailing",
        **arguments: Any,
    ) -> Float32:
        """The latents of states at t = 0; float32 (n, C, H, W)."""
        plan = inversion(self.schedule, self._inversion_steps(steps, spacing), spacing)
        network = self._open()
        if arguments.get("batch") is None:
            arguments["batch"] = network.batch(arguments.get("guidance") is not None)
        request = Request.of(
            self.bundle.manifest, None, latents=states, plan=lambda _: plan, seed=0, **arguments
        )
        made = request.made(network, callback)
        return np.concatenate([_last_latents(part, plan, self.schedule) for part in made])

    def _plan_from(
        self, known: Known, sampler: str | None, steps: int | None, options: dict[str, Any]
    ) -> Plan:
        """The plan from where a task begins."""
        arguments = {"sampler": sampler, "steps": steps} | options
        if known.strength == 0.0:
            self.plan(**arguments)  # what cannot work is refused here as well
            return Plan.empty("no steps")
        start = max(1, round(known.strength * self.schedule.T))
        try:
            return self._remembered_plan(start, **arguments)
        except TypeError:  # a list of timesteps cannot be looked up
            return self.bundle.manifest.make_plan(start, **arguments)

    def _open(self) -> Network:
        if os.getpid() != self._pid:
            raise ForkError(
                f"this Generator was loaded in process {self._pid}, this is its forked child "
                f"{os.getpid()}; call Generator.load in the child, or start processes with 'spawn'"
            )
        if self._network is None:
            raise ClosedError("this Generator is closed; load it again")
        return self._network


def open_bundle(
    bundle: Bundle,
    runtime: str = "auto",
    device: str | None = None,
    variant: str | None = None,
    threads: int | None = None,
    cache_dir: str | Path | None = None,
    build: str = "never",
) -> tuple[str, Engine]:
    """The variant's name and its engine; arguments and errors as for `Generator.load`."""
    if build not in BUILD:
        raise ConfigError(f"build must be one of {', '.join(BUILD)}; got {build!r}")
    if build == "missing" and runtime != "tensorrt":
        raise ConfigError(f"build='missing' goes with runtime='tensorrt'; got runtime={runtime!r}")
    name, model = bundle.model(variant)
    try:
        return name, open_engine(model, runtime, device, threads, cache_dir, name)
    except EngineMissingError as error:
        if build != "missing":
            given = {"variant": variant, "device": device, "cache-dir": cache_dir}
            words: list[object] = [] if bundle.path == BUILT_IN else [bundle.path]
            for option, value in given.items():
                words += [] if value is None else [f"--{option}", value]
            line = shlex.join(["ddpm-edge", "build", *map(str, words)])
            raise EngineMissingError(f"{error}; build it on this device: {line}") from error
        log.info("%s", error)
    from ddpm_edge.build import build as build_engine

    report = build_engine(bundle.path, variant=variant, device=device, cache_dir=cache_dir)
    engine = report.open()
    log.info("runtime %s on %s", engine.runtime, engine.device)
    return name, engine


def _last_latents(made: Made, plan: Plan, schedule: Schedule) -> Float32:
    """Where an inversion ended, or would end in one more step from where it was stopped."""
    if made.state is None or made.state.index + 1 == len(plan):
        return np.array(made.x)
    t, end = plan.t[made.state.index], plan.t[-1]
    a = float(schedule.signal[end] / schedule.signal[t])
    eps: Array = made.state.m
    latents: Array = a * made.x + float(schedule.noise[end] - a * schedule.noise[t]) * eps
    return latents


def _ends(values: Any) -> Any:
    """The first and the last of what was given for each sample; what is for all, as it is."""
    return [values[0], values[-1]] if is_many(values) else values
