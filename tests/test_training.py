"""Whole runs in this process against Algorithm 1 in plain loops, dense formulas, and one another."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import CASCADE, RECIPE, Start, base_weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasc_ds.algorithm.ledger import Ledger, LedgerError, digest
from lorasc_ds.cli import parse_command_line
from lorasc_ds.evaluation import evaluation_mode
from lorasc_ds.models import QUICKSTART_BASE
from lorasc_ds.order import derived_seed
from lorasc_ds.preparation import Preparation, prepare
from lorasc_ds.trainer import Trainer


def preparation_of(directory: Path) -> Preparation:
    invocation = parse_command_line([f"--config={directory / 'config.yaml'}"], RECIPE)
    assert not isinstance(invocation, str)
    return prepare(invocation.config)


def batches_of(preparation: Preparation) -> Callable[[int], list[tuple[torch.Tensor, torch.Tensor, int]]]:
    """The micro batches of every step of a run, as the reference wants them."""
    data = preparation.data

    def batch_of_step(step: int) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
        return [
            (micro.batch.input_ids, micro.batch.token_target, derived_seed(data.order.seed, step, micro.first))
            for micro in data.step(step).micro_batches
        ]

    return batch_of_step


def plain_run(directory: Path, **settings: Any) -> list[reference.Closed]:
    """The method that `settings` describe, without the package, on the batches of the run in `directory`."""
    preparation = preparation_of(directory)
    training = preparation.config.training
    plain = {
        "steps": preparation.plan.steps,
        "rank": preparation.config.adapter.rank,
        "s": 2.0,
        "slow_retention": 0.6,
        "noise_intensity": 1.0,
        "learning_rate": training.learning_rate,
        "max_grad_norm": training.max_grad_norm,
        "seed": training.seed,
    }
    model = settings.pop("model", None) or AutoModelForCausalLM.from_pretrained(QUICKSTART_BASE)
    return reference.algorithm_1(model, batches_of(preparation), **(plain | settings))


@pytest.mark.parametrize(
    ("experts", "overrides", "settings"),
    [
        (1, {}, {}),
        (3, {}, {}),
        (5, {}, {}),  # boundaries inside epochs: 5 experts over 9 steps
        (9, {}, {}),  # one expert per optimizer step
        (3, {"adapter.dropout": 0.2, "training.micro_batch_size": 2}, {"dropout": 0.2}),
        (2, {"cascade.strategy": "cascade", "training.max_grad_norm": 0.1}, {"strategy": "cascade"}),
        (2, {"cascade.strategy": "slow", "adapter.use_rslora": "true"}, {"strategy": "slow", "s": 16 / math.sqrt(8)}),
    ],
    ids=["T=1", "T=3", "T=5", "every step", "dropout, accumulation", "cascade, clipped", "slow, rsLoRA"],
)
def test_a_run_is_algorithm_1_to_the_bit(
    run: Start, experts: int, overrides: dict[str, Any], settings: dict[str, Any]
) -> None:
    done = run(**CASCADE, **{"cascade.experts": experts}, **overrides)
    expected = plain_run(done.directory, experts=experts, **settings)
    assert len(done.closed) == len(expected) == experts
    for live, plain in zip(done.closed, expected, strict=True):
        assert live.keys() == plain.weights.keys()
        for name in live:
            assert np.array_equal(live[name].numpy(), plain.weights[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_boundary_agrees_with_the_arithmetic_and_with_dense_float64(run: Start, dtype: str) -> None:
    """Given the run's own pairs and noise scales, from the ledger's files."""
    done = run(**CASCADE, **{"model.dtype": dtype, "cascade.experts": 4})
    content = json.loads((done.directory / "ledger" / "ledger.json").read_text())
    names, s = content["weights"], content["adapter"]["scaling"]
    torch_dtype = getattr(torch, dtype)
    base = base_weights(QUICKSTART_BASE, names, torch_dtype)
    plain = {name: base[name].float().numpy() for name in names}
    dense = {name: base[name].double().numpy() for name in names}
    magnitude = {name: np.abs(dense[name]) for name in names}
    for record, live in zip(content["experts"], done.closed, strict=True):
        tensors = {key: t.numpy() for key, t in load_file(done.directory / "ledger" / record["file"]).items()}
        for position, name in enumerate(names):
            A, B = tensors[f"{name}.slow_A"], tensors[f"{name}.slow_B"]
            c = record["noise_scale"][name]
            assert (c > 0) == (record["index"] > 1)
            noise = reference.noise(plain[name].shape, c, position, record["index"], seed=0)
            if c:
                plain[name] = reference.add(plain[name], noise)
            plain[name] = reference.add(plain[name], reference.delta(A, B, s))
            assert torch.equal(live[name], torch.from_numpy(plain[name]).to(torch_dtype)), name
            change = s * B.astype(np.float64) @ A.astype(np.float64)
            dense[name] = dense[name] + noise + change
            magnitude[name] = magnitude[name] + np.abs(noise) + np.abs(change)
            # Three roundings to float32 at each boundary, and one to the storage dtype at the end.
            bound = 3 * record["index"] * 2**-24 * magnitude[name]
            bound = bound + (2**-8 if dtype == "bfloat16" else 0) * (np.abs(dense[name]) + bound)
            assert np.all(np.abs(live[name].double().numpy() - dense[name]) <= bound), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_live_saved_and_replayed_weights_have_one_digest(run: Start, dtype: str) -> None:
    done = run(**CASCADE, **{"model.dtype": dtype})
    sha256 = done.summary["weights_sha256"]
    ledger = Ledger.load(done.directory / "ledger")
    saved = load_file(done.directory / "model" / "model.safetensors")
    assert digest(saved[name] for name in ledger.weights) == sha256
    assert digest(done.closed[-1][name] for name in ledger.weights) == sha256
    base = base_weights(QUICKSTART_BASE, list(ledger.weights), getattr(torch, dtype))
    ledger.check_base(base[name] for name in ledger.weights)
    assert digest(weight for _, weight in ledger.replay(base.__getitem__)) == sha256
    assert done.summary["shipped"] == {"select": "last", "step": 9, "weights_sha256": sha256}
    base[ledger.weights[2]][0, 0] += 1
    with pytest.raises(LedgerError, match="this ledger was written for"):
        ledger.check_base(base[name] for name in ledger.weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_saved_model_computes_what_the_live_one_does(
    run: Start, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    live: list[Trainer] = []
    build = Trainer.__init__
    monkeypatch.setattr(Trainer, "__init__", lambda self, *a: (build(self, *a), live.append(self))[0])
    done = run(**CASCADE, **{"model.dtype": dtype})
    model = AutoModelForCausalLM.from_pretrained(done.directory / "model")
    tokenizer = AutoTokenizer.from_pretrained(done.directory / "model")
    assert model.dtype == getattr(torch, dtype)
    inputs = tokenizer("a a d m p b a a =", return_tensors="pt")
    with evaluation_mode(live[0].module), torch.no_grad():
        expected = live[0].module(**inputs).logits
        assert torch.equal(model.eval()(**inputs).logits, expected)
    answer = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert answer[0, -1] == expected[0, -1].argmax()
    assert (done.directory / "model" / "model.safetensors").stat().st_mode & 0o044


def test_the_same_seed_gives_the_same_bits_and_another_gives_others(run: Start) -> None:
    dropout = {"adapter.dropout": 0.1}
    first, again, other = (run(**CASCADE, **dropout, **{"training.seed": seed}) for seed in (0, 0, 1))
    assert first.summary["weights_sha256"] == again.summary["weights_sha256"]
    assert first.metrics("step") != other.metrics("step")
    assert first.summary["weights_sha256"] != other.summary["weights_sha256"]
    closings = [
        [{k: v for k, v in r.items() if k != "seconds"} for r in one.metrics("close")] for one in (first, again)
    ]
    assert closings[0] == closings[1]


@pytest.mark.parametrize("loss", ["lm", "classification"])
def test_accumulation_changes_nothing_but_rounding(run: Start, loss: str) -> None:
    """The loss is that of the global batch, whatever the micro batches; 10 examples leave a short last batch."""
    whole, split = (
        run(
            **{
                "task.loss": loss,
                "training.micro_batch_size": micro,
                "task.train_examples": 10,
                "tracking.log_steps": 1,
            }
        )
        for micro in (4, 1)
    )
    losses = [[record["loss"] for record in one.metrics("step")] for one in (whole, split)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, weight in whole.closed[-1].items():
        torch.testing.assert_close(split.closed[-1][name], weight, rtol=1e-3, atol=1e-4)


def test_selection_looks_at_the_ends_of_epochs_whatever_the_experts(run: Start) -> None:
    """Two experts in three epochs of three steps close after steps 4 and 9; step 4 is scored but not chosen from."""
    done = run(**CASCADE, **{"cascade.experts": 2, "training.select": "best_dev", "task.label_noise": 1.0})
    losses = {r["step"]: r["scores"]["dev"]["loss"] for r in done.metrics("eval") if r["step"]}
    assert set(losses) == {3, 4, 6, 9}
    assert done.summary["shipped"]["step"] == min((3, 6, 9), key=losses.__getitem__)


def test_evaluations_inside_an_expert_do_not_change_the_run(run: Start) -> None:
    often, never = (
        run(**CASCADE, **{"cascade.experts": 2, "training.evaluate": when, "adapter.dropout": 0.1})
        for when in ("epoch", "end")
    )
    assert often.summary["weights_sha256"] == never.summary["weights_sha256"]
    assert [record["step"] for record in often.metrics("eval")] == [0, 3, 4, 6, 9]
    assert [record["step"] for record in never.metrics("eval")] == [0, 9]


def test_one_expert_per_step_is_scored_once_per_epoch(run: Start) -> None:
    done = run(**CASCADE, **{"cascade.experts": 9})
    assert [record["step"] for record in done.metrics("eval")] == [0, 3, 6, 9]


@pytest.mark.parametrize("strategy", ["lora", "lorasc"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_best_dev_ships_the_epoch_with_the_lowest_dev_loss(run: Start, strategy: str, dtype: str) -> None:
    overfit = {"training.learning_rate": 1e-2, "training.epochs": 5, "model.dtype": dtype, "task.label_noise": 1.0}
    done = run(**overfit, **{"cascade.strategy": strategy, "training.select": "best_dev"})
    losses = {record["step"]: record["scores"]["dev"]["loss"] for record in done.metrics("eval") if record["step"]}
    shipped = done.summary["shipped"]
    assert shipped["step"] == min(losses, key=losses.__getitem__)
    assert done.summary["eval"]["dev"]["loss"] == min(losses.values())
    assert shipped["step"] < 15, "the setting should overfit, or this test shows nothing"
    assert shipped["weights_sha256"] != done.summary["weights_sha256"]
    names = list(done.closed[0])
    saved = load_file(done.directory / "model" / "model.safetensors")
    assert digest(saved[name] for name in names) == shipped["weights_sha256"]
    last = run(**overfit, **{"cascade.strategy": strategy})
    assert last.summary["weights_sha256"] == done.summary["weights_sha256"]
    if strategy == "lorasc":  # one expert per epoch: what ships is the state after that boundary
        best = done.closed[shipped["step"] // 3 - 1]
        assert digest(best[name] for name in names) == shipped["weights_sha256"]


def test_a_record_never_mixes_experts(run: Start) -> None:
    done = run(**{"cascade.experts": 4, "tracking.log_steps": 2, "training.learning_rate": 1e-2})
    assert [(r["step"], r["expert"]) for r in done.metrics("step")] == [(2, 1), (4, 2), (6, 3), (8, 4), (9, 4)]
    each = run(**{"cascade.experts": 4, "tracking.log_steps": 1, "training.learning_rate": 1e-2}).metrics("step")
    assert done.metrics("step")[0]["loss"] == pytest.approx((each[0]["loss"] + each[1]["loss"]) / 2)
    assert done.metrics("step")[0]["lr"] == each[1]["lr"]


def test_the_schedule_spans_the_expert_or_the_run(run: Start) -> None:
    """Linear from 1e-2 over 9 steps in 3 experts, with one step of warm-up for the run."""
    every_step = {"tracking.log_steps": 1, "training.learning_rate": 1e-2}

    def rates(**more: Any) -> list[float]:
        return [record["lr"] for record in run(**every_step, **more).metrics("step")]

    assert rates() == pytest.approx([1e-2 * factor for factor in (1, 2 / 3, 1 / 3)] * 3)
    assert rates(**{"training.schedule_span": "run"}) == pytest.approx([1e-2 * (9 - i) / 9 for i in range(9)])
    warm = rates(**{"training.schedule_span": "run", "training.warmup_steps": 3})
    assert warm == pytest.approx([1e-2 * f for f in (1 / 3, 2 / 3, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)])
    compressed = rates(**{"training.warmup_steps": 3})
    assert compressed == pytest.approx([1e-2, 1e-2, 0.5e-2] * 3)


def test_overrides_do_what_they_say(run: Start) -> None:
    done = run(**{"adapter.rank": 4, "model.dtype": "bfloat16", "cascade.experts": 3, "training.batch_size": 6})
    summary = done.summary
    assert summary["adapter"]["rank"] == 4
    assert summary["adapter"]["scaling"] == 4.0
    assert summary["model"]["dtype"] == "bfloat16"
    assert summary["experts"] == 3
    assert summary["steps"] == 6
    assert summary["global_batch"] == 6
    assert load_file(done.directory / "model" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    expert = load_file(done.directory / "ledger" / "expert_0003.safetensors")
    assert {tuple(t.shape) for key, t in expert.items() if key.endswith("slow_A")} == {(4, 64)}
    one = run(**{"cascade.strategy": "lora"}).summary
    assert (one["strategy"], one["experts"], one["slow_retention"], one["noise_intensity"]) == ("lora", 1, 0.0, 0.0)
