"""Task `text`: causal language modelling on local `.txt` and `.jsonl` files; perplexity on a held-out part."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lorasc_ds.errors import DataError
from lorasc_ds.task_config import files_of
from lorasc_ds.tasks.base import Example, Task
from lorasc_ds.tasks.streams import Stream, find_rows

HELD_OUT = 0.1  # of train_file, at its end, where no eval_file is given


def read_text(path: Path, key: str) -> str:
    """A whole file as UTF-8.

    Raises:
        DataError: it is missing, unreadable, not UTF-8 or empty.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{key} {path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{key} {str(path)!r}: {reason}; give the path of a .txt or .jsonl file") from error
    if not text.strip():
        raise DataError(f"{key} {path} is empty; text is needed")
    return text


def read_documents(path: Path, key: str, text_field: str, group: str = "") -> list[Example]:
    """The documents of a file: the whole of a .txt, one a row of a .jsonl.

    Raises:
        DataError: with `file:line` where a row is not JSON, or its field is missing, no text or empty.
    """
    text = read_text(path, key)
    if path.suffix.lower() == ".txt":
        return [document(f"{path}", text, group)]
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        documents.append(document_of(path, number, line, group, text_field=text_field))
    return documents


def document_of(path: Path, number: int, line: str, group: str, *, text_field: str) -> Example:
    """The document of a row, which is line `number` of a .jsonl.

    Raises:
        DataError: with `file:line`.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        where = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise DataError(f"{path}:{number}: not JSON ({where}); mend the row") from error
    value = row.get(text_field) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip() or any("\ud800" <= c <= "\udfff" for c in value):
        raise DataError(
            f"{path}:{number}: task.text_field {text_field!r} needs to be a text that is not empty, without lone"
            f" surrogates, got {value!r}"
        )
    return document(f"{path}:{number}", value, group)


def document(id: str, text: str, group: str = "") -> Example:
    return Example(id, prompt="", texts=(text,), group=group)


def hold_out(documents: list[Example]) -> tuple[list[Example], list[Example]]:
    """Cut off the last tenth: whole documents, or the end of the only one, at a line or word break.

    Raises:
        DataError: there is nothing to cut.
    """
    if len(documents) > 1:
        kept = kept_of(len(documents))
        return documents[:kept], documents[kept:]
    whole = documents[0]
    text = whole.texts[0]
    cut = round((1 - HELD_OUT) * len(text))
    breaks = [text.rfind(mark, 1, cut) for mark in ("\n", " ")]
    cut = next((at + 1 for at in breaks if at > 0), 0)
    if not text[:cut].strip() or not text[cut:].strip():
        raise DataError(f"{whole.id} is too short to hold a part out: give task.eval_file")
    return [document(whole.id, text[:cut], whole.group)], [document(f"{whole.id} (end)", text[cut:], whole.group)]


def streamed(
    files: Sequence[str], groups: Sequence[str], text_field: str, *, holds_out: bool
) -> tuple[Stream, list[Example]]:
    """Train documents that are read when they are asked for, and those that are held out, in memory.

    Raises:
        DataError: a file cannot be read, or has no document to hold out.
    """
    rows = [find_rows(Path(file), "task.train_file") for file in files]
    whole = Stream(rows, groups, partial(document_of, text_field=text_field))
    if not holds_out:
        return whole, []
    for of_file in rows:
        if len(of_file) == 1:
            raise DataError(f"{of_file.path} has one document, none to hold out: give task.eval_file")
    ends = [int(start) + kept_of(len(of_file)) for start, of_file in zip(whole.starts, rows, strict=False)]
    kept = np.concatenate([np.arange(start, end) for start, end in zip(whole.starts, ends, strict=False)])
    held_out = np.setdiff1d(np.arange(len(whole)), kept)
    return whole.only(kept), list(whole.only(held_out))


def kept_of(documents: int) -> int:
    """How many of several documents stay, where the last tenth is held out."""
    return documents - max(1, round(HELD_OUT * documents))


def text(
    *,
    train_file: str | tuple[str, ...],
    eval_file: str | None,
    weights: tuple[float, ...] | None,
    text_field: str,
    streaming: bool,
) -> Task:
    """Local files as a task. Splits: `train` and `dev` (the held-out part, of each file its own).

    Each of several files is a group, called by its path.

    Raises:
        DataError: a file or a row of it cannot be used.
    """
    files = files_of(train_file)
    groups = files if len(files) > 1 else ("",)
    train: Sequence[Example]
    if streaming:
        train, dev = streamed(files, groups, text_field, holds_out=eval_file is None)
    else:
        read = [read_documents(Path(f), "task.train_file", text_field, g) for f, g in zip(files, groups, strict=True)]
        parts = [hold_out(documents) if eval_file is None else (documents, []) for documents in read]
        train, dev = ([one for part in parts for one in part[at]] for at in (0, 1))
    if eval_file is not None:
        dev = read_documents(Path(eval_file), "task.eval_file", text_field)
    return Task(
        name="text",
        kind="documents",
        loss="lm",
        splits={"train": train, "dev": dev},
        headline="perplexity",
        weights=None if weights is None else dict(zip(groups, weights, strict=True)),
    )
