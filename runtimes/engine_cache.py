"""TensorRT engines that were built on this device, kept for the next start.

    DIRECTORY/engines/
        0123456789abcdef.plan     an engine, TensorRT's bytes alone; the name is of its key's digest
        0123456789abcdef.json     its side-car: the whole key, size and SHA-256; written last
        0123456789abcdef.lock     held while it is built
        fedcba9876543210.timing   a timing cache, for the next build by the same TensorRT

An engine is native code that this process will run. So what is read must be a plain file of this
user or root, and an engine must be the bytes that its side-car was written for.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from ddpm_edge.errors import CacheWarning, EngineMissingError, warn
from ddpm_edge.files import write_bytes
from ddpm_edge.runtimes.flavour import TITLES

ENVIRONMENT = "DDPM_EDGE_CACHE"
FORMAT = 1
# A file of the cache, or (with the dot) what a killed process left of one.
OURS = re.compile(r"(\.)?([0-9a-f]{16})\.(?:plan|json|lock|timing)(?(1)\.[0-9a-f]{8}\.tmp)")
# A link is not followed, and opening a pipe does not wait for who writes to it.
PLAIN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)

log = logging.getLogger("ddpm_edge")


@dataclass(frozen=True)
class EngineKey:
    """All that an engine depends on; two engines with the same key are interchangeable."""

    model: str  # SHA-256 of the ONNX file
    variant: str  # its precision, "fp32", "fp16", ...
    flavour: str  # "tensorrt" or "tensorrt_rtx"
    version: str  # of the flavour, "10.3.0"
    device: str  # name of the GPU and number of its multiprocessors, "Orin, 16 SMs"
    compute_capability: str  # of the GPU, "8.7"
    profile: tuple[int, int, int]  # least, best and most batch of the network
    flags: Mapping[str, int] = field(hash=False)  # the builder's settings

    def to_dict(self) -> dict[str, Any]:
        """The key as JSON has it."""
        return vars(self) | {"profile": list(self.profile), "flags": dict(self.flags)}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> EngineKey:
        """The inverse of `to_dict`; what had another type there is not equal to it again."""
        fields: dict[str, Any] = {name: str(value) for name, value in document.items()}
        least, best, most = (int(size) for size in document["profile"])
        flags = {name: int(value) for name, value in document["flags"].items()}
        return cls(**fields | {"profile": (least, best, most), "flags": flags})

    def digest(self) -> str:
        """SHA-256 of the key; its first 16 digits name the engine's files."""
        return _sha256(json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":")).encode())

    def differences(self, other: EngineKey, *, exact: bool = True) -> list[tuple[str, str]]:
        """What differs besides the model, in words: this key's, the other's.

        Where not exact, profile and flags do not count.
        """
        pairs = list(zip(self._words(), other._words(), strict=True))
        return [(mine, others) for mine, others in pairs[: None if exact else 3] if mine != others]

    def _words(self) -> tuple[str, ...]:
        return (
            self.variant,
            f"{TITLES.get(self.flavour, self.flavour)} {self.version}",
            f"{self.device} ({self.compute_capability})",
            "profile {}..{}..{}".format(*self.profile),
            ", ".join(f"{name} {self.flags[name]}" for name in sorted(self.flags)) or "no flags",
        )


class Entry(NamedTuple):
    """An engine in the cache."""

    key: EngineKey
    path: Path
    size: int
    sha256: str
    built: str  # UTC, ISO 8601
    seconds: float  # that the build took

    def __str__(self) -> str:
        return f"the engine built on {self.built[:10]}"

    def to_json(self) -> bytes:
        """The side-car. It names no path: that follows from the key."""
        fields = {"format": FORMAT, **self._asdict(), "key": self.key.to_dict()}
        del fields["path"]
        return (json.dumps(fields, indent=2, allow_nan=False) + "\n").encode()


class Built(NamedTuple):
    """An engine; its file, None if it could not be kept; why it was built, unless it was there."""

    engine: bytes
    path: Path | None
    cached: bool
    reason: str


def cache_directory(given: str | Path | None = None) -> Path:
    """The directory given, or that of DDPM_EDGE_CACHE, or the user's own for caches."""
    import platformdirs

    chosen = given or os.environ.get(ENVIRONMENT)
    return Path(chosen) if chosen else platformdirs.user_cache_path("ddpm-edge", appauthor=False)


class EngineCache:
    """The engines in a directory, which is made when the first is kept."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._engines = directory / "engines"

    def entries(self) -> list[Entry]:
        """All engines whose side-cars can be trusted, the newest last."""
        return self._survey()[0]

    def find(self, key: EngineKey) -> tuple[bytes, Entry]:
        """The newest engine, for a program that does not know what it was built with.

        Args:
            key: its profile and flags do not count.

        Raises:
            EngineMissingError: there is none; with the reason.
        """
        return self._select(key, exact=False)

    def get(self, key: EngineKey, build: Callable[[], bytes], *, rebuild: str = "") -> Built:
        """The engine of exactly this key, from the cache or built.

        Of all processes that ask for it at once, one builds and the others wait.

        Args:
            key: of the engine.
            build: makes the engine. What it raises passes through, and nothing stays.
            rebuild: why it is to be built even if it is there.

        Warns:
            CacheWarning: it could not be kept.
        """

        def there() -> Built:
            if rebuild:
                raise EngineMissingError(rebuild)
            engine, entry = self._select(key)
            return Built(engine, entry.path, cached=True, reason="")

        with contextlib.suppress(EngineMissingError):
            return there()
        path = self._path(key)
        with contextlib.ExitStack() as stack:
            try:
                self._make_directories()
                stack.enter_context(self._lock(path.stem))
                for leftover in self._engines.glob(f".{path.stem}.*.tmp"):  # of a killed build
                    leftover.unlink()
            except (OSError, NotImplementedError) as error:
                log.debug("no lock (%s): another process may build the same engine", error)
            try:
                return there()  # another process built it meanwhile
            except EngineMissingError as error:
                reason = str(error)
            start = time.perf_counter()
            engine = build()
            seconds = round(time.perf_counter() - start, 3)
            now = datetime.now(timezone.utc).isoformat(timespec="microseconds")
            entry = Entry(key, path, len(engine), _sha256(engine), now, seconds)
            kept = self.keep(path, engine) and self.keep(_sidecar(path), entry.to_json())
            return Built(engine, path if kept else None, cached=False, reason=reason)

    def clear(self) -> tuple[int, int]:
        """Remove the cache's files and no others; how many engines that were, and bytes.

        What is being built is left alone.
        """
        names = os.listdir(self._engines) if self._engines.is_dir() else []
        engines = size = 0
        for stem in sorted({match[2] for match in map(OURS.fullmatch, names) if match}):
            with contextlib.suppress(TimeoutError), self._lock(stem, wait=False) as lock:
                for path in sorted(self._engines.glob(f"*{stem}.*")):  # a plan after its side-car
                    if OURS.fullmatch(path.name) and path != lock and not path.is_dir():
                        engines += path.suffix == ".plan"
                        size += path.lstat().st_size
                        path.unlink()
                with contextlib.suppress(PermissionError):  # Windows removes it at the release
                    lock.unlink()
        return engines, size

    def timing_path(self, key: EngineKey) -> Path:
        """The timing cache of the key's flavour, version and device."""
        place = json.dumps([key.flavour, key.version, key.device, key.compute_capability])
        return self._engines / f"{_sha256(place.encode())[:16]}.timing"

    def keep(self, path: Path, data: bytes) -> bool:
        """Write a file of the cache, or warn: what was built is not lost for that."""
        try:
            self._make_directories()
            write_bytes(path, data, mode=0o644)
            if _read(path) != data:
                raise OSError(errno.EIO, "it reads back differently")
        except (OSError, EngineMissingError) as error:
            reason = getattr(error, "strerror", None) or error
            warn(
                f"what was built cannot be kept in {self.directory} ({reason}) and will be built "
                f"again; free space, or give another directory by --cache-dir or {ENVIRONMENT}",
                CacheWarning,
            )
            return False
        return True

    def kept(self, path: Path) -> bytes:
        """What `keep` wrote; empty where there is nothing that can be trusted."""
        try:
            return _read(path)
        except EngineMissingError:
            return b""

    def _make_directories(self) -> None:
        self.directory.mkdir(0o700, parents=True, exist_ok=True)
        self._engines.mkdir(0o700, exist_ok=True)

    def _path(self, key: EngineKey) -> Path:
        return self._engines / f"{key.digest()[:16]}.plan"

    @contextlib.contextmanager
    def _lock(self, stem: str, wait: bool = True) -> Iterator[Path]:
        """Hold the lock of an engine, or raise TimeoutError; a killed process holds none."""
        from filelock import FileLock

        path = self._engines / f"{stem}.lock"
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except TimeoutError:
            if not wait:
                raise
            log.info("another process is building it; waiting")
            lock.acquire(poll_interval=0.1)
        try:
            yield path
        finally:
            lock.release()

    def _select(self, key: EngineKey, *, exact: bool = True) -> tuple[bytes, Entry]:
        """The newest engine that will do; EngineMissingError has the most telling reason."""
        entries, refused = self._survey()
        nothing = "no engine of this model was built here"
        reasons = [(99, nothing)]  # how far from what is wanted, and why
        for entry in reversed(entries):
            if entry.key.model != key.model:
                continue
            differences = entry.key.differences(key, exact=exact)
            if differences:
                theirs, ours = (", ".join(side) for side in zip(*differences, strict=True))
                verb = "asked for" if exact else "this is"
                reasons.append((len(differences), f"{entry} is for {theirs}; {verb} {ours}"))
            else:
                try:
                    return _engine(entry), entry
                except EngineMissingError as error:
                    reasons.append((0, str(error)))
        own = _sidecar(self._path(key))
        reasons += [(0, why) if path == own else (98, f"{nothing}; {why}") for path, why in refused]
        raise EngineMissingError(min(reasons, key=lambda reason: reason[0])[1])

    def _survey(self) -> tuple[list[Entry], list[tuple[Path, str]]]:
        """The engines whose side-cars can be trusted, the newest last; why others cannot."""
        entries: list[Entry] = []
        refused: list[tuple[Path, str]] = []
        names: list[str] = []
        try:
            names = sorted(os.listdir(self._engines))
        except FileNotFoundError:
            pass
        except OSError as error:
            refused.append((self._engines, str(error)))
        for path in (self._engines / name for name in names if name.endswith(".json")):
            try:
                entries.append(_entry(path))
            except EngineMissingError as error:
                log.debug("%s", error)
                refused.append((path, str(error)))
        return sorted(entries, key=lambda entry: entry.built), refused


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


def _entry(sidecar: Path) -> Entry:
    """What a side-car says; EngineMissingError says why it cannot be trusted."""
    data = _read(sidecar)
    try:
        said = json.loads(data)
        key, size, seconds = said["key"], int(said["size"]), float(said["seconds"])
        sha256, built = str(said["sha256"]), str(said["built"])
        plan = sidecar.with_suffix(".plan")
        entry = Entry(EngineKey.from_dict(key), plan, size, sha256, built, seconds)
        if entry.to_json() == data and entry.key.digest()[:16] == sidecar.stem:
            return entry
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        log.debug("%s", sidecar, exc_info=True)
    raise EngineMissingError(
        f"{sidecar} is not as this version writes it (damaged, changed or of another version)"
    )


def _engine(entry: Entry) -> bytes:
    """The bytes of an engine; EngineMissingError says why they cannot be trusted."""
    data = _read(entry.path)
    if len(data) != entry.size or _sha256(data) != entry.sha256:
        raise EngineMissingError(
            f"{entry.path}: its SHA-256 is not the one written beside it (damaged or changed)"
        )
    return data


def _read(path: Path) -> bytes:
    """The bytes of a plain file of this user or root; EngineMissingError says why not."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | PLAIN)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise EngineMissingError(f"{path} is not a plain file")
            if hasattr(os, "geteuid") and status.st_uid not in (0, os.geteuid()):
                raise EngineMissingError(f"{path}: it belongs to another user ({status.st_uid})")
            if hasattr(os, "geteuid") and status.st_mode & 0o022:
                raise EngineMissingError(f"{path}: other users may write it")
            return file.read()
    except OSError as error:
        link = error.errno == errno.ELOOP
        raise EngineMissingError(f"{path} is a link" if link else str(error)) from error
