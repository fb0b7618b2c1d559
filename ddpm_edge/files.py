"""Writing files so that a reader sees the old content or the new, never half of either."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of `path` only when the block ends well.

    The data is on disk (fsync) before it becomes visible, so a crash or a power cut leaves the old
    file. When the block raises, `path` is untouched and the temporary file is removed.
    """
    path = Path(path)
    temporary = temporary_name(path)
    # Plain os.open, not tempfile: the file then has the permissions that any new file gets.
    handle = os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode
    )
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say where
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    sync_directory(path.parent)


def write_bytes(path: str | Path, data: bytes, mode: int = 0o666) -> None:
    """Atomically write `data` to `path`, a new file with this mode less the umask."""
    with atomic_write(path, mode) as file:
        file.write(data)


def sync_directory(path: Path) -> None:
    """Make renames inside a directory survive a power cut; a no-op where the OS cannot."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(directory: Path) -> None:
    """Raise PermissionError unless files can be made in `directory`, or it can be made itself.

    Meant for the start of long work; writing may still fail later.
    """
    existing = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"no permission to write in {existing}; give another path")


def temporary_name(path: Path) -> Path:
    """A new hidden name beside `path`, on the same file system."""
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"


def replace_directory(new: Path, path: Path) -> None:
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
