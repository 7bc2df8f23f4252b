"""`Cascade` in a loop of one's own and `CascadeCallback` in Trainers: the same cascade as the command's, to the bit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import CASCADE, Start, base_weights
from datasets import Dataset
from engine_cases import clean_state
from peft import LoraConfig
from plugin_alone import RANK, arguments_alone, data, dataset, prepared, trained_a_little
from plugin_cases import (
    EXPERTS,
    LORASC,
    STEPS,
    STOPPED,
    InOrder,
    adapted,
    boundaries_watched,
    hand_loop,
    replayed,
    trainer_run,
)
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from lorasc_ds import Cascade, CascadeCallback
from lorasc_ds.algorithm.ledger import Ledger, digest
from lorasc_ds.errors import ConfigError
from lorasc_ds.models import QUICKSTART_BASE

# PEFT reads and TRL sets what transformers 5 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")


def digest_of_folder(folder: Path, ledger: Ledger) -> str:
    return digest(base_weights(folder, list(ledger.weights)).values())


# What the command is told, and what the loop of one's own.
SAME: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "lorasc": ({}, "lora", {}),
    "relora": (
        {"cascade.strategy": "relora", "cascade.experts": 3, "cascade.prune_fraction": 0.5},
        "lora",
        {"strategy": "relora", "prune_fraction": 0.5},
    ),
    # Not clipped: the norm is a sum over the parameters, whose order is another.
    "dora": ({"adapter.method": "dora", "training.max_grad_norm": "null"}, "dora", {"max_grad_norm": None}),
    "lora-fa": ({"adapter.method": "lora-fa"}, "lora-fa", {}),
    "lora-fa, not projected": (
        {"adapter.method": "lora-fa", "adapter.lorafa_projection": "false"},
        "lora-fa",
        {"lorafa_projection": False},
    ),
    "warm-up, one schedule": (
        {"training.warmup_steps": 4, "training.schedule": "cosine", "training.schedule_span": "run"},
        "lora",
        {"warmup_steps": 4, "schedule": "cosine", "schedule_span": "run"},
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_a_loop_of_ones_own_is_the_commands_run(name: str, run: Start, tmp_path: Path) -> None:
    overrides, method, settings = SAME[name]
    rate = 1e-4 if name == "relora" else 1e-2
    done = run(**(CASCADE | overrides | {"training.learning_rate": rate}))
    cascade, _ = hand_loop(
        Accelerator(cpu=True),
        adapted(QUICKSTART_BASE, method, RANK),
        data(),
        tmp_path / "own",
        rate=rate,
        **({"max_grad_norm": 1.0} | settings),
    )
    assert cascade.weights_sha256() == done.summary["weights_sha256"]
    assert replayed(cascade, QUICKSTART_BASE) == cascade.weights_sha256()
    cascade.save_pretrained(tmp_path / "own" / "merged")
    theirs, own = (
        base_weights(folder, list(cascade.ledger.weights))
        for folder in (done.directory / "model", tmp_path / "own" / "merged")
    )
    assert digest(own.values()) == digest(theirs.values()) == done.summary["shipped_sha256"]
    found = Ledger.load(tmp_path / "own" / "ledger")
    meant = Ledger.load(done.directory / "ledger")
    assert replace(found, directory=Path(), base=meant.base) == replace(meant, directory=Path())
    assert found.base.sha256 == meant.base.sha256


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Cascade]:
    """A Trainer's run that was not stopped, with a checkpoint after every second step."""
    args = arguments_alone(tmp_path_factory.mktemp("straight"), save_strategy="steps", save_steps=2, warmup_steps=2)
    return trainer_run(adapted(QUICKSTART_BASE, rank=RANK), args, dataset())


def test_the_trainers_run_is_the_commands(straight: tuple[Any, Cascade], run: Start) -> None:
    trainer, cascade = straight
    done = run(**(CASCADE | {"training.warmup_steps": 2, "tracking.log_steps": 1}))
    assert cascade.weights_sha256() == done.summary["weights_sha256"]
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [record["lr"] for record in done.metrics("step")]
    assert logged == pytest.approx([1e-2, 1e-2, 1e-2 / 2] * EXPERTS)  # warm-up of two steps in nine is one in three


def test_the_merged_model_is_the_live_one(straight: tuple[Any, Cascade]) -> None:
    trainer, cascade = straight
    folder = Path(trainer.args.output_dir) / "merged"
    weights = base_weights(folder, list(cascade.ledger.weights))
    assert digest(weights.values()) == cascade.weights_sha256() == replayed(cascade, QUICKSTART_BASE)
    assert cascade.weights_sha256() != cascade.ledger.base.sha256
    merged = AutoModelForCausalLM.from_pretrained(folder)
    batch = data()[1]["input_ids"]
    with torch.no_grad():
        assert torch.equal(merged.eval()(batch).logits, trainer.model.eval()(batch).logits)


@pytest.mark.parametrize("step", [4, 6, STEPS], ids=["inside an expert", "at a boundary", "at the end"])
def test_a_trainers_run_resumes_to_the_same_bits(step: int, straight: tuple[Any, Cascade], tmp_path: Path) -> None:
    directory = resumable(straight, step, tmp_path)
    args = arguments_alone(directory, save_strategy="steps", save_steps=2, warmup_steps=2)
    trainer, cascade = trainer_run(
        adapted(QUICKSTART_BASE, rank=RANK), args, dataset(), directory / f"checkpoint-{step}"
    )
    assert cascade.weights_sha256() == straight[1].weights_sha256() == replayed(cascade, QUICKSTART_BASE)
    assert trainer.state.log_history[:-1] == [
        entry | {"grad_norm": pytest.approx(entry["grad_norm"])} for entry in straight[0].state.log_history[:-1]
    ]


def resumable(straight: tuple[Any, Cascade], step: int, folder: Path) -> Path:
    """What a run that was stopped after this step has left."""
    name = f"checkpoint-{step}"
    shutil.copytree(Path(straight[0].args.output_dir) / name, folder / "stopped" / name)
    return folder / "stopped"


def test_what_the_trainer_alone_would_resume_is_another_run(
    straight: tuple[Any, Cascade], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `lorasc/` its checkpoint is refused; and were it not, the experts before it would be lost."""
    directory = resumable(straight, 4, tmp_path)
    shutil.rmtree(directory / "checkpoint-4" / "lorasc")
    args = arguments_alone(directory, warmup_steps=2)

    def resume() -> Cascade:
        return trainer_run(adapted(QUICKSTART_BASE, rank=RANK), args, dataset(), directory / "checkpoint-4")[1]

    with pytest.raises(ConfigError, match=r"checkpoint-4/lorasc is not what Cascade\.save writes"):
        resume()

    def without_replay(self: Cascade, _: Path, step: int) -> None:
        self.expert = self.plan.expert_at(step)
        self.boundaries.slow = self.live.fresh_pairs(1)
        self.ledger.experts[:] = Ledger.load(Path(straight[0].args.output_dir) / "ledger").experts[:1]

    monkeypatch.setattr(Cascade, "resume", without_replay)
    assert resume().weights_sha256() != straight[1].weights_sha256()


class StopAt(TrainerCallback):
    """Ends a Trainer's run early, as a time limit does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_an_early_end_closes_the_open_expert(tmp_path: Path) -> None:
    callback = CascadeCallback(experts=EXPERTS, **LORASC)
    args = arguments_alone(tmp_path)
    trainer = InOrder(
        model=adapted(QUICKSTART_BASE, rank=RANK),
        args=args,
        train_dataset=dataset(),
        callbacks=[callback, StopAt(STOPPED)],
    )
    trainer.train()
    assert callback.cascade is not None
    ledger = Ledger.load(tmp_path / "ledger")
    assert [record.steps for record in ledger.experts] == [(0, 3), (3, 4)]
    base = base_weights(QUICKSTART_BASE, list(ledger.weights))
    assert digest(weight for _, weight in ledger.replay(base.__getitem__)) == callback.cascade.weights_sha256()
    assert digest(base_weights(tmp_path / "merged", list(ledger.weights)).values()) == callback.cascade.weights_sha256()
    assert callback.cascade.finish(STOPPED - 1) is None


def test_candidates_are_judged_by_the_dev_loss(tmp_path: Path) -> None:
    """The Trainer's own evaluation, say."""
    asked = []

    def dev_loss() -> float:
        asked.append(trainer.evaluate()["eval_loss"])
        return asked[-1]

    callback = CascadeCallback(experts=EXPERTS, strategy="slow", slow_retention="auto", dev_loss=dev_loss)
    args = arguments_alone(tmp_path)
    rows = dataset()
    trainer = InOrder(
        model=adapted(QUICKSTART_BASE, rank=RANK),
        args=args,
        train_dataset=rows,
        eval_dataset=rows[:8],
        callbacks=[callback],
    )
    trainer.train()
    assert callback.cascade is not None
    experts = callback.cascade.ledger.experts
    assert len(asked) == 3 * EXPERTS
    for expert, losses in zip(experts, zip(*[iter(asked)] * 3, strict=True), strict=True):
        assert expert.slow_retention == (0.5, 0.6, 0.8)[losses.index(min(losses))]
        assert len(set(losses)) > 1
    assert replayed(callback.cascade, QUICKSTART_BASE) == callback.cascade.weights_sha256()


def test_saving_needs_closed_experts_and_a_virtual_close_saves_what_closing_would_ship(tmp_path: Path) -> None:
    cascade = prepared(**LORASC)(tmp_path)
    with cascade.as_if_closed():  # nothing is open
        assert cascade.weights_sha256() == cascade.ledger.base.sha256
    cascade.open(0)
    trained_a_little(cascade)
    with pytest.raises(ConfigError, match="expert 1 is open, and what it has learnt would be missing"):
        cascade.save_pretrained(tmp_path / "now")
    with cascade.as_if_closed():
        cascade.save_pretrained(tmp_path / "now")
    assert cascade.weights_sha256() == cascade.ledger.base.sha256
    cascade.close(0)
    cascade.close(2)
    shipped = base_weights(tmp_path / "now", list(cascade.ledger.weights))
    assert digest(shipped.values()) == cascade.weights_sha256() != cascade.ledger.base.sha256
    with cascade.as_if_closed():  # again nothing is open
        assert digest(shipped.values()) == cascade.weights_sha256()
    with pytest.raises(ConfigError, match=r"now is there already: give save_pretrained a new name"):
        cascade.save_pretrained(tmp_path / "now")


def test_the_probe_sees_the_weights_precision_and_not_autocasts(tmp_path: Path) -> None:
    """Under Accelerate's bf16 the pair and the merged weight are rounded differently, by more than float32's bound."""
    with clean_state():
        pass
    with clean_state():
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        cascade, _ = hand_loop(accelerator, adapted(QUICKSTART_BASE, rank=RANK), data(), tmp_path)
    assert len(cascade.ledger.experts) == EXPERTS


def test_the_probe_takes_the_first_rows_and_cuts_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, lengths = torch.arange(60).view(6, 10) % 31, torch.arange(7)
    cascade = prepared(probe={"input_ids": ids, "labels": ids, "lengths": lengths, "longest": 9})(tmp_path)
    given = {}

    def forward(**batch: Any) -> Any:
        given.update(batch)
        return SimpleNamespace(logits=torch.zeros(4, 10, 31))

    monkeypatch.setattr(cascade, "base", forward)
    cascade.probe_logits()
    assert given.pop("longest") == 9
    assert given.pop("use_cache") is False
    assert {key: value.shape for key, value in given.items()} == {"input_ids": (4, 10), "lengths": (7,)}


@pytest.mark.parametrize("method", ["lora", "lora-fa"])
def test_a_second_cascade_on_the_same_model_goes_on_from_the_merged_one(method: str, tmp_path: Path) -> None:
    def run_on(module: Any, name: str) -> Cascade:
        return hand_loop(Accelerator(cpu=True), module, data(), tmp_path / name)[0]

    module = adapted(QUICKSTART_BASE, method, RANK)
    run_on(module, "first").save_pretrained(tmp_path / "merged")
    second = run_on(module, "second")
    assert second.weights_sha256() == run_on(adapted(tmp_path / "merged", method, RANK), "anew").weights_sha256()


def test_an_opening_empties_the_users_optimizer(tmp_path: Path) -> None:
    """Then each element of B moves by the learning rate, as at Adam's first step."""
    accelerator = Accelerator(cpu=True)
    with boundaries_watched() as seen:
        cascade, _ = hand_loop(accelerator, adapted(QUICKSTART_BASE, rank=RANK), data(), tmp_path, experts=STEPS)
    assert seen["moments"] == [None] + [0.0] * (STEPS - 1)
    optimizer = accelerator._optimizers[-1]
    for state in optimizer.state.values():
        assert state["step"] == 1
    for _, pairs in Ledger.load(cascade.ledger.directory).closed():
        assert max(float(pair.B.abs().max()) for pair in pairs.values()) <= 1e-2 * (1 + 1e-5)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(dataset())


def test_a_stream_needs_a_probe(straight: tuple[Any, Cascade], tmp_path: Path) -> None:
    def train(**settings: Any) -> Cascade:
        args = arguments_alone(tmp_path, warmup_steps=2)
        return trainer_run(adapted(QUICKSTART_BASE, rank=RANK), args, Stream(), **settings)[1]

    with pytest.raises(ConfigError, match=r"the training data are a stream, .*: give CascadeCallback a probe"):
        train()
    assert train(probe=data()[3]).weights_sha256() == straight[1].weights_sha256()


def test_a_constant_rate_after_a_warm_up_is_taken_as_such(tmp_path: Path) -> None:
    args = arguments_alone(tmp_path, lr_scheduler_type="constant_with_warmup", warmup_steps=6)
    trainer, _ = trainer_run(adapted(QUICKSTART_BASE, rank=RANK), args, dataset())
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([0.005, 0.01, 0.01] * EXPERTS)


def test_a_frozen_A_is_drawn_again_on_resume(tmp_path: Path) -> None:
    """DeepSpeed's checkpoints lack what is frozen."""
    make = prepared(lambda: adapted(QUICKSTART_BASE, "lora-fa", RANK), **LORASC)
    first, second = make(tmp_path / "first"), make(tmp_path / "second")
    first.open(0)
    trained_a_little(first)
    first.close(2)
    first.open(3)
    first.save(tmp_path / "saved")
    second.resume(tmp_path / "saved", 4)
    for one, other in zip(first.live.weights, second.live.weights, strict=True):
        assert torch.equal(one.A, other.A)


def test_trls_sft_run_becomes_a_cascade(tiny_folder: Path, tmp_path: Path) -> None:
    """As a user has it, in bf16 autocast and with activation checkpointing, both of which TRL sets."""
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        output_dir=str(tmp_path / "out"),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        max_length=16,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    callback = CascadeCallback(slow_retention=0.6, noise_intensity=1.0)
    trainer = SFTTrainer(
        model=str(tiny_folder),
        args=args,
        train_dataset=Dataset.from_dict({"text": ["0 1 2 3 4 5 6 7", "7 6 5 4", "1 1 2 2 3 3"] * 4}),
        processing_class=AutoTokenizer.from_pretrained(tiny_folder),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        callbacks=[callback],
    )
    assert args.bf16
    trainer.train()
    cascade = callback.cascade
    assert cascade is not None
    assert [record.steps for record in cascade.ledger.experts] == [(0, 3), (3, 6), (6, 9)]
    assert replayed(cascade, tiny_folder) == cascade.weights_sha256() != cascade.ledger.base.sha256
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    AutoTokenizer.from_pretrained(tmp_path / "out" / "merged")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(merged.eval()(ids).logits, trainer.model.get_base_model().eval()(ids).logits)
