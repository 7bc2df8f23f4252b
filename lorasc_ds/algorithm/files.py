"""Files that are either whole or absent, whenever the process dies. Standard library only."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write into that becomes `path` when the block ends, on disk; after an error or a crash, the old one is.

    The file's mode follows the umask.

    Raises:
        OSError: the directory cannot be written, or the disk is full; the old file is untouched.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `path` whole, as `replacing` does."""
    with replacing(path) as file:
        file.write(data)


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def sync_directory(directory: Path) -> None:
    """Make renames inside `directory` durable."""
    sync(directory)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
