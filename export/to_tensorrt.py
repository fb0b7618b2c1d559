"""A TensorRT engine from a bundle's ONNX file; no torch, no onnx.

Precision is in the file: the network is strongly typed, so the builder computes every tensor in the
type it has there. The engine's bytes are TensorRT's alone, for trtexec and Triton to load.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from ddpm_edge.errors import BuildError
from ddpm_edge.runtimes import cuda
from ddpm_edge.runtimes.cuda import GPU
from ddpm_edge.runtimes.flavour import Flavour
from ddpm_edge.runtimes.interrupt import interruptibly
from ddpm_edge.runtimes.trt import collecting_logger

Progress = Callable[[float, str], None]


class Profile(NamedTuple):
    """Batch sizes of the network that an engine takes, and the one it is fastest for."""

    least: int
    best: int
    most: int

    def __str__(self) -> str:
        return f"{self.least} to {self.most}, fastest at {self.best}"


class BuiltEngine(NamedTuple):
    """What a build gives: the engine, and what the next build need not measure again."""

    engine: bytes
    timing_cache: bytes


def build_engine(
    model: bytes,
    flavour: Flavour,
    profile: Profile,
    *,
    workspace_mb: int | None = None,
    optimization_level: int = 3,
    gpu: GPU | None = None,
    timing_cache: bytes = b"",
    progress: Progress | None = None,
) -> BuiltEngine:
    """Build an engine; Ctrl-C cancels it.

    Args:
        model: an ONNX file, every input's first dimension the batch.
        flavour: what builds.
        profile: batch sizes.
        workspace_mb: the most memory that a layer may use besides its tensors; None = all.
        optimization_level: 0 (a quick build) to 5 (a quick engine).
        gpu: what it is for; None = the current one, or what the flavour builds without any.
        timing_cache: of an earlier build by the same flavour on the same GPU.
        progress: called ten times a second with 0..1 and the phase that runs.

    Raises:
        BuildError: the parser or the builder refuses the model; with the node's name.
    """
    phases = Phases()

    def show() -> None:
        if progress is not None:
            progress(phases.fraction(), phases.current)

    def build() -> BuiltEngine:
        if gpu is not None:
            cuda.use(gpu)
        return _build(
            model, flavour, profile, workspace_mb, optimization_level, timing_cache, phases
        )

    return interruptibly(build, phases.cancel, show)


def _build(
    model: bytes,
    flavour: Flavour,
    batches: Profile,
    workspace_mb: int | None,
    optimization_level: int,
    earlier: bytes,
    phases: Phases,
) -> BuiltEngine:
    trt = flavour.trt
    logger = collecting_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        raise BuildError(f"{flavour} cannot parse the model: {_parser_errors(parser)}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
    own_memory = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
    if own_memory is not None:  # or TensorRT for RTX refuses to be captured in a CUDA graph
        config.set_flag(own_memory)
    config.builder_optimization_level = optimization_level
    if workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mb << 20)
    if flavour.keeps_timings:
        timing_cache = config.create_timing_cache(earlier)
        if timing_cache is None or not config.set_timing_cache(
            timing_cache, False
        ):  # of another GPU
            config.set_timing_cache(config.create_timing_cache(b""), False)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        rest = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, *((size, *rest) for size in batches))
    config.add_optimization_profile(profile)
    monitor = _monitor(trt, phases)  # must outlive the build
    config.progress_monitor = monitor
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise BuildError(
            f"{flavour} cannot build the engine: {logger.said()}; try a "
            "smaller --max-batch, a larger --workspace-mb, or another --variant"
        )
    timings = bytes(config.get_timing_cache().serialize()) if flavour.keeps_timings else b""
    return BuiltEngine(bytes(serialized), timings)


def _parser_errors(parser: Any) -> str:
    """What the ONNX parser refused, the nodes by name."""
    lines = []
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        node = (
            f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_name() else ""
        )
        lines.append(f"{node}{error.desc()}")
    return (
        "; ".join(lines[:3]) + "; compute it from other operators, or run the bundle with "
        "--runtime onnxruntime"
    )


class Phases:
    """The builder's nested phases, as one fraction that only grows; thread-safe.

    Attributes:
        current: the phase that began last.
        cancelled: whether the builder is to stop at its next step.
    """

    def __init__(self) -> None:
        self.current, self.cancelled = "", False
        self._open: dict[str, list[Any]] = {}  # phase: parent, steps, steps that are done
        self._shown = 0.0
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """Ask the builder to stop."""
        self.cancelled = True

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase of so many steps begins, inside a step of its parent."""
        with self._lock:
            self._open[phase] = [parent, max(steps, 1), 0]
            self.current = phase

    def step(self, phase: str, step: int) -> bool:
        """A phase has done its step 0, 1, ...; False = the builder is to stop."""
        with self._lock:
            if phase in self._open:
                self._open[phase][2] = step + 1
        return not self.cancelled

    def finish(self, phase: str) -> None:
        """A phase has ended; from now on it is a step of its parent."""
        with self._lock:
            self._open.pop(phase, None)

    def fraction(self) -> float:
        """How much is done, 0..1."""
        with self._lock:
            roots = [self._part(phase) for phase, (parent, *_) in self._open.items() if not parent]
            self._shown = max(self._shown, *roots, 0.0)
            return self._shown

    def _part(self, phase: str) -> float:
        _, steps, done = self._open[phase]
        inside = sum(self._part(child) for child, (of, *_) in self._open.items() if of == phase)
        return float(min(1.0, (done + min(1.0, inside)) / steps))


def _monitor(trt: Any, phases: Phases) -> Any:
    """TensorRT's own interface to `phases`."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return phases.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()
