"""The directory that is shipped: `bundle.json`, ONNX files, reference answers.

The list of files is closed. Whatever is unknown, missing, changed, linked or of another size is
refused before any parser sees its bytes, because a runtime loads most damaged models without a
word and answers differently. What a listed model may do is limited as well: see `onnx_check`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ddpm_edge import checks, noise
from ddpm_edge.errors import BundleError, ConfigError
from ddpm_edge.files import check_writable, sync_directory, temporary_name, write_bytes
from ddpm_edge.plan import PREDICTIONS, Plan
from ddpm_edge.samplers import make_plan
from ddpm_edge.schedule import Schedule

FORMAT = 1
MANIFEST = "bundle.json"
REFERENCE = "reference.npz"
MAX_MANIFEST_BYTES = 4 << 20
MAX_FILE_BYTES = (2 << 30) - 1  # protobuf's own limit
MAX_TIMESTEPS = 100_000  # a longer schedule is refused before its arrays are made
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")
BUILT_IN = Path(__file__).parent / "bundles" / "fashion-mnist"


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of its model.

    Attributes:
        name: of the model.
        sample_shape: (C, H, W) of one sample; values in [-1, 1].
        schedule: the forward process it was trained with.
        prediction: what the network answers, "eps", "x0" or "v".
        timestep_offset: the network is fed t + offset, t in 1..T, as int64.
        class_names: one a label; empty = the model takes no label. The null label is their number.
        plan: arguments of the default plan: "sampler", "steps" and the sampler's options.
        variants: precision -> {"file": name, ...figures of its parity gate}.
        training: how the weights came to be.
        licence: SPDX name for the weights.
    """

    name: str
    sample_shape: tuple[int, int, int]
    schedule: Schedule
    prediction: str
    timestep_offset: int
    class_names: tuple[str, ...]
    plan: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]]
    training: Mapping[str, Any] = field(default_factory=dict)
    licence: str = ""

    @property
    def null_label(self) -> int | None:
        """The label that means "none", where the model has labels."""
        return len(self.class_names) or None

    def properties(self) -> dict[str, str]:
        """What an ONNX file repeats in its `metadata_props`, so that it explains itself alone."""
        return {
            "sample_shape": json.dumps(self.sample_shape),
            "schedule": json.dumps(self.schedule.to_dict()),
            "prediction": self.prediction,
            "timestep_offset": str(self.timestep_offset),
        }

    def make_plan(
        self, sampler: str | None = None, steps: int | None = None, **options: Any
    ) -> Plan:
        """The default plan, or what the arguments make of it (see `Generator.plan`)."""
        arguments = dict(self.plan)
        default = str(arguments.pop("sampler", None))
        if sampler not in (None, default):  # another sampler has its own defaults, but for clip
            arguments = {k: v for k, v in arguments.items() if k == "clip"}
        arguments |= options if steps is None else {**options, "steps": steps}
        return make_plan(self.schedule, sampler or default, **arguments)

    def to_dict(self) -> dict[str, Any]:
        """The JSON of bundle.json, without files and digest."""
        return {
            "format": FORMAT,
            "name": self.name,
            "sample_shape": list(self.sample_shape),
            "value_range": [-1.0, 1.0],
            "schedule": self.schedule.to_dict(),
            "prediction": self.prediction,
            "timestep": {"offset": self.timestep_offset, "dtype": "int64"},
            "class_names": list(self.class_names),
            "null_label": self.null_label,
            "noise_version": noise.VERSION,
            "plan": dict(self.plan),
            "variants": {name: dict(variant) for name, variant in self.variants.items()},
            "training": dict(self.training),
            "licence": self.licence,
        }

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Manifest:
        """The inverse of `to_dict`.

        Raises:
            BundleError: a field is missing, of another type, or not understood.
        """
        try:
            definition = _typed(document["schedule"], dict)
            if _typed(definition.get("T", 0), int) > MAX_TIMESTEPS:
                raise BundleError(
                    f"{MANIFEST} says T = {definition['T']}; expected at most {MAX_TIMESTEPS} "
                    "timesteps: export the model again"
                )
            shape: Any = tuple(_typed(size, int) for size in _typed(document["sample_shape"], list))
            manifest = cls(
                name=_typed(document["name"], str),
                sample_shape=shape,
                schedule=Schedule.from_dict(definition),
                prediction=_typed(document["prediction"], str),
                timestep_offset=_typed(document["timestep"]["offset"], int),
                class_names=tuple(
                    _typed(name, str) for name in _typed(document["class_names"], list)
                ),
                plan=_typed(document["plan"], dict),
                variants={
                    name: {**_typed(variant, dict), "file": _typed(variant["file"], str)}
                    for name, variant in _typed(document["variants"], dict).items()
                },
                training=_typed(document["training"], dict),
                licence=_typed(document["licence"], str),
            )
            expected = {
                "value_range": (document["value_range"], [-1.0, 1.0]),
                "timestep.dtype": (document["timestep"]["dtype"], "int64"),
                "null_label": (document["null_label"], manifest.null_label),
                "noise_version": (document["noise_version"], noise.VERSION),
            }
            understood = manifest.to_dict()
            _known_keys("", document, [*understood, "files", "digest"])
            _known_keys("timestep.", document["timestep"], understood["timestep"])
            for name, variant in document["variants"].items():
                _known_keys(f"variants.{name}.", variant, ["file", "parity"])
                for what, figure in _typed(variant.get("parity", {}), dict).items():
                    where = f"variants.{name}.parity.{what}"
                    _known_keys(f"{where}.", figure, ["max_abs_error", "tolerance"])
                    for key in ("max_abs_error", "tolerance"):
                        checks.number(f"{where}.{key}", figure[key])
            manifest.make_plan()  # found now, not at the first image
        except KeyError as error:
            raise BundleError(f"{MANIFEST} has no field {error}; export the model again") from error
        except (TypeError, ConfigError) as error:
            raise BundleError(f"{MANIFEST} is not valid: {error}; export it again") from error
        for name, (got, want) in expected.items():
            if got != want:
                raise BundleError(f"{MANIFEST} says {name} = {got!r}; this version knows {want!r}")
        if len(shape) != 3 or min(shape) < 1 or manifest.prediction not in PREDICTIONS:
            raise BundleError(
                f"{MANIFEST}: sample_shape {shape} or prediction {manifest.prediction!r} is not "
                f"valid; expected (C, H, W) and one of {', '.join(PREDICTIONS)}"
            )
        if not manifest.variants:
            raise BundleError(f"{MANIFEST} lists no variants; export the model again")
        return manifest


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose list of files has been checked.

    Attributes:
        path: its directory.
        manifest: what it says.
        files: size in bytes and SHA-256 of every file but the manifest.
        digest: SHA-256 of the manifest: names the bundle.
    """

    path: Path
    manifest: Manifest
    files: Mapping[str, Mapping[str, Any]]
    digest: str

    @classmethod
    def open(cls, path: str | Path | None = None) -> Bundle:
        """Open a bundle, or the built-in one.

        Raises:
            BundleError: not a bundle, of a newer format, or its files are not the ones it lists.
        """
        directory = BUILT_IN if path is None else Path(path)
        document = _read_manifest(directory)
        files = _check_files(directory, document)
        manifest = Manifest.from_dict(document)
        for name, variant in manifest.variants.items():
            if variant["file"] not in files:
                raise BundleError(f"{directory}: variant {name!r} has no file in the list of files")
        return cls(directory, manifest, files, document["digest"])

    def read(self, name: str) -> bytes:
        """The bytes of one of its files, checked against size and SHA-256.

        Raises:
            BundleError: the file was changed since the export.
        """
        entry = self.files[name]
        with open(self.path / name, "rb") as file:
            data = file.read(entry["size"] + 1)
        if len(data) != entry["size"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise BundleError(
                f"{self.path / name} was changed or damaged since the export (its SHA-256 is not "
                "the one in bundle.json); copy the bundle again"
            )
        return data

    def check(self) -> None:
        """Read every file once.

        Raises:
            BundleError: one was changed since the export.
        """
        for name in self.files:
            self.read(name)

    def model(self, variant: str | None = None) -> tuple[str, bytes]:
        """Name and ONNX bytes of a variant; None = fp32, or the only one there is.

        Raises:
            BundleError: no such variant, or a model that is no plain network of the manifest's
                shapes.
        """
        from ddpm_edge.onnx_check import check_model

        variants = self.manifest.variants
        name = variant or ("fp32" if "fp32" in variants else next(iter(variants)))
        if name not in variants:
            raise BundleError(
                f"{self.path} has no variant {name!r}; its variants are {', '.join(variants)}"
            )
        file = variants[name]["file"]
        data = self.read(file)
        try:
            check_model(data, self.manifest)
        except BundleError as error:
            raise BundleError(f"{self.path / file}: {error}") from error
        return name, data


def write_bundle(path: str | Path, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
    """Write a bundle; whoever looks sees the old one or the new one, also after a power cut.

    Args:
        path: a new directory, an empty one, or a bundle that is to be replaced.
        manifest: what the bundle says.
        files: content by file name.

    Raises:
        BundleError: `path` is something else than a bundle, which is then left alone; a file has
            a name that no bundle may hold.
        OSError: it cannot be written.
    """
    path = Path(path)
    check_target(path)
    for name in files:
        _check_name(path, name)
    document = manifest.to_dict() | {
        "files": {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        }
    }
    document["digest"] = _digest(document)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    temporary.mkdir()
    try:
        for name, data in files.items():
            write_bytes(temporary / name, data)
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
        write_bytes(temporary / MANIFEST, text.encode())
        Bundle.open(temporary)  # what cannot be read must not take a good bundle's place
        _replace_directory(temporary, path)
        sync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # the old bundle, or what was half written
    return Bundle.open(path)


def check_target(path: Path) -> None:
    """Refuse a path where a bundle would destroy something else, or cannot be written."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise BundleError(f"{path} is not a directory; a bundle is one: give another path")
    if path.is_dir() and any(path.iterdir()) and not (path / MANIFEST).is_file():
        raise BundleError(
            f"{path} exists and is not a bundle (it has no {MANIFEST}); give another path"
        )
    check_writable(path.parent)


def _replace_directory(new: Path, path: Path) -> None:
    """Put `new` at `path` in one step; what was at `path` is then at `new`."""
    if not path.exists():
        new.rename(path)
        return
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # swap the two names at once
            renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
            here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
            if renameat2(here, os.fsencode(new), here, os.fsencode(path), exchange) == 0:
                return
    # Elsewhere, or where the file system cannot: two renames, the old bundle kept until the end.
    old = new.with_suffix(".old")
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    old.rename(new)


def _read_manifest(directory: Path) -> dict[str, Any]:
    if not directory.exists():
        raise BundleError(f"no bundle at {directory}: no such directory")
    if not directory.is_dir():
        raise BundleError(
            f"{directory} is a file; a bundle is the directory that `ddpm-edge export` wrote"
        )
    path = directory / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{directory} is not a bundle: it has no file {MANIFEST}")
    with open(path, "rb") as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes: not a manifest")
    document = _strict_json(path, data)
    version = document.get("format")
    if version != FORMAT:
        newer = isinstance(version, int) and version > FORMAT
        remedy = "pip install --upgrade ddpm-edge" if newer else "export the model again"
        raise BundleError(
            f"{path} has bundle format {version!r}, this ddpm-edge reads {FORMAT}; {remedy}"
        )
    if document.get("digest") != _digest(document):
        raise BundleError(
            f"{path} was changed since the export (its digest does not fit); copy the bundle again"
        )
    return document


def _strict_json(path: Path, data: bytes) -> dict[str, Any]:
    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    def number(text: str) -> float:
        value = float(text)
        if value in (float("inf"), float("-inf")):
            raise ValueError(f"{text} is out of range")
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"duplicate key {next(k for k in keys if keys.count(k) > 1)!r}")
        return result

    try:
        document = json.loads(
            data, parse_constant=constant, parse_float=number, object_pairs_hook=unique
        )
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON: {error}; copy the bundle again") from error
    if not isinstance(document, dict):
        raise BundleError(f"{path} must hold a JSON object; got {type(document).__name__}")
    return document


def _check_files(directory: Path, document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The list of files, once it is the same as what is in the directory."""
    try:
        files = {
            name: {"size": _typed(entry["size"], int), "sha256": _typed(entry["sha256"], str)}
            for name, entry in _typed(document.get("files"), dict).items()
        }
        for name, entry in document["files"].items():
            _check_name(directory, name)
            _known_keys(f"files.{name}.", entry, ["size", "sha256"])
    except (KeyError, TypeError) as error:
        raise BundleError(f"{directory / MANIFEST}: the list of files is not valid") from error
    there = {entry.name for entry in os.scandir(directory)} - {MANIFEST}
    for name in sorted(there - files.keys()):
        raise BundleError(
            f"{directory} holds {name!r}, which {MANIFEST} does not list; remove it, or copy the "
            "bundle again"
        )
    for name, entry in files.items():
        if entry["size"] > MAX_FILE_BYTES:
            raise BundleError(
                f"{MANIFEST} lists {name!r} with {entry['size']} bytes, more than the "
                f"{MAX_FILE_BYTES} that a file may have; export a smaller network"
            )
        if name not in there:
            raise BundleError(f"{directory} lacks {name!r}; copy the bundle again")
        status = os.lstat(directory / name)
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(
                f"{directory / name} is a link or not a plain file; put the file itself there"
            )
        if status.st_size != entry["size"]:
            raise BundleError(
                f"{directory / name} has {status.st_size} bytes, expected {entry['size']}; copy "
                "the bundle again"
            )
    return files


def _check_name(directory: Path, name: str) -> None:
    if not FILE_NAME.fullmatch(name) or name.lower() == MANIFEST:
        raise BundleError(
            f"{directory}: {name!r} is not a plain file name; expected letters, digits and _ . + -,"
            f" not starting with a dot, and not {MANIFEST}: export the model again"
        )


def _known_keys(where: str, entry: Any, names: Collection[str]) -> None:
    """Refuse a field of the manifest that this version does not understand."""
    for key in _typed(entry, dict):
        if key not in names:
            raise BundleError(
                f"{MANIFEST} has an unknown field {where + key!r}, expected {', '.join(names)}; "
                "pip install --upgrade ddpm-edge, or export the model again"
            )


def _digest(document: dict[str, Any]) -> str:
    content = {key: value for key, value in document.items() if key != "digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"expected {kind.__name__}, got {value!r}")
    return value
