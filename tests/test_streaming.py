"""Rows read when their step comes: the same examples, batches, runs and continuations as with all of them in memory."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import RECIPE, Command, digest_of_run

from lorasc_ds.cli import parse_command_line
from lorasc_ds.dry_run import report
from lorasc_ds.errors import DataError
from lorasc_ds.preparation import Preparation, prepare
from lorasc_ds.streaming import EncodedBlocks, EncodedRows, EncodedStream
from lorasc_ds.tasks.streams import Rows, find_rows

WORDS = "abcdefghijklm"
INSTRUCTIONS = {"task.name": "instructions", "task.mask_prompt": "true", "training.max_length": 450}
TEXT = {"task.name": "text", "task.block_size": 16}


def document(at: int, seed: int) -> dict[str, Any]:
    draw = random.Random(f"{seed} {at}")
    return {"text": " ".join(draw.choice(WORDS) for _ in range(draw.choice([1, 5, 20, 60])))}


def instruction(at: int, seed: int) -> dict[str, Any]:
    draw = random.Random(f"{seed} {at}")
    output = " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 30)))
    return {"instruction": draw.choice(WORDS), "input": "", "output": output}


def write(path: Path, row: Callable[[int, int], dict[str, Any]], count: int, seed: int = 0) -> Path:
    """Rows with blank lines between them, a byte order mark, and no newline at the end."""
    lines = [json.dumps(row(at, seed)) + ("\n\n" if at % 7 == 3 else "\n") for at in range(count)]
    path.write_text("\ufeff" + "".join(lines).rstrip("\n"), encoding="utf-8")
    return path


def prepared(*names: Path, **settings: Any) -> Preparation:
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    invocation = parse_command_line([f"--task.train_file={','.join(map(str, names))}", *arguments], RECIPE)
    assert not isinstance(invocation, str)
    return prepare(invocation.config)


@pytest.fixture(params=["text", "instructions"])
def case(request: pytest.FixtureRequest, tmp_path: Path, shared_data: Path) -> tuple[list[Path], dict[str, Any]]:
    """Two files of very different sizes, and the settings of their task on a real tokenizer."""
    row = document if request.param == "text" else instruction
    files = [write(tmp_path / "a.jsonl", row, 60), write(tmp_path / "b.jsonl", row, 25, seed=1)]
    settings = TEXT if request.param == "text" else INSTRUCTIONS | {"task.dev_examples": 6}
    return files, settings | {"model.name_or_path": shared_data / "models" / "stories260K"}


@pytest.mark.parametrize(
    "more",
    [{}, {"training.packing": "true"}, {"task.weights": "1,3"}, {"task.test_share": "0.2"}],
    ids=["plain", "packed", "weighted", "with a test"],
)
def test_a_stream_has_the_batches_that_memory_has(
    case: tuple[list[Path], dict[str, Any]], more: dict[str, Any]
) -> None:
    files, settings = case
    memory = prepared(*files, **settings, **more)
    stream = prepared(*files, **settings, **more, **{"task.streaming": "true"})
    assert isinstance(stream.data.examples, EncodedStream)
    assert not isinstance(memory.data.examples, EncodedStream)
    held = list(memory.data.examples)
    held_out = {"dev", "test"} if "task.test_share" in more else {"dev"}
    assert stream.splits.keys() == memory.splits.keys() == held_out | {"train"}
    assert all(stream.splits[split] == memory.splits[split] for split in held_out)
    assert list(stream.data.examples) == held
    assert len(stream.data.examples) == len(held) > 40
    assert stream.data.examples[-1] == held[-1]
    assert stream.data.examples[3:9:2] == held[3:9:2]
    for step in (0, 5, memory.data.steps_per_epoch, 3 * memory.data.steps_per_epoch + 1):
        one, other = memory.data.step(step), stream.data.step(step)
        assert one.ids == other.ids
        assert one.normaliser == other.normaliser
        for ours, theirs in zip(one.micro_batches, other.micro_batches, strict=True):
            assert ours.batch.input_ids.equal(theirs.batch.input_ids)
            assert ours.batch.token_target.equal(theirs.batch.token_target)


def test_one_file_too(tmp_path: Path, shared_data: Path) -> None:
    file = write(tmp_path / "a.jsonl", document, 50)
    settings = TEXT | {"model.name_or_path": shared_data / "models" / "stories260K"}
    stream = prepared(file, **settings, **{"task.streaming": "true"})
    assert list(stream.data.examples) == list(prepared(file, **settings).data.examples)
    blocks = stream.data.examples
    assert isinstance(blocks, EncodedBlocks)
    (source,) = blocks.sources
    read = 0  # reckoned block by block
    for block in range(source.blocks):
        first, end = 16 * block, min(16 * block + 16, int(source.starts[-1]))
        read += sum(
            int(stop - start)
            for start, stop in zip(source.starts[:-1], source.starts[1:], strict=True)
            if start < end and stop > first
        )
    assert source.read_again(16) == read
    told = next(line for line in stream.derived_numbers() if line.startswith("stream"))
    tokens = int(source.starts[-1])
    assert f"45 documents, {tokens} tokens, are read and tokenised when their step comes" in told
    assert f"a block tokenises {read / tokens:.3g} times its tokens; looked at: {min(256, len(blocks))} of" in told


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"training.packing": "true", "training.group_by_length": "true", "task.weights": "1,3"},
    ],
    ids=["plain", "all at once"],
)
def test_stopped_in_the_middle_it_goes_on_to_the_same_bits(
    case: tuple[list[Path], dict[str, Any]],
    more: dict[str, Any],
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Streamed and stopped inside an epoch: the weights of the run that was neither, where lengths are the same."""
    files, settings = case
    settings = settings | more | {"task.train_file": ",".join(map(str, files)), "training.max_steps": 7}
    dropped = {"task.train_examples", "task.dev_examples", "task.test_examples"} - settings.keys()
    monkeypatch.setattr("conftest.RESUMED", {k: v for k, v in RESUMED_TEXT.items() if k not in dropped})
    streamed = settings | {"task.streaming": "true"}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    code, said = command(whole, **streamed)
    assert code == 0, said
    monkeypatch_stop(monkeypatch, 4)
    code, said = command(stopped, **streamed)
    assert code == 75, said
    monkeypatch.undo()
    monkeypatch.setattr("conftest.RESUMED", {k: v for k, v in RESUMED_TEXT.items() if k not in dropped})
    code, said = command(stopped, **streamed)
    assert code == 0, said
    assert "resuming  after step 4" in said
    assert digest_of_run(stopped) == digest_of_run(whole)
    if settings["task.name"] == "text" or not more:  # rows of a stream are grouped by their bytes, not their tokens
        memory = tmp_path / "memory"
        code, said = command(memory, **settings)
        assert code == 0, said
        assert digest_of_run(memory) == digest_of_run(whole)


RESUMED_TEXT: dict[str, Any] = {
    "training.checkpoint_steps": 100,
    "cascade.noise_intensity": 1,
    "cascade.experts": 2,
    "tracking.tensorboard": "false",
    "training.save_model": "false",
}


def monkeypatch_stop(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Asks the next run to stop after so many steps."""
    from lorasc_ds.trainer import Trainer

    training_step = Trainer.training_step

    def step_and_stop(self: Trainer, step: int, learning_rate: float) -> Any:
        if step + 1 == steps:
            self.stopping.found = "the test"
        return training_step(self, step, learning_rate)

    monkeypatch.setattr(Trainer, "training_step", step_and_stop)


def test_a_bad_row_in_the_middle_ends_the_run_and_mended_it_goes_on(
    tmp_path: Path, shared_data: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that no sample has seen; the run goes on as if it had never been bad."""
    good = write(tmp_path / "good.jsonl", instruction, 600)
    settings = INSTRUCTIONS | {
        "model.name_or_path": shared_data / "models" / "stories260K",
        "task.streaming": "true",
        "task.dev_examples": 6,
        "training.max_steps": 40,
        "training.checkpoint_steps": 5,
    }
    preparation = prepared(good, **settings)
    data = preparation.data
    assert isinstance(data.examples, EncodedRows)
    sample = {example.id for example in (*data.examples.sample, *data.examples[:16])}
    step, bad = next((at, id) for at in range(12, 40) for id in data.step(at).ids if id not in sample)
    assert step > 10
    lines = good.read_text(encoding="utf-8-sig").split("\n")
    file, number = tmp_path / "rows.jsonl", int(bad.rsplit(":", 1)[1])
    broken = [*lines[: number - 1], '{"instruction": ', *lines[number:]]
    file.write_text("\n".join(broken), encoding="utf-8")
    monkeypatch.setattr("conftest.RESUMED", RESUMED_TEXT)
    settings = settings | {"task.train_file": file}
    directory = tmp_path / "run"
    code, said = command(directory, **settings)
    assert (code, f"error: {file}:{number}: not JSON (" in said) == (2, True)
    file.write_text("\n".join(lines), encoding="utf-8")
    code, said = command(directory, **settings)
    assert (code, "where training rows were mended, add --resume_override task.train_file" in said) == (2, True)
    code, said = command(directory, "--resume_override=task.train_file", **settings)
    assert code == 0, said
    assert f"resuming  after step {step // 5 * 5}" in said
    code, said = command(tmp_path / "whole", **settings)
    assert code == 0, said
    assert digest_of_run(directory) == digest_of_run(tmp_path / "whole")


def test_a_bad_row_that_is_looked_at_ends_the_run_before_it_begins(tmp_path: Path, shared_data: Path) -> None:
    file = tmp_path / "rows.jsonl"
    settings = {"model.name_or_path": shared_data / "models" / "stories260K", "task.streaming": "true"}
    file.write_text('{"text": "a b c"}\n\n{"text": 3}\n{"text": "d"}\n{"text": "e"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:3: task.text_field 'text' needs to be a text"):
        prepared(file, **TEXT, **settings)
    file.write_bytes(b'{"text": "a b c"}\n{"text": "\xff"}\n{"text": "d"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: not UTF-8"):
        prepared(file, **TEXT, **settings)
    file.write_text("\n \n")
    with pytest.raises(DataError, match=r"task.train_file .*rows.jsonl has no row"):
        prepared(file, **TEXT, **settings)
    file.write_text('{"text": "a b c"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl has too few documents to hold one out, 1: give task.eval_file"):
        prepared(file, **TEXT, **settings)


def test_a_text_that_changes_while_it_is_read_is_noticed(tmp_path: Path, shared_data: Path) -> None:
    file = write(tmp_path / "a.jsonl", document, 50)
    settings = TEXT | {"model.name_or_path": shared_data / "models" / "stories260K", "task.streaming": "true"}
    data = prepared(file, **settings).data
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(" ", "x"), encoding="utf-8")  # as many bytes, other tokens
    with pytest.raises(DataError, match=r"has changed while the run read it|not JSON"):
        list(data.examples)


def test_rows_of_which_the_limit_leaves_nothing_count_nothing(tmp_path: Path, shared_data: Path) -> None:
    """In memory they are left out; a stream cannot know before, so they stand there without a scored token."""
    file = tmp_path / "rows.jsonl"
    rows = [instruction(at, 0) for at in range(40)]
    rows[5]["instruction"] = "a " * 450
    file.write_text("\n".join(map(json.dumps, rows)))
    settings = INSTRUCTIONS | {"model.name_or_path": shared_data / "models" / "stories260K", "task.dev_examples": 2}
    stream = prepared(file, **settings, **{"task.streaming": "true"}).data
    memory = prepared(file, **settings).data
    (empty,) = [example for example in stream.examples if not example.target.scored]
    assert empty.id == f"{file}:6"
    assert [example for example in stream.examples if example is not empty and example.target.scored] == list(
        memory.examples
    )
    batch = stream.collate([empty])
    assert batch.scored_tokens == 0
    assert batch.input_ids.shape == (1, 1)


def test_lengths_of_streamed_rows_are_their_bytes(tmp_path: Path, shared_data: Path) -> None:
    file = write(tmp_path / "a.jsonl", instruction, 80)
    settings = INSTRUCTIONS | {"model.name_or_path": shared_data / "models" / "stories260K", "task.dev_examples": 2}
    data = prepared(file, **settings, **{"task.streaming": "true", "training.group_by_length": "true"}).data
    stream = data.examples
    assert isinstance(stream, EncodedRows)
    lines = {f"{file}:{at}": len(line) for at, line in enumerate(file.read_bytes().splitlines(keepends=True), start=1)}
    for example, size in zip(stream, stream.lengths, strict=True):
        assert abs(lines[example.id] - size) <= 3, "a blank line, the mark"
    assert data.order(0)[0] == stream.lengths.argmax()


def test_before_training_a_stream_is_not_read_whole(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a dry run tells is of a sample, but for the notes on held-out rows."""
    file = write(tmp_path / "a.jsonl", instruction, 1500)
    settings = INSTRUCTIONS | {"model.name_or_path": shared_data / "models" / "stories260K", "task.dev_examples": 20}
    read: list[int] = []
    text = Rows.text
    monkeypatch.setattr(Rows, "text", lambda self, row: (read.append(row), text(self, row))[1])
    preparation = prepared(file, **settings, **{"task.streaming": "true", "training.group_by_length": "true"})
    told = "\n".join(preparation.derived_numbers())
    report(preparation, 80 * 2**30)
    assert len(preparation.reading.data_sha256["train"]) == 64
    assert "stream    1480 rows are read and tokenised when their step comes; looked at: 256 of them" in told
    assert len(read) <= 256 + 20 + 16 + 3 + 1, "the sample, dev, passages to leave out, the preview, one for images"


def test_nothing_is_held_but_where_rows_are(tmp_path: Path, shared_data: Path) -> None:
    """20,000 rows of 1 kB: 30 bytes each and the sample, where their text alone is 20 MB."""
    file = tmp_path / "rows.jsonl"
    line = json.dumps({"text": "once upon a time " * 58})
    file.write_text((line + "\n") * 20_000)
    tracemalloc.start()
    rows = find_rows(file, "task.train_file")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 20_000
    assert held < 24 * 20_000
    assert peak < 1_000_000
