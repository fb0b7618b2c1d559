"""Building a bundle's engine on the device it will run on, once: `ddpm-edge build`.

TensorRT only so far. The engine goes to the cache of this device, never into the bundle.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ddpm_edge import checks
from ddpm_edge.bundle import Bundle
from ddpm_edge.errors import ConfigError, EngineError
from ddpm_edge.export.to_tensorrt import Profile, Progress, build_engine
from ddpm_edge.files import write_bytes
from ddpm_edge.manifest import Manifest
from ddpm_edge.runtimes import cuda
from ddpm_edge.runtimes.cuda import GPU
from ddpm_edge.runtimes.engine_cache import Built, EngineCache, cache_directory
from ddpm_edge.runtimes.flavour import Flavour, flavour_for
from ddpm_edge.runtimes.trt import TensorRTEngine, engine_key
from ddpm_edge.sampling import MAX_BATCH

MOST_BATCH = 4096
LOG_SECONDS = 10.0

log = logging.getLogger("ddpm_edge")


@dataclass(frozen=True)
class BuildOptions:
    """What an engine is built for.

    Attributes:
        max_batch: the most images in one evaluation; guidance asks about each of them twice.
        best_batch: the batch of the network that it is fastest for.
        workspace_mb: the most memory a layer may use besides its tensors, MiB; None = all.
        optimization_level: 0 (a quick build) to 5 (a quick engine).
    """

    max_batch: int = MAX_BATCH
    best_batch: int = 1
    workspace_mb: int | None = None
    optimization_level: int = 3

    def profile(self, manifest: Manifest) -> Profile:
        """The batches of the network.

        Raises:
            ConfigError: they cannot be.
        """
        images = checks.whole("max_batch", self.max_batch, most=MOST_BATCH)
        most = 2 * images if manifest.class_names and manifest.null_label is not None else images
        return Profile(1, checks.whole("best_batch", self.best_batch, most=most), most)

    def flags(self) -> dict[str, int]:
        """The builder's settings, as the engine's key has them.

        Raises:
            ConfigError: they cannot be.
        """
        level = self.optimization_level
        if isinstance(level, bool) or level not in range(6):
            raise ConfigError(f"optimization_level must be 0 to 5; got {level!r}")
        flags = {"optimization_level": level}
        if self.workspace_mb is not None:
            flags["workspace_mb"] = checks.whole("workspace_mb", self.workspace_mb)
        return flags


@dataclass(frozen=True)
class BuildReport:
    """What `build` did.

    Attributes:
        built: the engine, where it is kept, whether it was there already, and if not, why.
        variant: precision of the network.
        flavour: TensorRT and its version.
        gpu: what it is for.
        profile: batches of the network.
        seconds: that all of it took.
    """

    built: Built
    variant: str
    flavour: str
    gpu: GPU
    profile: Profile
    seconds: float


def build(
    path: str | Path | None = None,
    *,
    variant: str | None = None,
    device: str | None = None,
    cache_dir: str | Path | None = None,
    options: BuildOptions | None = None,
    output: str | Path | None = None,
    rebuild: bool = False,
    progress: Progress | None = None,
) -> BuildReport:
    """Build the TensorRT engine of a bundle for this device, unless it is there.

    Args:
        path: the bundle's directory; None = the built-in model.
        variant: precision of the network; None = fp32.
        device: "cuda" or "cuda:N"; None = the first GPU.
        cache_dir: see `engine_cache.cache_directory`.
        options: batches and the builder's settings.
        output: a file that gets the engine as well, for trtexec or Triton.
        rebuild: build even if it is there.
        progress: called ten times a second with 0..1 and what is being done.

    Raises:
        ConfigError: an option that cannot work; nothing was built then.
        RuntimeUnavailableError: no GPU that works, or no TensorRT.
        BuildError: TensorRT refuses the network.
    """
    start = time.perf_counter()
    options = options or BuildOptions()
    bundle = Bundle.open(path)
    profile = options.profile(bundle.manifest)
    options.flags()
    name, model = bundle.model(variant)
    gpu = cuda.gpu(device)  # before TensorRT is touched
    flavour = flavour_for(gpu)
    cache = EngineCache(cache_directory(cache_dir))
    built = build_stored(
        model, name, profile, options, flavour, gpu, cache, rebuild=rebuild, progress=progress
    )
    if output is not None:
        write_bytes(output, built.engine)
    seconds = time.perf_counter() - start
    return BuildReport(built, name, str(flavour), gpu, profile, seconds)


def build_stored(
    model: bytes,
    variant: str,
    profile: Profile,
    options: BuildOptions,
    flavour: Flavour,
    gpu: GPU,
    cache: EngineCache,
    *,
    rebuild: bool = False,
    progress: Progress | None = None,
) -> Built:
    """The engine of an ONNX file from the cache, or built and kept there; it loads here."""
    key = engine_key(model, variant, flavour, gpu, profile, options.flags())
    timing = cache.timing_path(key)

    def make() -> bytes:
        log.info("building the %s engine with %s for %s", variant, flavour, gpu)
        made = build_engine(
            model,
            flavour,
            profile,
            workspace_mb=options.workspace_mb,
            optimization_level=options.optimization_level,
            gpu=gpu,
            timing_cache=cache.kept(timing),
            progress=progress or log_progress(),
        )
        if made.timing_cache:
            cache.keep(timing, made.timing_cache)
        return made.engine

    built = cache.get(key, make, rebuild="asked for" if rebuild else "")
    try:
        TensorRTEngine(built.engine, flavour, gpu).close()
    except EngineError as error:
        if not built.cached:
            raise
        built = cache.get(key, make, rebuild=f"the one in the cache does not load ({error})")
        TensorRTEngine(built.engine, flavour, gpu).close()
    if not built.cached:
        log.info("built the engine: %s", built.reason)
    return built


def log_progress() -> Progress:
    """Progress as lines in the log, ten seconds apart."""
    said = [time.monotonic()]

    def show(fraction: float, phase: str) -> None:
        if time.monotonic() - said[0] >= LOG_SECONDS:
            said[0] = time.monotonic()
            log.info("building the engine: %.0f %%, %s", 100 * fraction, phase)

    return show


def builder(
    manifest: Manifest, variant: str, cache_dir: str | Path | None
) -> Callable[[bytes, Flavour, GPU], bytes]:
    """What `Generator.load(build="missing")` builds with, by the default options."""
    options = BuildOptions()

    def make(model: bytes, flavour: Flavour, gpu: GPU) -> bytes:
        cache = EngineCache(cache_directory(cache_dir))
        profile = options.profile(manifest)
        return build_stored(model, variant, profile, options, flavour, gpu, cache).engine

    return make
