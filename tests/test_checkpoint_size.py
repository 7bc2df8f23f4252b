"""What a checkpoint and a ledger expert weigh: the files of a run, and by the same arithmetic those of Llama-2-7B."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from conftest import RECIPE
from transformers import AutoModelForCausalLM, LlamaConfig

from lorasc_ds.adapters import AdaptedWeight, attach
from lorasc_ds.checkpoint import Checkpoints
from lorasc_ds.train import main


def pair_elements(weights: list[AdaptedWeight]) -> int:
    return sum(one.rank * sum(one.shape) for one in weights)


def attached(config: LlamaConfig) -> tuple[list[AdaptedWeight], int]:
    """The adapted weights of a model without any memory, and its bytes in bfloat16."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    weights = attach(model, method="lora", rank=8, lora_alpha=16, use_rslora=False, dropout=0.0, target_modules=("q_proj", "v_proj"))  # fmt: skip
    return weights, size


def test_a_checkpoint_of_llama_2_7b_is_a_small_part_of_it(tmp_path: Path) -> None:
    """With a best_dev selection inside an expert, which is the most that a checkpoint holds."""
    arguments = [
        f"--output_dir={tmp_path}", "--training.epochs=3", "--task.train_examples=12", "--task.dev_examples=6",
        "--task.test_examples=2", "--cascade.experts=2", "--training.checkpoint_steps=1", "--training.select=best_dev",
        "--training.checkpoints_kept=99", "--tracking.tensorboard=false", "--training.save_model=false",
    ]  # fmt: skip
    assert main(arguments, RECIPE) == 0
    checkpoints = Checkpoints(tmp_path / "checkpoints", 99)
    folders = [checkpoints.directory / name for name in checkpoints.names()]
    largest = max(folders, key=lambda path: sum(file.stat().st_size for file in path.iterdir()))
    state = json.loads((largest / "state.json").read_text())
    assert (state["phase"], state["selection"]["closed"]) == ("training", False)
    weights, _ = attached(LlamaConfig(vocab_size=16, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4))  # fmt: skip
    pairs = 4 * pair_elements(weights)
    overhead = 16_000  # of headers and JSON, for 8 weights
    assert 0 <= (largest / "tensors.safetensors").stat().st_size - 4 * pairs < overhead  # pairs, two moments, selection
    assert (largest / "state.json").stat().st_size < overhead
    assert 0 <= (tmp_path / "ledger" / "expert_0001.safetensors").stat().st_size - pairs < overhead

    weights, model = attached(LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32))  # fmt: skip
    pairs, overhead = 4 * pair_elements(weights), 2 * 8 * overhead
    assert (pairs, model) == (16_777_216, 13_476_831_232)
    assert model / (pairs + overhead) > 400 * 1.9
    assert model / (4 * pairs + overhead) > 150 * 1.3
