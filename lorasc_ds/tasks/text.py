"""Task `text`: causal language modelling on local `.txt` and `.jsonl` files; perplexity on held-out parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lorasc_ds.errors import DataError
from lorasc_ds.task_config import files_of
from lorasc_ds.tasks.base import Example, Task
from lorasc_ds.tasks.streams import Stream, find_rows

HELD_OUT = 0.1  # of train_file, at its end, where no eval_file is given
FILES = {"dev": "task.eval_file", "test": "task.test_file"}


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


def hold_out(documents: list[Example], share: float, instead: str) -> tuple[list[Example], list[Example]]:
    """Cut off the last share: whole documents, or the end of the only one, at a line or word break.

    Args:
        instead: the setting that makes it needless, for the error.

    Raises:
        DataError: there is nothing to cut.
    """
    if len(documents) > 1:
        kept = kept_of(len(documents), share)
        return documents[:kept], documents[kept:]
    whole = documents[0]
    text = whole.texts[0]
    cut = round((1 - share) * len(text))
    breaks = [text.rfind(mark, 1, cut) for mark in ("\n", " ")]
    cut = next((at + 1 for at in breaks if at > 0), 0)
    if not text[:cut].strip() or not text[cut:].strip():
        raise DataError(f"{whole.id} is too short to hold a part out: give {instead}")
    return [document(whole.id, text[:cut], whole.group)], [document(f"{whole.id} (end)", text[cut:], whole.group)]


def streamed(
    files: Sequence[str], groups: Sequence[str], text_field: str, shares: Mapping[str, float]
) -> dict[str, Sequence[Example]]:
    """Train documents that are read when they are asked for, and those that are held out, in memory.

    Raises:
        DataError: a file cannot be read, or has no document to hold out.
    """
    rows = [find_rows(Path(file), "task.train_file") for file in files]
    whole = Stream(rows, groups, partial(document_of, text_field=text_field))
    places: dict[str, list[np.ndarray]] = {split: [] for split in ("train", *shares)}
    for start, of_file in zip(whole.starts, rows, strict=False):
        kept = len(of_file)
        for split, share in shares.items():
            if kept == 1:
                raise DataError(
                    f"{of_file.path} has too few documents to hold one out, {len(of_file)}: give {FILES[split]}"
                )
            end, kept = kept, kept_of(kept, share)
            places[split].append(start + np.arange(kept, end))
        places["train"].append(start + np.arange(kept))
    found = {split: whole.only(np.concatenate(of_files)) for split, of_files in places.items()}
    return {split: stream if split == "train" else list(stream) for split, stream in found.items()}


def in_memory(
    files: Sequence[str], groups: Sequence[str], text_field: str, shares: Mapping[str, float]
) -> dict[str, Sequence[Example]]:
    """Train documents, and those that are held out.

    Raises:
        DataError: a file or a row of it cannot be used, or there is nothing to hold out.
    """
    found: dict[str, list[Example]] = {split: [] for split in ("train", *shares)}
    for file, group in zip(files, groups, strict=True):
        documents = read_documents(Path(file), "task.train_file", text_field, group)
        for split, share in shares.items():
            documents, held_out = hold_out(documents, share, FILES[split])
            found[split] += held_out
        found["train"] += documents
    return dict(found)


def kept_of(documents: int, share: float) -> int:
    """How many of several documents stay, where the last share is held out."""
    return max(1, documents - max(1, round(share * documents)))


def text(
    *,
    train_file: str | tuple[str, ...],
    eval_file: str | None,
    test_file: str | None,
    test_share: float | None,
    weights: tuple[float, ...] | None,
    text_field: str,
    streaming: bool,
) -> Task:
    """Local files as a task. Splits: `train`, `dev` and, with `test_file` or `test_share`, `test`.

    What is held out is the end of each file, of what is left then dev the end. Each of several files is a group, called
    by its path.

    Raises:
        DataError: a file or a row of it cannot be used.
    """
    files = files_of(train_file)
    groups = files if len(files) > 1 else ("",)
    shares = {} if test_share is None else {"test": test_share}
    shares |= {} if eval_file is not None else {"dev": HELD_OUT}
    splits = (streamed if streaming else in_memory)(files, groups, text_field, shares)
    for split, file in (("dev", eval_file), ("test", test_file)):
        if file is not None:
            splits[split] = read_documents(Path(file), FILES[split], text_field)
    return Task(
        name="text",
        kind="documents",
        loss="lm",
        splits={split: splits[split] for split in ("train", "dev", "test") if split in splits},
        headline="perplexity",
        weights=None if weights is None else dict(zip(groups, weights, strict=True)),
    )
