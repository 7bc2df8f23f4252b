"""Rows of .jsonl files that stay where they are: what is held is where each begins, some 30 bytes a row."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from lorasc_ds.errors import DataError
from lorasc_ds.tasks.base import Example

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
Parse = Callable[[Path, int, str, str], Example]  # file, line, its text, group


@dataclass(frozen=True, slots=True)
class Rows:
    """The lines of a file that are not blank.

    Args:
        begins: at which byte each begins.
        lines: their numbers, from 1.
        size: bytes of the file.
        sha256: of all of them.
    """

    path: Path
    begins: array[int]
    lines: array[int]
    size: int
    sha256: str

    def __len__(self) -> int:
        return len(self.begins)

    def text(self, row: int) -> str:
        """
        Raises:
            DataError: the row cannot be read, or is not UTF-8.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.begins[row])
                return file.readline().rstrip(b"\r\n").decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}:{self.lines[row]}: not UTF-8; convert the file to UTF-8") from error
        except OSError as error:
            raise DataError(f"{self.path}:{self.lines[row]}: {error.strerror}; give the file back") from error


def find_rows(path: Path, key: str) -> Rows:
    """Look where the rows of a file are, in one pass over its bytes.

    Args:
        key: the setting that names it, for errors.

    Raises:
        DataError: it cannot be read, or has no row.
    """
    begins, lines, digest, at = array("Q"), array("Q"), hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                mark = len(BYTE_ORDER_MARK) if number == 1 and line.startswith(BYTE_ORDER_MARK) else 0
                if line[mark:].strip():
                    begins.append(at + mark)
                    lines.append(number)
                at += len(line)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{key} {str(path)!r}: {reason}; give the path of a .jsonl file") from error
    if not begins:
        raise DataError(f"{key} {path} has no row: give a file with rows")
    return Rows(path, begins, lines, at, digest.hexdigest())


class Stream(Sequence[Example]):
    """Examples that are read when they are asked for.

    Args:
        files: whose rows they are, one file after the other.
        names: of the files' groups.
        parse: makes an example of a row; raises DataError.
        chosen: the numbers of the rows over all files, in their order; None: all.
    """

    def __init__(
        self, files: Sequence[Rows], names: Sequence[str], parse: Parse, chosen: np.ndarray | None = None
    ) -> None:
        self.files = files
        self.names = names
        self.parse = parse
        self.starts = np.cumsum([0, *map(len, files)])
        self.chosen = np.arange(self.starts[-1]) if chosen is None else chosen
        self.of_file = (np.searchsorted(self.starts, self.chosen, side="right") - 1).astype(np.int32)

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...
    def __getitem__(self, at: int | slice) -> Example | list[Example]:
        if isinstance(at, slice):
            return [self[one] for one in range(*at.indices(len(self)))]
        number = int(self.of_file[at])
        rows = self.files[number]
        row = int(self.chosen[at] - self.starts[number])
        return self.parse(rows.path, rows.lines[row], rows.text(row), self.names[number])

    def only(self, positions: Sequence[int] | np.ndarray) -> Stream:
        """Those at these positions, in this order."""
        return Stream(self.files, self.names, self.parse, self.chosen[np.asarray(positions, dtype=np.int64)])

    @property
    def groups(self) -> list[str]:
        return [self.names[int(number)] for number in self.of_file]

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of every row."""
        of_rows = [np.diff(np.array([*rows.begins, rows.size], dtype=np.int64)) for rows in self.files]
        return np.concatenate(of_rows)[self.chosen]

    @property
    def sha256(self) -> str:
        """Of the files and of which of their rows."""
        files = "".join(f"{rows.size} {rows.sha256}\n" for rows in self.files).encode()
        return hashlib.sha256(files + self.chosen.tobytes()).hexdigest()
