"""Opening and closing an expert on the live model: in place, measured, undone, stopped where it goes wrong."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from accelerate import Accelerator
from conftest import CASCADE, RECIPE, Start, base_weights

from lorasc_ds import cascade as cascade_module
from lorasc_ds import live_weights
from lorasc_ds import trainer as trainer_module
from lorasc_ds.algorithm.ledger import Ledger, digest
from lorasc_ds.algorithm.merge import Edit
from lorasc_ds.cli import parse_command_line
from lorasc_ds.errors import DivergedError
from lorasc_ds.models import QUICKSTART_BASE, load_model
from lorasc_ds.preparation import attach_adapters, prepare
from lorasc_ds.stopping import Stopping
from lorasc_ds.trainer import Trainer


def make_trainer(tmp_path: Path, **overrides: Any) -> Trainer:
    settings = {"task.train_examples": 12, "task.dev_examples": 8, "task.test_examples": 10} | overrides
    invocation = parse_command_line([f"--{key}={value}" for key, value in settings.items()], RECIPE)
    assert not isinstance(invocation, str)
    preparation = prepare(invocation.config)
    module = load_model(invocation.config.model)
    weights = attach_adapters(invocation.config, module)
    return Trainer(preparation, module, weights, Accelerator(mixed_precision="no"), tmp_path, Stopping(tmp_path))


def steps(trainer: Trainer, first: int, last: int) -> None:
    for step in range(first, last):
        trainer.training_step(step, 1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_boundary_is_in_place_and_leaves_the_function_unchanged(tmp_path: Path, dtype: str) -> None:
    """α = 0, λ = 0: the same objects, empty moments and steps, fresh pairs, logits within the bound."""
    trainer = make_trainer(tmp_path, **{"cascade.strategy": "cascade", "cascade.experts": 3, "model.dtype": dtype})
    cascade, (first, second, _) = trainer.cascade, trainer.preparation.plan
    cascade.open_expert(first)
    objects = [id(p) for p in trainer.module.parameters()]
    pointers = [p.data_ptr() for p in trainer.module.parameters()]
    optimizer = trainer.backend.optimizer
    steps(trainer, 0, 3)
    state = trainer.backend.optimizer.state
    assert all(value.any() for of_one in state.values() for value in of_one.values())
    before = cascade.probe()
    closing = cascade.close_expert(first)
    assert closing.drift <= cascade_module.MAX_BOUNDARY_DRIFT[getattr(torch, dtype)]
    assert closing.drift > 0 or dtype == "bfloat16"
    assert closing.averaging_change == 0.0
    opening = cascade.open_expert(second)
    assert opening.noise_change == 0.0
    change = (cascade.probe() - before).abs().max() / before.std()
    assert change <= cascade_module.MAX_BOUNDARY_DRIFT[getattr(torch, dtype)]
    assert [id(p) for p in trainer.module.parameters()] == objects
    assert [p.data_ptr() for p in trainer.module.parameters()] == pointers
    assert trainer.backend.optimizer is optimizer
    assert not any(value.any() for of_one in state.values() for value in of_one.values())
    for position, one in enumerate(trainer.weights):
        assert not one.B.any()
        assert np.array_equal(one.A.detach().numpy(), reference.fresh_A(8, one.A.shape[1], position, 2, 0))


def test_the_first_step_after_a_boundary_is_adam_s_first(tmp_path: Path) -> None:
    """Without bias-correction's history each element of B moves by lr·g/(|g|+eps)."""
    trainer = make_trainer(tmp_path, **{"cascade.strategy": "cascade", "training.max_grad_norm": "null"})
    plan = list(trainer.preparation.plan)
    trainer.cascade.open_expert(plan[0])
    steps(trainer, 0, 3)
    trainer.cascade.close_expert(plan[0])
    trainer.cascade.open_expert(plan[1])
    gradients: list[torch.Tensor] = []
    hook = trainer.weights[0].B.register_hook(lambda gradient: gradients.append(gradient.clone()))
    steps(trainer, 3, 4)
    hook.remove()
    g = gradients[0]
    torch.testing.assert_close(trainer.weights[0].B.detach(), -1e-2 * g / (g.abs() + 1e-8), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("dtype", "wrong"), [("float32", 1.01), ("float32", 0.0), ("bfloat16", 2.0), ("bfloat16", 0.0)]
)
def test_a_wrong_scaling_in_the_merge_stops_the_run(
    run: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str, wrong: float
) -> None:
    """In bfloat16, where rounding alone moves logits, a scaling that is forgotten or counted twice is seen."""
    edit_ = live_weights.merge.edit_

    def edit_wrongly_(edits: list[Edit], *, virtual: bool = False) -> torch.Tensor:
        return edit_([one._replace(scaling=wrong * one.scaling) for one in edits], virtual=virtual)

    monkeypatch.setattr(live_weights.merge, "edit_", edit_wrongly_)
    for number, strategy in enumerate(("cascade", "lorasc")):  # found with averaging and noise on, too
        with pytest.raises(DivergedError, match="merging it changed the probe's logits"):
            run(**CASCADE, **{"cascade.strategy": strategy, "model.dtype": dtype})
        status = json.loads((tmp_path / f"run{number}" / "status.json").read_text())
        assert (status["state"], status["exit_code"]) == ("failed", 3)
        assert len(Ledger.load(tmp_path / f"run{number}" / "ledger").experts) == status["expert"] - 1


def test_changes_by_averaging_and_noise_are_measured(run: Start) -> None:
    done = run(**CASCADE)
    opened, closed = done.metrics("open"), done.metrics("close")
    assert [record["noise_change"] > 0 for record in opened] == [False, True, True]
    assert all(record["averaging_change"] > 0 for record in closed)
    assert all(0 <= record["drift"] < 1e-3 for record in closed)
    assert [record["overlap"] is None for record in closed] == [True, False, False]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_virtual_close_ships_what_a_close_would_and_is_undone(tmp_path: Path, dtype: str) -> None:
    trainer = make_trainer(tmp_path, **{"model.dtype": dtype, "cascade.experts": 2})
    plan = list(trainer.preparation.plan)
    trainer.cascade.open_expert(plan[0])
    steps(trainer, 0, 2)
    trainable = [p.detach().clone() for p in trainer.module.parameters()]
    with trainer.cascade.as_if_closed():
        virtual = trainer.weights_sha256()
        logits = trainer.cascade.probe()
    assert all(torch.equal(p, old) for p, old in zip(trainer.module.parameters(), trainable, strict=True))
    trainer.cascade.close_expert(plan[0])
    assert trainer.weights_sha256() == virtual
    assert torch.equal(trainer.cascade.probe(), logits)


def test_a_virtual_close_is_undone_after_an_error_too(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.cascade.open_expert(trainer.preparation.plan.expert(1))
    steps(trainer, 0, 2)
    before = [p.detach().clone() for p in trainer.module.parameters()]
    with pytest.raises(KeyboardInterrupt), trainer.cascade.as_if_closed():
        raise KeyboardInterrupt
    assert all(torch.equal(p, old) for p, old in zip(trainer.module.parameters(), before, strict=True))


@pytest.mark.parametrize("where", ["device", "host"])
def test_the_accumulator_s_place_changes_nothing(run: Start, where: str) -> None:
    done = run(**CASCADE, **{"model.dtype": "bfloat16", "cascade.accumulator": where})
    ledger = Ledger.load(done.directory / "ledger")
    base = base_weights(QUICKSTART_BASE, list(ledger.weights), torch.bfloat16)
    assert digest(weight for _, weight in ledger.replay(base.__getitem__)) == done.summary["weights_sha256"]


def test_nothing_grows_over_ten_boundaries(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    gc.freeze()  # what there is already is not looked through at every collection
    request.addfinalizer(gc.unfreeze)
    trainer = make_trainer(tmp_path, **{"cascade.experts": 12, "training.epochs": 4, "model.dtype": "bfloat16"})

    def live_bytes() -> int:
        gc.collect()
        tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    sizes = []
    for expert in trainer.preparation.plan:
        trainer.cascade.open_expert(expert)
        steps(trainer, expert.start, expert.stop)
        trainer.cascade.close_expert(expert)
        sizes.append(live_bytes())
    assert len(sizes) == 12
    assert sizes[1:] == [sizes[1]] * 11


@pytest.mark.parametrize("what", ["loss", "loss alone", "gradient"])
def test_a_number_that_is_not_finite_keeps_the_step_from_being_taken(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path)
    expert = trainer.preparation.plan.expert(1)
    trainer.cascade.open_expert(expert)
    steps(trainer, 0, 1)
    before = [p.detach().clone() for p in trainer.module.parameters()]
    if what == "loss":

        def spoil(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            output.logits = output.logits * torch.nan

        hook = trainer.module.register_forward_hook(spoil)
    elif what == "loss alone":  # its gradient is finite
        summed_loss = trainer_module.summed_loss
        monkeypatch.setattr(trainer_module, "summed_loss", lambda *arguments: summed_loss(*arguments) + torch.inf)
        hook = trainer.weights[0].B.register_hook(lambda gradient: None)
    else:
        hook = trainer.weights[0].B.register_hook(lambda gradient: gradient * torch.inf)
    ids = trainer.preparation.data.step(1).ids
    report = trainer.training_step(1, 1e-2).read()
    hook.remove()
    assert not report.finite
    assert report.examples == ids
    assert all(torch.equal(p, old) for p, old in zip(trainer.module.parameters(), before, strict=True))


def test_noise_that_drowns_the_model_is_named(run: Start) -> None:
    with pytest.raises(DivergedError, match=r"expert 2: after the noise .* lower cascade\.noise_intensity \(1e\+40\)"):
        run(**{"cascade.noise_intensity": 1e40})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_turning_from_expert_to_expert_in_one_pass_changes_no_bit(
    run: Start, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Three experts in two epochs, so that a boundary lies where nothing is scored."""
    passes: list[list[bool]] = []
    change = live_weights.LiveWeights.change

    def count(self: Any, pairs: Any = None, expert: int = 0, noise_scale: Any = None, virtual: bool = False) -> Any:
        if not virtual:
            passes[-1].append(pairs is not None and noise_scale is not None)
        return change(self, pairs, expert, noise_scale, virtual)

    monkeypatch.setattr(live_weights.LiveWeights, "change", count)
    settings = CASCADE | {"cascade.experts": 3, "training.epochs": 2, "model.dtype": dtype}
    ends = []
    for check in (True, False):
        passes.append([])
        done = run(**settings, **{"cascade.check_boundaries": str(check).lower()})
        ledger = (done.directory / "ledger" / "ledger.json").read_text()
        ends.append((done.summary["weights_sha256"], done.summary["eval"], ledger))
        unchecked = [record["drift"] is None for record in done.metrics("close")]
        assert unchecked == [not check] * 3
    assert ends[0] == ends[1]
    assert passes == [[False] * 5, [True, True, False]]  # three merges and two noises; two turns and the last merge
