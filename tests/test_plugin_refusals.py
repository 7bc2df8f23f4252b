"""What `Cascade` and `CascadeCallback` refuse: models, optimizers, Trainers, checkpoints, calls in another order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from plugin_alone import RANK, arguments_alone, dataset, prepared, trained_a_little
from plugin_cases import EXPERTS, LORASC, STOPPED, InOrder, adapted, peft_config
from transformers import LlamaForCausalLM

from lorasc_ds import CascadeCallback
from lorasc_ds.algorithm.ledger import LedgerError
from lorasc_ds.errors import ConfigError
from lorasc_ds.models import QUICKSTART_BASE

# PEFT reads and TRL sets what transformers 5 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")


def test_calls_that_are_left_out_or_come_too_late_are_told(tmp_path: Path) -> None:
    cascade = prepared()(tmp_path)
    with pytest.raises(ConfigError, match=r"step 0 was to be closed, but expert 1 is not open: call open first"):
        cascade.close(0)
    with pytest.raises(ConfigError, match=r"step 1 is in expert 1, which begins at step 0, but none is open"):
        cascade.open(1)
    assert cascade.open(0) is not None
    assert cascade.open(0) is None  # as where micro batches call it
    assert cascade.close(0) is None
    with pytest.raises(ConfigError, match=r"step 3 is in expert 2, which begins at step 3, but expert 1 is open"):
        cascade.open(3)
    assert cascade.close(2) is not None
    with pytest.raises(ConfigError, match=r"step 9 was to be opened, but the run has the steps 0 to 8"):
        cascade.open(9)


def llama_of(module: LlamaForCausalLM, **options: Any) -> Any:
    return get_peft_model(module, peft_config(rank=4, **options))


# What a user may bring, and what is said. {llama} is the tiny model.
REFUSED: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "no pairs": (lambda llama: {"model": lambda: llama}, "the model has no LoRA layers: give it some with peft"),
    "no model": (
        lambda llama: {"model": lambda: torch.nn.Linear(2, 2)},
        "there is no Hugging Face model in this Linear",
    ),
    "float16": (
        lambda llama: {"model": lambda: llama_of(llama.half())},
        r"self_attn\.q_proj\.weight is torch\.float16: float32 or bfloat16 is needed",
    ),
    "rank_pattern": (
        lambda llama: {"model": lambda: llama_of(llama, rank_pattern={"v_proj": 2})},
        r"v_proj\.weight has rank 2, scaling 8 and lora_A trained, unlike model\.layers\.0\.self_attn\.q_proj",
    ),
    "all trained": (
        lambda llama: {"model": lambda: llama_of(llama).requires_grad_(True)},
        "its weight must be frozen and its lora_B trained",
    ),
    "modules_to_save": (
        lambda llama: {"model": lambda: llama_of(llama, modules_to_save=["lm_head"])},
        "lm_head is trained besides, through PEFT's modules_to_save",
    ),
    "another adapter": (
        lambda llama: {"model": lambda: get_peft_model(llama, peft_config(rank=4), adapter_name="mine")},
        "one adapter called 'default', not merged, without a LoRA bias and without fan_in_fan_out is needed",
    ),
    "embeddings": (
        lambda llama: {"model": lambda: llama_of(llama, target_modules=["embed_tokens"])},
        r"embed_tokens is a LoRA on a Embedding: only torch\.nn\.Linear",
    ),
    "another optimizer": (
        lambda llama: {"optimizer": lambda parameters: torch.optim.Adagrad(parameters)},
        r"torch\.optim\.adagrad\.Adagrad is not known to start anew when its state is zeroed",
    ),
    "an optimizer of something else": (
        lambda llama: {"optimizer": lambda parameters: torch.optim.AdamW(parameters[::2])},
        "this AdamW has 8 of the 16 parameters of the LoRA pairs",
    ),
    "experts per epoch": (
        lambda llama: {"experts": None},
        "strategy lorasc has an expert per epoch: give epochs, or experts",
    ),
    "auto alone": (
        lambda llama: {"slow_retention": "auto"},
        "slow_retention or noise_intensity is auto: give dev_loss, which candidates are judged by",
    ),
    "a typo": (
        lambda llama: {"slow_retentoin": 0.5},
        r"unknown key cascade\.slow_retentoin; did you mean cascade\.slow_retention\?",
    ),
    "a number": (lambda llama: {"slow_retention": 1.5}, r"cascade\.slow_retention is 1\.5: needs to be less than 1"),
    "experts": (lambda llama: {"experts": 10}, r"cascade\.experts is 10, but .* are only 9 optimizer steps"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_boundary_can_be_made_in_is_refused(name: str, tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    settings, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        prepared(**settings(tiny_llama))(tmp_path)


def test_fsdp_is_refused_by_name(tmp_path: Path) -> None:
    wrapper = type("FullyShardedDataParallel", (torch.nn.Sequential,), {})
    with pytest.raises(ConfigError, match="FSDP is not supported"):
        prepared(lambda: wrapper(adapted(QUICKSTART_BASE, rank=RANK)))(tmp_path)


def test_pairs_that_hold_something_are_not_thrown_away(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    """Where an adapter is trained on; or PEFT took its beginning out of the weights (PiSSA)."""
    cascade = prepared(lambda: llama_of(tiny_llama, init_lora_weights="pissa"))(tmp_path)
    with pytest.raises(
        ConfigError, match="lora_B is not 0 before the first step, and what the pairs hold would be lost"
    ):
        cascade.open(0)


TRAINERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "the best model": (
        {
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "save_strategy": "steps",
            "eval_steps": 3,
            "save_steps": 3,
        },
        {},
        "load_best_model_at_end would load the pairs of one expert onto the weights of another",
    ),
    "a schedule of another kind": (
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
        {},
        "the Trainer's schedule is a ReduceLROnPlateau: take an lr_scheduler_type like linear",
    ),
    "a decay that the method lacks": (
        {"lr_scheduler_type": "polynomial"},
        {},
        "lr_scheduler_type is polynomial: take linear, cosine, constant, or give CascadeCallback a schedule",
    ),
    "experts per epoch": ({}, {"experts": None}, "strategy lorasc has an expert per epoch: give epochs, or experts"),
    "auto alone": ({}, {"noise_intensity": "auto"}, "slow_retention or noise_intensity is auto: give dev_loss"),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_that_contradicts_the_method_is_refused(name: str, tmp_path: Path) -> None:
    training, settings, message = TRAINERS[name]
    args = arguments_alone(tmp_path, **training)
    callback = CascadeCallback(**({"experts": EXPERTS} | LORASC | settings))
    rows = dataset()
    trainer = InOrder(
        model=adapted(QUICKSTART_BASE, rank=RANK),
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[callback],
    )
    with pytest.raises(ConfigError, match=message):
        trainer.train()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """What `save` wrote inside the second expert, before step 4."""
    cascade = prepared(**LORASC)(tmp_path / "first")
    for step in range(STOPPED):
        cascade.open(step)
        trained_a_little(cascade)
        cascade.close(step)
    cascade.save(tmp_path / "saved")
    return tmp_path / "saved"


OTHERS: dict[str, tuple[dict[str, Any], int, str]] = {
    "seed": ({"seed": 1}, 4, "seed is 1, but .*saved was written with 0: resume with the same"),
    "strategy": ({"strategy": "slow"}, 4, "strategy is slow, but .*saved was written with lorasc"),
    "retention": ({"slow_retention": 0.5}, 4, r"slow_retention is 0\.5, but .* with 0\.6"),
    "too early": ({}, 2, r"holds experts of the steps \[\(0, 3\)\], but before step 2 this run has \[\]"),
    "too late": ({}, 7, r"but before step 7 this run has \[\(0, 3\), \(3, 6\)\]: resume at the step"),
    "fewer experts": ({"experts": 2}, 6, r"before step 6 this run has \[\(0, 4\)\]: resume at .* as many steps and"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_runs_checkpoint_is_refused(name: str, saved: Path, tmp_path: Path) -> None:
    settings, step, message = OTHERS[name]
    cascade = prepared(**(LORASC | settings))(tmp_path / "again")
    with pytest.raises(ConfigError, match=message):
        cascade.resume(saved, step)


def test_a_checkpoint_of_other_weights_or_cut_short_is_refused(saved: Path, tmp_path: Path) -> None:
    other = adapted(QUICKSTART_BASE, rank=RANK)
    other.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.data[0, 0] += 1
    with pytest.raises(LedgerError, match="this ledger was written for"):
        prepared(lambda: other, **LORASC)(tmp_path / "other").resume(saved, STOPPED)
    cascade = prepared(**LORASC)(tmp_path / "again")
    file = saved / "ledger" / "expert_0001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(LedgerError, match=r"expert_0001\.safetensors is missing or not the file that was written"):
        cascade.resume(saved, STOPPED)
    file.write_bytes(content)
    (saved / "noise.json").unlink()
    with pytest.raises(ConfigError, match=r"saved is not what Cascade\.save writes, or was cut short"):
        cascade.resume(saved, STOPPED)
