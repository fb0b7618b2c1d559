"""The directory that is shipped: `bundle.json`, ONNX files, reference answers.

The list of files is closed. Whatever is unknown, missing, changed, linked or of another size is
refused before any parser sees its bytes, because a runtime loads most damaged models without a
word and answers differently. What a listed model may do is limited as well: see `onnx_check`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_edge.errors import BundleError
from ddpm_edge.files import (
    check_writable,
    replace_directory,
    sync_directory,
    temporary_name,
    write_bytes,
)
from ddpm_edge.manifest import (
    FORMAT,
    MANIFEST,
    Manifest,
    digest_of,
    known_keys,
    strict_json,
    typed,
)
from ddpm_edge.onnx_check import check_model

REFERENCE = "reference.npz"
MAX_MANIFEST_BYTES = 4 << 20
MAX_FILE_BYTES = (2 << 30) - 1  # protobuf's own limit
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")
BUILT_IN = Path(__file__).parent / "bundles" / "fashion-mnist"


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
    document["digest"] = digest_of(document)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    temporary.mkdir()
    try:
        for name, data in files.items():
            write_bytes(temporary / name, data)
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
        write_bytes(temporary / MANIFEST, text.encode())
        Bundle.open(temporary)  # what cannot be read must not take a good bundle's place
        replace_directory(temporary, path)
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
    document = strict_json(path, data)
    version = document.get("format")
    if version != FORMAT:
        newer = isinstance(version, int) and version > FORMAT
        remedy = "pip install --upgrade ddpm-edge" if newer else "export the model again"
        raise BundleError(
            f"{path} has bundle format {version!r}, this ddpm-edge reads {FORMAT}; {remedy}"
        )
    if document.get("digest") != digest_of(document):
        raise BundleError(
            f"{path} was changed since the export (its digest does not fit); copy the bundle again"
        )
    return document


def _check_files(directory: Path, document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The list of files, once it is the same as what is in the directory."""
    try:
        files = {
            name: {"size": typed(entry["size"], int), "sha256": typed(entry["sha256"], str)}
            for name, entry in typed(document.get("files"), dict).items()
        }
        for name, entry in document["files"].items():
            _check_name(directory, name)
            known_keys(f"files.{name}.", entry, ["size", "sha256"])
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
