"""What `--dry_run` prints: the memory of every engine with what to take, and the preview against what is scored."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from conftest import RECIPE

from lorasc_ds import models
from lorasc_ds.cli import parse_command_line
from lorasc_ds.dry_run import memory_lines, preview_lines
from lorasc_ds.duration import duration_lines, scored_in, seconds
from lorasc_ds.encoded import ScoredTokens
from lorasc_ds.memory import GIB, SHIPPED, memory_plan
from lorasc_ds.models import forward_parameters
from lorasc_ds.preparation import Preparation, prepare
from lorasc_ds.preview import SHORTENED, marked, one_line
from lorasc_ds.train import main

SMALL = ["--task.train_examples=12", "--task.dev_examples=8", "--task.test_examples=10"]


def prepared(*arguments: str, processes: int = 1) -> Preparation:
    invocation = parse_command_line([*SMALL, *arguments], RECIPE)
    assert not isinstance(invocation, str)
    return prepare(invocation.config, world_size=processes)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, what was printed, and the errors, of a dry run of the command."""
    code = main([*SMALL, "--output_dir=never/made", *arguments], RECIPE)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def table(out: str) -> dict[str, list[str]]:
    """The table's rows, by engine."""
    names = ("plain", "ddp", *SHIPPED)
    return {words[0]: words[1:] for line in out.splitlines() if (words := line.split()) and words[0] in names}


def test_the_plan_is_for_the_gpus_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = printed(capsys, "--dry_run", "--gpus=4", "--gpu_memory=16")
    assert code == 0
    assert "batch     4 = 1 micro x 4 processes x 1 accumulation" in out
    assert "4 GPUs of 16.00G (14.40G without 10% " in out
    assert [*table(out)] == ["ddp", *SHIPPED]
    assert all(row[-1] == "fits" for row in table(out).values())
    assert "\ntake: accelerate launch --num_processes 4 launch/train.py (no DeepSpeed)\n" in out
    code, out, _ = printed(capsys, "--dry_run")
    assert (code, next(iter(table(out)))) == (0, "plain")
    assert "\ntake: accelerate launch --num_processes 1 launch/train.py (no DeepSpeed)\n" in out
    assert not Path("never").exists()


BAD = {
    "a batch that cannot be shared": (["--dry_run", "--gpus=3"], "error: training.batch_size is 4, not a multiple of 3 processes x 1 examples"),
    "no GPU": (["--dry_run", "--gpus=0"], "error: --gpus is 0: a number above 0 is needed"),
    "half a GPU": (["--dry_run", "--gpus=0.5"], "error: argument --gpus: invalid int value: '0.5'"),
    "no memory": (["--dry_run", "--gpu_memory=0"], "error: --gpu_memory is 0: a number above 0 is needed"),
    "not a number": (["--dry_run", "--gpu_memory=nan"], "error: --gpu_memory is nan: a number above 0 is needed"),
    "endless memory": (["--dry_run", "--gpu_memory=inf"], "error: --gpu_memory is inf: a number above 0 is needed"),
    "a plan without a dry run": (["--gpus=4"], "error: --gpus 4 is for planning: add --dry_run, or leave it out"),
    "a memory without a dry run": (["--gpu_memory=24"], "error: --gpu_memory 24 is for planning: add --dry_run"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_plan_that_cannot_be_made_is_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = BAD[case]
    code, _, errors = printed(capsys, *arguments)
    assert code == 2
    assert len(errors.splitlines()) == 1
    assert errors.startswith(message)


def test_the_cells_are_those_of_the_plan_and_the_lines_fit_a_terminal() -> None:
    arguments = ("--cascade.merge_path=gather", "--training.select=best_dev", "--cascade.strategy=lora")
    lines = list(memory_lines(prepared(*arguments, processes=2), GIB))
    assert max(map(len, lines)) <= 120
    assert " ".join(lines[1].split()) == "frozen pairs and slow copy to activa- ZeRO boundary sum on in host"
    rows = table("\n".join(lines))
    assert rows["ddp"] == ["0.78M", "0.12M", "0.03M", "0.12M", "2.21M", "-", "-", "3.27M", "0.12M", "fits"]
    assert rows["zero1.json"] == ["0.78M", "0.11M", "0.03M", "0.12M", "2.21M", "38.15M", "-", "41.40M", "0.12M", "fits"]


def test_a_gpu_is_too_small_by_the_part_that_stays_free() -> None:
    preparation = prepared()
    needed = memory_plan(preparation, {}).device
    *_, enough = memory_lines(preparation, math.ceil(needed / 0.9))
    assert enough == "take: accelerate launch --num_processes 1 launch/train.py (no DeepSpeed)"
    rows = table("\n".join(memory_lines(preparation, math.floor(needed / 0.9) - 1)))
    assert {name: row[-1] for name, row in rows.items()} == dict.fromkeys(["plain", *SHIPPED], "much")


def test_where_nothing_fits_the_remedies_are_those_that_are_left() -> None:
    def last_line(*arguments: str) -> str:
        *_, line = memory_lines(prepared(*arguments), 1024)
        return line

    assert last_line() == (
        "nothing fits: lower training.micro_batch_size (4), or set training.gradient_checkpointing true,"
        " or raise --gpus (1)"
    )
    assert last_line("--training.eval_batch_size=1000", "--training.gradient_checkpointing=true") == (
        "nothing fits: lower training.eval_batch_size (1000), or lower training.micro_batch_size (4), or raise --gpus (1)"
    )
    assert last_line("--training.micro_batch_size=1", "--training.gradient_checkpointing=true") == (
        "nothing fits: raise --gpus (1)"
    )


def test_the_preview_marks_what_is_scored() -> None:
    lines = list(preview_lines(prepared()))
    assert len([line for line in lines[1:] if line.endswith("]]")]) == 3
    for line in lines[2::2]:
        assert line.split("[[ ")[1].removesuffix("]]") in "0123456789"
    assert len(list(preview_lines(prepared("--task.loss=classification")))) == 1 + 3 * 11


def test_long_texts_and_newlines_are_shown_on_one_line(shared_data: Path) -> None:
    tokenizer = models.AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")
    ids = tokenizer("Once upon a time\n" * 40)["input_ids"]
    shown = one_line(marked(tokenizer, ScoredTokens(tuple(ids), 3), SHORTENED))
    assert "\n" not in shown
    assert "\\n" in shown
    assert " ... " in shown
    assert shown.endswith(f"[[ {tokenizer.decode(ids[-3:])}]]".replace("\n", "\\n"))


def test_the_time_is_that_of_the_tokens() -> None:
    """On the quickstart's model passes are so small that launching kernels takes all of it."""
    preparation = prepared("--training.epochs=2")
    (line,) = duration_lines(preparation)
    read = 66  # of 67 tokens, the answer is not read
    assert f"training 1 s ({2 * 12 * read:,} tokens), 3 evaluations 1 s ({(8 + 4 * 10) * read:,} tokens each)" in line
    assert seconds(scored_in(preparation), 10**9, 1) == pytest.approx(
        2 * forward_parameters(preparation.shape) * 1e9 / (0.4 * 67e12)
    )
    assert seconds(scored_in(preparation), 1, 1000) == 1000 * 4 * 5e-4


def test_the_time_of_images_is_told_in_images() -> None:
    preparation = prepared("--task.name=digit_images", "--model.name_or_path=quickstart-vit", "--training.epochs=2")
    (line,) = duration_lines(preparation)
    scored = sum(len(preparation.splits[split]) for split in preparation.task.evaluation_splits)
    tokens = (32 // 8) ** 2 + 1
    assert f"training 1 s ({2 * 12} images of {tokens} tokens), 3 evaluations 1 s ({scored} images of {tokens}" in line
