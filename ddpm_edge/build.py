"""Building a bundle's engine on the device it will run on, once: `ddpm-edge build`.

TensorRT only so far. The engine goes to the cache of this device, never into the bundle.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from ddpm_edge import checks, latency
from ddpm_edge.bundle import Bundle
from ddpm_edge.errors import ConfigError, EngineError
from ddpm_edge.export.to_tensorrt import Profile, Progress, build_engine
from ddpm_edge.files import check_writable, write_bytes
from ddpm_edge.manifest import Manifest
from ddpm_edge.runtimes import cuda
from ddpm_edge.runtimes.cuda import GPU
from ddpm_edge.runtimes.engine_cache import Built, EngineCache, cache_directory
from ddpm_edge.runtimes.flavour import Flavour, flavour_for
from ddpm_edge.runtimes.trt import TensorRTEngine, engine_key
from ddpm_edge.sampling import MAX_BATCH

MOST_BATCH = 4096
MOST_WORKSPACE_MB = 1 << 24
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
            flags["workspace_mb"] = checks.whole(
                "workspace_mb", self.workspace_mb, most=MOST_WORKSPACE_MB
            )
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
    flavour: Flavour
    gpu: GPU
    profile: Profile
    seconds: float

    def open(self) -> TensorRTEngine:
        """The engine, ready to run, whether it could be kept or not."""
        return TensorRTEngine(self.built.engine, self.flavour, self.gpu)


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
        EngineError, MemoryError: the new engine does not load.
    """
    start = time.perf_counter()
    options = options or BuildOptions()
    bundle = Bundle.open(path)
    profile, flags = options.profile(bundle.manifest), options.flags()
    directory = cache_directory(cache_dir)
    _check_places(bundle, directory, output)
    name, model = bundle.model(variant)
    gpu = cuda.gpu(device)  # before TensorRT is touched
    flavour = flavour_for(gpu)
    cache, key = EngineCache(directory), engine_key(model, name, flavour, gpu, profile, flags)
    timings = cache.timing_path(key)

    def make() -> bytes:
        log.info("building the %s engine with %s for %s", name, flavour, gpu)
        made = build_engine(
            model,
            flavour,
            profile,
            workspace_mb=options.workspace_mb,
            optimization_level=options.optimization_level,
            gpu=gpu,
            timing_cache=cache.kept(timings),
            progress=progress or log_progress(),
        )
        if made.timing_cache:
            cache.keep(timings, made.timing_cache)
        TensorRTEngine(made.engine, flavour, gpu).close()  # what does not load is not kept
        return made.engine

    built = cache.get(key, make, rebuild="asked for" if rebuild else "")
    if built.cached:
        try:
            TensorRTEngine(built.engine, flavour, gpu).close()
        except EngineError as error:
            built = cache.get(key, make, rebuild=f"the one in the cache does not load ({error})")
    if not built.cached:
        log.info("built the engine: %s", built.reason)
        with contextlib.suppress(OSError):  # those of the engine before
            latency.measured_in(directory).drop(key.model)
    if output is not None:
        write_bytes(output, built.engine)
    return BuildReport(built, name, flavour, gpu, profile, time.perf_counter() - start)


def _check_places(bundle: Bundle, cache: Path, output: str | Path | None) -> None:
    """Refuse what would be found out, or do harm, only after a build of minutes."""
    inside = bundle.path.resolve()
    for path in (cache, *([] if output is None else [Path(output)])):
        if path.resolve().is_relative_to(inside):
            raise ConfigError(
                f"{path} is inside the bundle {bundle.path}, whose list of files is closed; give "
                "another path"
            )
    if output is None:
        return
    folder = Path(output).parent
    if Path(output).is_dir() or not folder.is_dir():
        raise ConfigError(f"cannot write {output}: give a file in a directory that exists")
    check_writable(folder)


def log_progress() -> Progress:
    """Progress as lines in the log, ten seconds apart."""
    said = [time.monotonic()]

    def show(fraction: float, phase: str) -> None:
        if time.monotonic() - said[0] >= LOG_SECONDS:
            said[0] = time.monotonic()
            log.info("building the engine: %.0f %%, %s", 100 * fraction, phase)

    return show
