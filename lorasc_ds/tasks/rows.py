"""Rows of public data sets: from the hub, or from local files in the form of their original release."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from lorasc_ds.errors import DataError

SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can escape and no tokenizer can read


@dataclass(frozen=True, slots=True)
class Row:
    """An object with named fields.

    Every method raises DataError, with the row's name, where a field is missing or of another kind.

    Args:
        id: where the row stands, `FILE:LINE` or `DATASET/SPLIT:NUMBER` counted from 1, then the place in it.
    """

    id: str
    fields: Mapping[str, Any]

    def text(self, key: str) -> str:
        value = self.fields.get(key)
        return value if is_text(value) else self.refuse(key, "a text without lone surrogates")

    def integer(self, key: str) -> int:
        value = self.fields.get(key)
        return value if type(value) is int else self.refuse(key, "a whole number")

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of at least one text."""
        value = self.fields.get(key)
        if not isinstance(value, list) or not value or not all(map(is_text, value)):
            return self.refuse(key, "a list of one or more texts")
        return tuple(value)

    def choice(self, key: str, names: Sequence[str]) -> int:
        """The index of the value, which is one of the names, a Boolean named `False` or `True`, or the index itself."""
        value = self.fields.get(key)
        if isinstance(value, (str, bool)) and str(value) in names:
            return names.index(str(value))
        number = int(value) if isinstance(value, str) and value.isdecimal() else value
        if type(number) is int and 0 <= number < len(names):
            return number
        return self.refuse(key, f"one of {', '.join(names)}, or its index from 0")

    def row(self, key: str) -> Row:
        """The object in a field."""
        value = self.fields.get(key)
        return Row(f"{self.id}.{key}", value) if isinstance(value, Mapping) else self.refuse(key, "an object")

    def rows(self, key: str) -> list[Row]:
        """The objects of the list in a field."""
        value = self.fields.get(key)
        if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
            return self.refuse(key, "a list of objects")
        return [Row(f"{self.id}.{key}[{at}]", one) for at, one in enumerate(value)]

    def refuse(self, key: str, needed: str) -> Any:
        value = short(repr(self.fields[key])) if key in self.fields else f"none; it has {short(', '.join(self.fields))}"
        raise DataError(f"{self.id}: the row needs field {key!r}, {needed}, got {value}")


def is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and SURROGATE.search(value) is None


def short(text: str, length: int = 200) -> str:
    """One line of at most `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 3]}..."


def read_file(path: Path, key: str) -> str:
    """A file as text, unpacked where its name ends in `.gz`.

    Args:
        key: the setting that names the file, for errors.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix.lower() == ".gz" else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{key} {path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{key} {path}: not a whole gzip file ({error}); download it again") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{key} {str(path)!r}: {reason}; give the path of a readable file") from error


def parse_json(text: str, path: Path, line: int = 1) -> Any:
    """
    Args:
        line: of the file, at which `text` begins.

    Raises:
        DataError: with `FILE:LINE`.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{line + error.lineno - 1}"
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno}); mend the file") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{line}: not JSON ({error}); mend the file") from error


def read_json(path: Path, key: str) -> Any:
    """The value in a `.json` or `.json.gz` file.

    Raises:
        DataError: the file cannot be read or is not JSON.
    """
    return parse_json(read_file(path, key), path)


def read_table(path: Path, key: str) -> list[tuple[str, list[str]]]:
    """The lines of a `.csv` or `.tsv` file, a heading among them: `FILE:LINE` and the cells.

    In a `.tsv` a quotation mark is a character like any other, as in the release of GLUE.

    Raises:
        DataError: the file cannot be read, or a quotation in it is not closed.
    """
    text = io.StringIO(read_file(path, key), newline="")
    if ".tsv" in (suffix.lower() for suffix in path.suffixes):
        reader = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(text, strict=True)
    table, line = [], 1
    try:
        for cells in reader:
            if cells:
                table.append((f"{path}:{line}", cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not a row of a table ({error}); mend the file") from error
    return table


def titled(table: Sequence[tuple[str, list[str]]]) -> list[Row]:
    """The rows of a table under its heading, which is the first."""
    (_, names), *rest = table
    for where, cells in rest:
        if len(cells) != len(names):
            raise DataError(f"{where}: {len(cells)} cells, but the heading has {len(names)}; mend the row")
    return [Row(where, dict(zip(names, cells, strict=True))) for where, cells in rest]


def object_row(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: an object with named fields is needed, got {short(repr(value))}")
    return Row(where, value)


SPACE = re.compile(r"[ \t\r\n,:]*")  # between the parts of JSON


def members(text: str, at: int = 0, line: int = 1) -> dict[str | int, tuple[int, int]]:
    """Where each value of a list or object begins, by its index or key: the place in the text, and the line.

    Args:
        text: of valid JSON.
        at, line: where the list or object begins; space may be before it.
    """

    def after_space(at: int) -> int:
        found = SPACE.match(text, at)
        return found.end() if found else at

    counted, begin, decoder = at, after_space(at), json.JSONDecoder()
    at, named = after_space(begin + 1), text[begin] == "{"
    places: dict[str | int, tuple[int, int]] = {}
    while text[at] not in "]}":
        name: str | int = len(places)
        if named:
            name, at = decoder.raw_decode(text, at)
            at = after_space(at)
        line += text.count("\n", counted, at)
        counted, places[name] = at, (at, line)
        at = after_space(decoder.raw_decode(text, at)[1])
    return places


def read_list(path: Path, key: str) -> list[Row]:
    """The objects of a list in a `.json` file, each with the line at which it begins."""
    text = read_file(path, key)
    values = parse_json(text, path)
    if not isinstance(values, list):
        raise DataError(f"{path}:1: a list of rows is needed, got {short(repr(values), 80)}")
    return [object_row(f"{path}:{line}", one) for one, (_, line) in zip(values, members(text).values(), strict=True)]


def read_under(path: Path, key: str, name: str | None = None) -> list[Row]:
    """The objects in the list under a name of the object in a `.json` file, each with the line at which it begins.

    Args:
        key: the setting that names the file, for errors.
        name: None: the object's own values, which are objects.

    Raises:
        DataError: the file cannot be read, or is of another form.
    """
    text = read_file(path, key)
    top = object_row(f"{path}:1", parse_json(text, path))
    rows = [top.row(one) for one in top.fields] if name is None else top.rows(name)
    places = members(text)
    if name is not None:
        places = members(text, *places[name])
    lines = [line for _, line in places.values()]
    return [
        Row(f"{path}:{line}{row.id.removeprefix(top.id)}", row.fields) for line, row in zip(lines, rows, strict=True)
    ]


def read_rows(path: Path, key: str) -> list[Row]:
    """The rows of a `.jsonl`, `.json` (a list), `.csv` or `.tsv` (with a heading) file, or of its `.gz`.

    Args:
        key: the setting that names the file, for errors.

    Raises:
        DataError: with `FILE:LINE` where a row is not an object, or the file cannot be read or has no row.
    """
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".csv", ".tsv")):
        table = read_table(path, key)
        rows = titled(table) if table else []
    elif name.endswith(".json"):
        rows = read_list(path, key)
    elif name.endswith(".jsonl"):
        lines = enumerate(read_file(path, key).split("\n"), start=1)
        rows = [
            object_row(f"{path}:{number}", parse_json(line, path, number)) for number, line in lines if line.strip()
        ]
    else:
        raise DataError(f"{key} {path}: a file that ends in .jsonl, .json, .csv or .tsv, or one of them and .gz")
    if not rows:
        raise DataError(f"{key} {path} has no row: give a file with rows")
    return rows


ADVICE = {  # what the hub's message holds -> what to do
    "gated": "accept its terms at https://huggingface.co/datasets/{dataset} and log in with `hf auth login`",
    "Offline": "HF_HUB_OFFLINE is set and the data set is not in the cache: unset it where there is network",
    "Couldn't reach": "the hub cannot be reached: try again with network",
    "Unknown split": "set task.revision to one that has split {split}",
    "BuilderConfig": "set task.revision to one that has configuration {config}",
    "scripts are no longer supported": "set task.revision to refs/convert/parquet",
    "doesn't exist": "check task.revision, and log in with `hf auth login` if it is private",
}


def hub_split(dataset: str, config: str | None, split: str, revision: str | None) -> Any:
    """A split of a data set on the hub, a `datasets.Dataset`.

    Raises:
        DataError: it cannot be had, for whatever reason; in one line with what to do.
    """
    import datasets

    try:
        return datasets.load_dataset(dataset, config, split=split, revision=revision)
    except Exception as error:  # of many libraries, and none of them says which it raises
        found = [advice for part, advice in ADVICE.items() if part in f"{error}"]
        advice = found[0].format(dataset=dataset, config=config, split=split) if found else "try again"
        raise DataError(
            f"split {split} of {dataset} cannot be had from the hub ({type(error).__name__}: {short(str(error))}):"
            f" {advice}, or set task.data_dir to a folder with the files of its original release"
        ) from error


def hub_rows(dataset: str, config: str | None, split: str, revision: str | None) -> list[Row]:
    """All rows of a split of a data set on the hub, in their order.

    Raises:
        DataError: it cannot be had.
    """
    rows = hub_split(dataset, config, split, revision)
    name = "/".join(part for part in (dataset, config, split) if part)
    return [Row(f"{name}:{number}", dict(row)) for number, row in enumerate(rows, start=1)]


def local_file(data_dir: str, names: Sequence[str]) -> Path:
    """The first of the files, or of the same with `.gz`, that is in the folder.

    Args:
        names: paths from the folder.

    Raises:
        DataError: none is there.
    """
    for name in names:
        for path in (Path(data_dir, name), Path(data_dir, f"{name}.gz")):
            if path.is_file():
                return path
    raise DataError(
        f"task.data_dir {data_dir!r} has none of {', '.join(names)} (nor one of them with .gz): give the folder that"
        " holds the files of the original release, or leave task.data_dir out to read from the hub"
    )
