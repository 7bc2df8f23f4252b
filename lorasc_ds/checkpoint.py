"""Checkpoints on disk: each is a folder that is whole or absent, in safetensors and JSON, with a manifest.

A folder is written under a temporary name, every file and the folder itself are on disk before it is renamed, and older
ones are removed only then. Its manifest holds size and sha256 of every file, so that a flipped bit is found too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from lorasc_ds.algorithm.files import sha256_of_file, sync_directory
from lorasc_ds.errors import CheckpointError

FORMAT = 1
STATE, TENSORS, MANIFEST = "state.json", "tensors.safetensors", "manifest.json"
TEMPORARY = ".tmp-"
NAME = re.compile(r"step_\d{8}_(training|closing|merged)")  # what a user has put beside is not looked at
SPARE_BYTES = 1 << 20  # of disk, besides the files: for folders, and for what else the run writes


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One that was read and found whole.

    Args:
        state: counters, settings and digests.
        tensors: by name, on the CPU.
    """

    path: Path
    state: dict[str, Any]
    tensors: dict[str, Tensor]


class Checkpoints:
    """Those of a run; one process writes.

    Args:
        directory: `checkpoints/` of the run directory.
        kept: how many stay.
    """

    def __init__(self, directory: Path, kept: int) -> None:
        self.directory = directory
        self.kept = kept

    def names(self) -> list[str]:
        """Of all published checkpoints, whole or damaged, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(path.name for path in self.directory.iterdir() if NAME.fullmatch(path.name))

    def save(self, name: str, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Publish a checkpoint; `name`s sort by age. One that is there and whole stays.

        Raises:
            OSError: the disk is full, or cannot be written; the others are as they were.
        """
        path = self.directory / name
        if path.exists() and problem_of(path) is None:
            return
        files = {STATE: json.dumps(state, indent=1).encode()}
        files[TENSORS] = save({key: tensor.contiguous() for key, tensor in tensors.items()})
        needed = sum(map(len, files.values())) + SPARE_BYTES
        self.directory.mkdir(exist_ok=True)
        self.remove_rests()
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise OSError(f"disk full: a checkpoint needs {size(needed)} in {self.directory}, {size(free)} are free")
        temporary = self.directory / f"{TEMPORARY}{name}"
        try:
            temporary.mkdir()
            for file, data in files.items():
                write_durably(temporary / file, data)
            digests = {
                file: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for file, data in files.items()
            }
            manifest = {"format": FORMAT, "files": digests}
            write_durably(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
            sync_directory(temporary)
            if path.exists():  # damaged, or it would have stayed
                shutil.rmtree(path)
            os.rename(temporary, path)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_directory(self.directory)

    def rotate(self) -> None:
        """Once a new one is published, remove all but the newest; a damaged one does not count."""
        whole = 0
        for name in reversed(self.names()):
            if whole >= self.kept:
                shutil.rmtree(self.directory / name)
            elif problem_of(self.directory / name, digests=False) is None:
                whole += 1

    def remove_rests(self) -> None:
        """What saves that were killed have left."""
        for rest in self.directory.glob(f"{TEMPORARY}*"):
            shutil.rmtree(rest)

    def remove_after(self, name: str) -> None:
        """Those newer than `name`: a run that goes on from an older one leaves them behind."""
        for newer in self.names():
            if newer > name:
                shutil.rmtree(self.directory / newer)

    def newest(self, accept: Callable[[Checkpoint], str | None]) -> tuple[Checkpoint | None, list[str]]:
        """The newest one that is whole and has what it belongs to.

        Args:
            accept: says what is wrong with a whole one, if anything.

        Returns:
            it, or None; and a line for each that was passed over.
        """
        passed = []
        for name in reversed(self.names()):
            path = self.directory / name
            problem = problem_of(path)
            if problem is None:
                checkpoint = read(path)
                problem = accept(checkpoint)
                if problem is None:
                    return checkpoint, passed
            passed.append(f"checkpoint {name} is not used: {problem}")
        return None, passed


def write_durably(path: Path, data: bytes) -> None:
    """Write a file of a folder that nobody looks into yet."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def problem_of(path: Path, digests: bool = True) -> str | None:
    """What is wrong with the folder of a checkpoint, by its manifest; None where it is whole.

    Args:
        digests: False looks at sizes alone.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"{path / MANIFEST} has format {manifest['format']}, and this version reads {FORMAT}"
        files = manifest["files"]
        if files.keys() != {STATE, TENSORS}:
            return f"{path / MANIFEST} lists {', '.join(files)}: {STATE} and {TENSORS} are needed"
        for name, expected in files.items():
            file = path / name
            if not file.is_file():
                return f"{file} is missing"
            if file.stat().st_size != expected["size"]:
                return f"{file} has {file.stat().st_size} bytes, not {expected['size']}"
            if digests and sha256_of_file(file) != expected["sha256"]:
                return f"{file} is not what was written (sha256 differs)"
    except FileNotFoundError:
        return f"{path / MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path / MANIFEST} cannot be read ({type(error).__name__})"
    return None


def read(path: Path) -> Checkpoint:
    """A checkpoint whose files are known to be right."""
    state = json.loads((path / STATE).read_text())
    return Checkpoint(path, state, load_file(path / TENSORS))


def open_checkpoint(path: Path) -> Checkpoint:
    """One that was asked for by name.

    Raises:
        CheckpointError: it is not whole.
    """
    problem = problem_of(path)
    if problem is not None:
        raise CheckpointError(f"--resume {path}: {problem}; give the folder of a whole checkpoint")
    return read(path)


def size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
