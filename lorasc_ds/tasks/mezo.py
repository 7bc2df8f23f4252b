"""What the twelve prompt tasks share: where their rows are, and MeZO's draw of them (protocols 1.1, 1.2)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorasc_ds.errors import DataError
from lorasc_ds.tasks.base import Example
from lorasc_ds.tasks.rows import Row, hub_rows, local_file, read_rows
from lorasc_ds.tasks.sampling import draw_test, draw_training

DATA_DIR = "task.data_dir"  # what errors of a file name
MAX_LENGTH = 2048
BOOLEAN = ("False", "True")

Released = tuple[list[Row], tuple[str, ...]]  # rows with the fields that the hub has, and what is to be said of them


def as_released(path: Path, split: str) -> Released:
    """The rows of a file whose fields are the hub's."""
    return read_rows(path, DATA_DIR), ()


@dataclass(frozen=True, slots=True)
class Source:
    """A public data set.

    Args:
        dataset, config: on the hub.
        train_files, test_files: of the original release, paths from task.data_dir; the first that is there is read.
        read: the rows of such a file, given the split.
        dev_examples: how many MeZO draws for selection.
        test_split: what test is drawn from.
    """

    dataset: str
    config: str | None
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    read: Callable[[Path, str], Released] = as_released
    dev_examples: int = 500
    test_split: str = "validation"


def superglue(config: str, folder: str, read: Callable[[Path, str], Released] = as_released, dev: int = 500) -> Source:
    """A task of SuperGLUE: data_dir is its folder, or the one that holds all; FewGLUE's files are named alike."""
    test_files = (f"{folder}/val.jsonl", "val.jsonl", f"{folder}/dev32.jsonl", "dev32.jsonl")
    return Source("aps/super_glue", config, (f"{folder}/train.jsonl", "train.jsonl"), test_files, read, dev)


@dataclass(frozen=True, slots=True)
class Request:
    """What a run wants of a data set; sizes of None are MeZO's.

    Args:
        splits: those of `train`, `dev` and `test` that are wanted; files of others are not looked for.
        seed: of the draw.
        data_dir: the folder of the original release; None: from the hub, at `revision`.
    """

    splits: Collection[str]
    seed: int
    data_dir: str | None = None
    revision: str | None = None
    train_examples: int | None = None
    dev_examples: int | None = None
    test_examples: int | None = None


@dataclass(frozen=True, slots=True)
class Drawn:
    """The rows of the wanted splits, and what the run says of them."""

    splits: dict[str, list[Row]]
    notes: tuple[str, ...]

    def __or__(self, other: Drawn) -> Drawn:
        return Drawn(self.splits | other.splits, tuple(dict.fromkeys(self.notes + other.notes)))

    def examples(self, example: Callable[[Row], Example]) -> dict[str, Sequence[Example]]:
        return {split: [example(row) for row in rows] for split, rows in self.splits.items()}


def public_split(source: Source, request: Request, split: str) -> tuple[list[Row], str, tuple[str, ...]]:
    """All rows of a split of the public data set, the name of the place they are from, and what is to be said of them.

    Raises:
        DataError: they cannot be had.
    """
    if request.data_dir is None:
        return hub_rows(source.dataset, source.config, split, request.revision), f"the public {split} split", ()
    path = local_file(request.data_dir, source.train_files if split == "train" else source.test_files)
    rows, notes = source.read(path, split)
    return rows, path.name, notes


def rows_to_train(source: Source, request: Request) -> Drawn:
    """`train` and `dev`, where they are wanted.

    Raises:
        DataError: the rows cannot be had, or dev leaves none to train on.
    """
    if not {"train", "dev"} & set(request.splits):
        return Drawn({}, ())
    rows, place, notes = public_split(source, request, "train")
    usual = (1000, source.dev_examples)
    asked = (request.train_examples or usual[0], request.dev_examples or usual[1])
    train, dev = draw_training(len(rows), *asked, request.seed)
    if not train and "train" in request.splits:
        raise DataError(
            f"task.dev_examples {asked[1]} leaves none of the {len(rows)} rows of {place} to train on: lower it"
        )
    note = f"seed {request.seed} draws {len(train)} train and {len(dev)} dev of {len(rows)} rows of {place}"
    if asked != usual:
        note += f"; asked for are {asked[0]} and {asked[1]}, not MeZO's {usual[0]} and {usual[1]}"
    if sum(asked) > len(rows):
        note += f"; there are fewer than {asked[0]} + {asked[1]}, so train shrinks and dev does not"
    drawn = {"train": [rows[at] for at in train], "dev": [rows[at] for at in dev]}
    return Drawn({split: drawn[split] for split in drawn if split in request.splits}, (note, *notes))


def rows_to_test(source: Source, request: Request) -> Drawn:
    """`test`, where it is wanted.

    Raises:
        DataError: the rows cannot be had.
    """
    if "test" not in request.splits:
        return Drawn({}, ())
    rows, place, notes = public_split(source, request, source.test_split)
    drawn = draw_test(len(rows), request.test_examples or 1000, request.seed)
    note = f"test is {len(drawn)} of {len(rows)} rows of {place}"
    return Drawn({"test": [rows[at] for at in drawn]}, (note, *notes))


def draw(source: Source, request: Request) -> Drawn:
    """
    Raises:
        DataError: the rows of a wanted split cannot be had.
    """
    return rows_to_train(source, request) | rows_to_test(source, request)


def question(row: Row, prompt: str, texts: Sequence[str], gold: Sequence[int] = (0,)) -> Example:
    """A prompt with its full texts, of which MeZO strips spaces and nothing else."""
    return Example(row.id, prompt.strip(" "), tuple(text.strip(" ") for text in texts), tuple(gold))


def labelled(row: Row, prompt: str, answers: Sequence[str], label: int) -> Example:
    """A prompt that every answer is put after."""
    return question(row, prompt, [prompt + answer for answer in answers], [label])


def with_fields(row: Row, **fields: object) -> Row:
    return replace(row, fields={**row.fields, **fields})
