"""α and λ chosen by the dev loss at every boundary: what is tried leaves no trace, and the choice is the best tried."""

from __future__ import annotations

import json

import pytest
from conftest import CASCADE, Start

AUTO = {"cascade.slow_retention": "auto", "cascade.noise_intensity": "auto"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", ["lora", "dora", "lora-fa"])
def test_what_is_tried_is_undone_to_the_bit(run: Start, dtype: str, adapter: str) -> None:
    """With equal candidates the run is that with the number itself, though every boundary tries them."""
    common = CASCADE | {"model.dtype": dtype, "adapter.method": adapter}
    same = {"cascade.slow_retention_candidates": "0.6,0.6", "cascade.noise_intensity_candidates": "1,1"}
    fixed, chosen = run(**common), run(**(common | AUTO | same))
    assert all(record["retention_losses"] for record in chosen.metrics("close"))
    assert chosen.summary["weights_sha256"] == fixed.summary["weights_sha256"]
    assert chosen.summary["shipped_sha256"] == fixed.summary["shipped_sha256"]


def test_the_choice_is_the_best_tried_and_is_recorded(run: Start) -> None:
    """With all dev examples, the loss of the α taken is the dev loss after the boundary; λ = 10 is worse than none."""
    wide = {"cascade.noise_intensity_candidates": "10,0,300", "cascade.auto_examples": 8}
    done = run(**(CASCADE | AUTO | wide))
    opened, closed = done.metrics("open"), done.metrics("close")
    experts = json.loads((done.directory / "ledger" / "ledger.json").read_text())["experts"]
    assert (opened[0]["noise_intensity"], opened[0]["noise_losses"]) == (0.0, {})
    for record, of_expert in zip(opened, experts, strict=True):
        losses = {float(value): loss for value, loss in record["noise_losses"].items()}
        assert (
            of_expert["noise_intensity"]
            == record["noise_intensity"]
            == min(losses, key=losses.__getitem__, default=0.0)
        )
        assert not losses or losses[300.0] > losses[0.0]
    after = [record["scores"]["dev"]["loss"] for record in done.metrics("eval")[1:]]
    for record, of_expert, loss in zip(closed, experts, after, strict=True):
        losses = {float(value): found for value, found in record["retention_losses"].items()}
        assert list(losses) == [0.5, 0.6, 0.8]
        assert of_expert["slow_retention"] == record["slow_retention"] == min(losses, key=losses.__getitem__)
        assert len(set(losses.values())) == 3
        assert losses[record["slow_retention"]] == pytest.approx(loss, rel=1e-5)  # the same sums in other batches


def test_what_choosing_cost_is_said(run: Start, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(**(CASCADE | AUTO))
    cost, timing = done.summary["auto"], done.summary["timing"]
    spent = sum(record["choosing_seconds"] or 0.0 for record in done.metrics("open") + done.metrics("close"))
    assert cost["examples"] == 8  # all there are: fewer than the least number
    assert cost["seconds"] == pytest.approx(spent)
    assert cost["share"] == pytest.approx(spent / (timing["train_seconds"] + sum(timing["boundary_seconds"])))
    output = capsys.readouterr().out
    assert "chosen by the loss on 8 of 8 dev examples at every boundary" in output
    assert f"s to choose on 8 dev examples, {cost['share']:.1%} of the training" in output
    assert "auto" not in run().summary


def test_auto_looks_at_as_many_examples_as_a_share_of_the_training_pays_for(run: Start) -> None:
    """At least 32; and with one expert of 444 examples and three candidates, 0.08 · 3 · 444 / 3 = 35."""
    few = {"cascade.strategy": "slow", "cascade.slow_retention": "auto", "training.evaluate": "end"}
    data = {"task.train_examples": 148, "task.dev_examples": 149, "task.test_examples": 1, "task.name": "digits"}
    assert run(**few, **data, **{"training.epochs": 1, "training.batch_size": 148}).summary["auto"]["examples"] == 32
    more = {"training.epochs": 3, "training.batch_size": 148, "cascade.experts": 1, "training.learning_rate": 1e-3}
    assert run(**few, **data, **more).summary["auto"]["examples"] == int(0.08 * 3 * 444 / 3)
