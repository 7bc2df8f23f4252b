"""The memory plan against what a real forward pass keeps, and the preview against what is scored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import RECIPE

from lorasc_ds import models
from lorasc_ds.cli import parse_command_line
from lorasc_ds.dry_run import activation_bytes, marked, memory_plan, preview_lines
from lorasc_ds.encoding import ScoredTokens
from lorasc_ds.objectives import summed_loss
from lorasc_ds.preparation import Preparation, attach_adapters, prepare

SMALL = ["--task.train_examples=12", "--task.dev_examples=8", "--task.test_examples=10"]


def prepared(*arguments: str) -> Preparation:
    invocation = parse_command_line([*SMALL, *arguments], RECIPE)
    assert not isinstance(invocation, str)
    return prepare(invocation.config)


def kept_bytes(preparation: Preparation) -> int:
    """Bytes that autograd keeps in a real forward pass, parameters left out."""
    model = models.load_model(preparation.config.model).train()
    attach_adapters(preparation.config, model)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = summed_loss(model, preparation.data.step(0).micro_batches[0].batch, "lm")
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_activation_estimate_is_near_the_truth(dtype: str) -> None:
    preparation = prepared(f"--model.dtype={dtype}")
    assert activation_bytes(preparation) == pytest.approx(kept_bytes(preparation), rel=0.4)


def test_what_the_memory_plan_counts_exactly() -> None:
    plan = memory_plan(prepared("--model.dtype=bfloat16", "--adapter.rank=4"))
    assert plan["frozen weights"] == 2 * 203_264
    assert plan["pairs, gradients, moments, slow pairs"] == 20 * 8 * 4 * (64 + 64)
    assert plan["float32 accumulators"] == 4 * 8 * 64 * 64
    assert memory_plan(prepared("--model.dtype=bfloat16", "--cascade.accumulator=host"))["float32 accumulators"] == 0
    assert memory_plan(prepared())["float32 accumulators"] == 0
    assert (
        memory_plan(prepared("--cascade.strategy=lora"))["copy during an evaluation inside an expert"]
        == 4 * 8 * 64 * 64
    )


def test_the_preview_marks_what_is_scored() -> None:
    lines = list(preview_lines(prepared()))
    assert len([line for line in lines[1:] if line.endswith("]]")]) == 3
    for line in lines[2::2]:
        assert line.split("[[")[1].removesuffix("]]") in "0123456789"
    assert len(list(preview_lines(prepared("--task.loss=classification")))) == 1 + 3 * 11


def test_long_texts_and_newlines_are_shown_on_one_line(shared_data: Path) -> None:
    tokenizer = models.AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")
    ids = tokenizer("Once upon a time\n" * 40)["input_ids"]
    shown = marked(tokenizer, ScoredTokens(tuple(ids), 3))
    assert "\n" not in shown
    assert "\\n" in shown
    assert " ... " in shown
    assert shown.endswith(f"[[{tokenizer.decode(ids[-3:])}]]".replace("\n", "\\n"))
