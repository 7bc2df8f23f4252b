"""Every strategy with every adapter against the reference in plain loops, and against one another."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import CASCADE, Run, Start, base_weights
from safetensors.torch import load_file
from test_boundary import make_trainer, steps
from test_training import batches_of, plain_run, preparation_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasc_ds.algorithm.ledger import Ledger, digest
from lorasc_ds.evaluation import evaluation_mode
from lorasc_ds.models import QUICKSTART_BASE
from lorasc_ds.trainer import Trainer

STRATEGIES = ("lora", "noisytune", "cola", "relora", "cascade", "slow", "lorasc")
ADAPTERS = ("lora", "lora+", "lora-fa", "dora")
SPECIAL: list[dict[str, Any]] = [
    {"cascade.strategy": "lorasc", "adapter.method": "dora", "adapter.use_rslora": True},
    {"cascade.strategy": "lorasc", "adapter.method": "lora-fa", "adapter.use_rslora": True},
    {"cascade.strategy": "relora", "cascade.prune_fraction": 0.5, "adapter.use_rslora": True},
    {"cascade.strategy": "slow", "adapter.method": "lora+", "adapter.dropout": 0.2, "training.micro_batch_size": 2},
    {"cascade.strategy": "slow", "adapter.method": "lora-fa", "adapter.dropout": 0.2, "training.micro_batch_size": 2},
    {"cascade.strategy": "lorasc", "adapter.method": "dora", "adapter.dropout": 0.2},
    {"cascade.strategy": "lorasc", "adapter.method": "dora", "adapter.dropout": 0.2, "training.micro_batch_size": 2},
    {"cascade.strategy": "lora", "adapter.method": "dora", "training.max_grad_norm": 0.1},
    {"cascade.strategy": "lora", "adapter.method": "lora+", "training.max_grad_norm": 0.1},
    {"cascade.strategy": "lora", "adapter.method": "lora-fa", "training.max_grad_norm": 0.1},
    {"cascade.strategy": "cascade", "adapter.method": "lora+", "adapter.loraplus_lr_ratio": 4.0},
    {"cascade.strategy": "cascade", "adapter.method": "lora-fa", "adapter.lorafa_projection": False},
    {"cascade.strategy": "lorasc", "cascade.restart_interval": 2},  # five experts, the last of one step
    {"cascade.strategy": "relora", "cascade.restart_interval": 4, "cascade.prune_fraction": 0.5},
    {"cascade.strategy": "cola"},  # two experts
    {"cascade.strategy": "relora", "cascade.prune_fraction": 0.9, "cascade.rewarmup_steps": 2},
    {"cascade.strategy": "relora", "cascade.prune_method": "full"},
    {"cascade.strategy": "relora", "cascade.prune_method": "random", "cascade.prune_fraction": 0.3},
    {"cascade.strategy": "relora", "cascade.prune_method": "random", "adapter.method": "lora-fa"},
    {"cascade.strategy": "noisytune", "cascade.noise_on": "all"},
]
# The reference calls settings by their keys' last parts, but for these.
ARGUMENTS = {"adapter.method": "adapter"}
# Of a change's norm. AdamW divides a gradient by its own size, so that rounding alone moves an element whose gradient is
# near 0. Over these 9 steps other orders of DoRA's float32 operations came out up to 2e-4 apart (at a rate of 1e-2 up to
# 8e-3); its norm differentiated, or taken of W alone, or its dropout left out, 8e-3 to 1.
TOLERANCE = 2e-3


def name_of(case: dict[str, Any]) -> str:
    return ", ".join(str(v) if isinstance(v, str) else f"{k.split('.')[1]}={v}" for k, v in case.items())


def table() -> list[Any]:
    """Every strategy with every adapter, three experts where there may be several; then single settings."""
    cases = []
    for strategy in STRATEGIES:
        for adapter in ADAPTERS:
            more = {"cola": {"cascade.experts": 3}, "relora": {"cascade.prune_fraction": 0.5}}.get(strategy, {})
            if (strategy, adapter) == ("relora", "dora"):  # rounding decides which of two moments is the smaller one
                more = {"cascade.prune_method": "full"}
            cases.append({"cascade.strategy": strategy, "adapter.method": adapter} | more)
    return [pytest.param(case, id=name_of(case)) for case in cases + SPECIAL]


def overrides_of(case: dict[str, Any]) -> dict[str, Any]:
    """As on the command line; with a rate at which the method trains, and DoRA's rounding stays small (`TOLERANCE`)."""
    rate = {"lora+": 1e-3, "dora": 3e-3}.get(case.get("adapter.method"), 1e-2)
    return CASCADE | {"training.learning_rate": rate} | {k: str(v).lower() for k, v in case.items()}


def expected(done: Run, case: dict[str, Any], **more: Any) -> list[reference.Closed]:
    """The reference's boundaries; it gets what the case says and knows the rest from the table of methods."""
    settings = {ARGUMENTS.get(key, key.split(".")[1]): value for key, value in case.items()}
    for owned in ("micro_batch_size", "max_grad_norm"):  # `plain_run` has them
        settings.pop(owned, None)
    if settings.pop("use_rslora", False):
        settings["s"] = 16 / math.sqrt(8)
    settings.setdefault("experts", {"lora": 1, "noisytune": 1, "cola": 2}.get(case["cascade.strategy"], 3))
    settings.setdefault("prune_fraction", 0.99)
    return plain_run(done.directory, **(settings | more))


def is_exact(case: dict[str, Any]) -> bool:
    """Whether the package computes in the reference's order.

    Not for DoRA, whose norms and sums PEFT may take in another one, nor where LoRA-FA may project the gradient of every
    micro batch or that of the step.
    """
    if case.get("adapter.method") == "lora-fa":
        return "training.micro_batch_size" not in case
    return case.get("adapter.method") != "dora"


def distance(live: torch.Tensor, plain: np.ndarray, change: np.ndarray) -> float:
    """‖live - plain‖ over the norm of the change that brought `plain` about."""
    return float(np.linalg.norm(live.double().numpy() - plain) / np.linalg.norm(change.astype(np.float64)))


@pytest.mark.parametrize("case", table())
def test_a_run_is_the_reference(run: Start, case: dict[str, Any]) -> None:
    """Weights in use, pairs and magnitudes after every boundary; the replayed ledger; the model that ships."""
    done = run(**overrides_of(case))
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART_BASE)
    plain = expected(done, case, model=model)
    assert len(done.closed) == len(plain) == done.summary["experts"]
    folder, s = done.directory / "ledger", done.summary["adapter"]["scaling"]
    base = base_weights(QUICKSTART_BASE, list(plain[0].weights))
    held: dict[str, torch.Tensor] = {}
    for index, (live, boundary) in enumerate(zip(done.closed, plain, strict=True), start=1):
        held = load_file(folder / f"expert_{index:04d}.safetensors")
        assert live.keys() == boundary.weights.keys() == base.keys()
        assert {key for key in held if key.endswith("magnitude")} == {f"{n}.magnitude" for n in boundary.magnitudes}
        for name, (A, B) in boundary.slow.items():
            changes = [
                (live[name], boundary.weights[name], reference.delta(A, B, s)),
                (held[f"{name}.slow_A"], A, A),
                (held[f"{name}.slow_B"], B, B),
            ]
            if name in boundary.magnitudes:
                m = boundary.magnitudes[name]
                changes.append((held[f"{name}.magnitude"], m, m - reference.row_norms(base[name].numpy())))
            for number, (found, wanted, change) in enumerate(changes):
                if is_exact(case):
                    assert np.array_equal(found.numpy(), wanted), (index, name, number)
                else:
                    assert distance(found, wanted, change) <= TOLERANCE, (index, name, number)

    ledger = Ledger.load(folder)
    replayed = dict(ledger.replay(base.__getitem__))
    assert digest(replayed.values()) == digest(done.closed[-1].values()) == done.summary["weights_sha256"]
    saved = load_file(done.directory / "model" / "model.safetensors")
    tensors = load_file(QUICKSTART_BASE / "model.safetensors")
    for name, weight in ledger.replay_noised(tensors.__getitem__):
        assert torch.equal(weight, saved[name]), name
    assert bool(ledger.noised) == (case.get("cascade.noise_on") == "all")
    for name, weight in saved.items():
        if name not in replayed:  # as pretrained, or with NoisyTune's noise
            assert torch.equal(weight, model.get_parameter(name)), name
        elif f"{name}.magnitude" in held:
            ships = reference.shipped(replayed[name].numpy(), held[f"{name}.magnitude"].numpy())
            assert np.array_equal(weight.numpy(), ships), name
        else:
            assert torch.equal(weight, replayed[name]), name


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_lorasc_without_averages_and_noise_is_the_cascade(run: Start, adapter: str) -> None:
    nothing = {"cascade.slow_retention": 0, "cascade.noise_intensity": 0}
    assert_same(run, {"adapter.method": adapter}, nothing, {"cascade.strategy": "cascade"})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"cascade.strategy": "cola", "cascade.experts": 1}, {"cascade.strategy": "lora"}),
        ({"cascade.strategy": "cola"}, {"cascade.strategy": "cascade", "cascade.experts": 2, "training.schedule_span": "run"}),
        ({"cascade.strategy": "noisytune", "cascade.noise_intensity": 0}, {"cascade.strategy": "lora"}),
        ({"cascade.strategy": "lorasc", "cascade.experts": 1, "cascade.slow_retention": 0}, {"cascade.strategy": "lora"}),
        ({"adapter.method": "lora+", "adapter.loraplus_lr_ratio": 1.0, "training.max_grad_norm": "null"}, {"training.max_grad_norm": "null"}),
        ({"cascade.restart_interval": 3}, {"cascade.experts": 3}),
        ({"cascade.strategy": "relora", "cascade.prune_method": "full"}, {"cascade.strategy": "relora", "cascade.prune_fraction": 1.0}),
        ({"cascade.strategy": "relora", "cascade.prune_method": "random", "cascade.prune_fraction": 0.0}, {"cascade.strategy": "relora", "cascade.prune_fraction": 0.0}),
    ],
    ids=["cola, one expert = lora", "cola = cascade over one schedule", "noisytune, no noise = lora", "lorasc, one expert = lora",
         "lora+, one rate = lora", "interval = experts", "pruned fully = pruned wholly", "nothing pruned at random = by size"],
)  # fmt: skip
def test_methods_meet_where_their_settings_do(run: Start, one: dict[str, Any], other: dict[str, Any]) -> None:
    assert_same(run, {}, one, other)


def assert_same(run: Start, common: dict[str, Any], one: dict[str, Any], other: dict[str, Any]) -> None:
    left, right = (run(**(CASCADE | common | settings)) for settings in (one, other))
    assert left.summary["weights_sha256"] == right.summary["weights_sha256"]
    assert len(left.closed) == len(right.closed)
    for ours, theirs in zip(left.closed, right.closed, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"adapter.method": "lora+"}, {}),
        ({"adapter.method": "lora-fa"}, {}),
        ({"adapter.method": "dora"}, {}),
        ({"adapter.method": "lora-fa"}, {"adapter.method": "lora-fa", "adapter.lorafa_projection": "false"}),
        ({"cascade.strategy": "cola"}, {"cascade.strategy": "cascade", "cascade.experts": 2}),
        ({"cascade.strategy": "relora", "cascade.prune_method": "full"}, {"cascade.strategy": "cascade"}),
        (
            {"cascade.strategy": "relora", "cascade.prune_method": "full"},
            {"cascade.strategy": "relora", "cascade.prune_method": "full", "cascade.rewarmup_steps": 0},
        ),
        ({"cascade.strategy": "noisytune"}, {"cascade.strategy": "lora"}),
    ],
)
def test_a_setting_that_matters_is_not_ignored(run: Start, one: dict[str, Any], other: dict[str, Any]) -> None:
    left, right = (run(**(CASCADE | {"training.learning_rate": 1e-3} | settings)) for settings in (one, other))
    assert left.summary["weights_sha256"] != right.summary["weights_sha256"]


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_the_pruned_share_is_read_back_and_recorded(run: Start, method: str) -> None:
    settings = {"cascade.strategy": "relora", "cascade.prune_method": method, "cascade.prune_fraction": 0.4}
    shares = [record["pruned"] for record in run(**CASCADE, **settings).metrics("open")]
    assert shares == [None, pytest.approx(0.4, abs=0.01), pytest.approx(0.4, abs=0.01)]


def test_relora_that_prunes_nothing_merges_redraws_and_goes_on(run: Start) -> None:
    """A loop of its own: one AdamW over the run, never touched; one cosine. An emptied moment or step would show."""
    keeps = {"cascade.prune_fraction": 0.0, "cascade.rewarmup_steps": 0}
    done = run(**CASCADE, **keeps, **{"cascade.strategy": "relora", "training.schedule_span": "run"})
    jagged = run(**CASCADE, **keeps, **{"cascade.strategy": "relora"})
    assert jagged.summary["weights_sha256"] == done.summary["weights_sha256"]
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART_BASE).requires_grad_(False)
    layers = {}
    for name in done.closed[0]:
        path, last = name.removesuffix(".weight").rsplit(".", 1)
        layers[name] = reference.PlainLoRA(getattr(model.get_submodule(path), last), 8, 2.0, 0.0)
        setattr(model.get_submodule(path), last, layers[name])
    pairs = [p for layer in layers.values() for p in (layer.A, layer.B)]
    optimizer = torch.optim.AdamW(pairs, weight_decay=0.0)
    batch_of_step = batches_of(preparation_of(done.directory))
    for step in range(9):
        if step % 3 == 0:
            for position, layer in enumerate(layers.values()):
                layer.A.data.copy_(torch.from_numpy(reference.fresh_A(8, 64, position, step // 3 + 1, seed=0)))
                layer.B.data.zero_()
        [(ids, targets, _)] = batch_of_step(step)
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        torch.nn.functional.cross_entropy(logits, targets).backward()
        torch.nn.utils.clip_grad_norm_(pairs, 1.0)
        optimizer.param_groups[0]["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * step / 9))
        optimizer.step()
        optimizer.zero_grad()
        if step % 3 == 2:
            for name, layer in layers.items():
                change = (2.0 * layer.B.double() @ layer.A.double()).detach()
                layer.base.weight.data.add_(change.float())
                layer.B.data.zero_()
                # The loss and the product are summed in other orders than the package's: rounding, over 9 steps.
                live = done.closed[step // 3][name]
                assert distance(live, layer.base.weight.double().numpy(), change.numpy()) <= TOLERANCE, (step, name)


def rates(run: Start, **settings: Any) -> list[float]:
    done = run(**{"tracking.log_steps": 1, "training.learning_rate": 1e-5, "training.evaluate": "end"} | settings)
    return [record["lr"] for record in done.metrics("step")]


def test_relora_s_rate_climbs_back_after_every_restart(run: Start) -> None:
    """Warm-up steps end where the run's cosine is when they are over; the first expert has none."""
    relora = {"cascade.strategy": "relora", "cascade.prune_method": "full"}
    c = [1e-5 * (1 + math.cos(math.pi * step / 9)) / 2 for step in range(9)]
    two = rates(run, **relora, **{"cascade.rewarmup_steps": 2})
    assert two == pytest.approx([c[0], c[1], c[2], c[5] / 2, c[5], c[5], c[8] / 2, c[8], c[8]], rel=1e-9)
    tenth = rates(run, **relora)
    assert tenth == pytest.approx([c[0], c[1], c[2], c[4], c[4], c[5], c[7], c[7], c[8]], rel=1e-9)
    assert rates(run, **relora, **{"cascade.rewarmup_steps": 0}) == pytest.approx(c, rel=1e-9)
    assert rates(run, **relora, **{"training.schedule_span": "run"}) == pytest.approx(c, rel=1e-9)
    linear = rates(run, **relora, **{"training.schedule": "linear", "cascade.rewarmup_steps": 2})
    wanted = [9, 8, 7, 4 / 2, 4, 4, 1 / 2, 1, 1]
    assert linear == pytest.approx([1e-5 * factor / 9 for factor in wanted], rel=1e-9)


def test_relora_warms_up_for_a_tenth_of_a_longer_expert(run: Start) -> None:
    """Two experts of 12 steps: two of warm-up. One rounded down would have one."""
    relora = {"cascade.strategy": "relora", "cascade.prune_method": "full", "cascade.experts": 2}
    found = rates(run, **relora, **{"training.epochs": 8})
    c = [1e-5 * (1 + math.cos(math.pi * step / 24)) / 2 for step in range(24)]
    assert found == pytest.approx([*c[:12], c[14] / 2, c[14], *c[14:]], rel=1e-9)


def test_cola_has_two_experts_and_one_schedule(run: Start) -> None:
    assert rates(run, **{"cascade.strategy": "cola"}) == pytest.approx([1e-5 * (9 - i) / 9 for i in range(9)])


@pytest.mark.parametrize("strategy", ["cola", "relora", "cascade", "slow", "lorasc"])
def test_a_magnitude_and_its_moments_pass_through_a_boundary(tmp_path: Path, strategy: str) -> None:
    """A reset or pruned moment, a step count of 0, an averaged or re-drawn magnitude would each show."""
    settings = {"cascade.strategy": strategy, "adapter.method": "dora", "cascade.experts": 3}
    trainer = make_trainer(tmp_path, **settings, **{"training.max_grad_norm": "null", "cascade.prune_method": "full"})
    cascade, (first, second, _) = trainer.cascade, trainer.preparation.plan
    optimizer = trainer.engine.optimizer
    magnitudes = {one.name: one.magnitude for one in trainer.weights if one.magnitude is not None}
    assert len(magnitudes) == len(trainer.weights)
    for one in trainer.weights:  # one rounding of a float32 norm, of up to 64 squares in any order
        norms = reference.row_norms(one.weight.detach().numpy())
        np.testing.assert_allclose(magnitudes[one.name].detach().numpy(), norms, rtol=64 * 2**-24)
    cascade.open_expert(first)
    steps(trainer, 0, 3)

    def state() -> dict[str, torch.Tensor]:
        held = {name: m.detach().clone() for name, m in magnitudes.items()}
        for name, m in magnitudes.items():
            held |= {f"{name}.{key}": torch.as_tensor(value).clone() for key, value in optimizer.state[m].items()}
        return held

    before, logits = state(), cascade.probe()
    assert all(float(value) == 3 for key, value in before.items() if key.endswith(".step"))
    cascade.close_expert(first)
    in_ledger = load_file(tmp_path / "ledger" / "expert_0001.safetensors")
    assert all(torch.equal(in_ledger[f"{name}.magnitude"], m) for name, m in magnitudes.items())
    cascade.open_expert(second)
    after = state()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    if strategy in ("cola", "relora", "cascade"):  # no averages, no noise: the function is the one before
        assert float((cascade.probe() - logits).abs().max() / logits.std()) < 1e-4
    for one in trainer.weights:
        for parameter in (one.A, one.B):
            of_pair = optimizer.state[parameter]
            assert not of_pair["exp_avg"].any()
            assert not of_pair["exp_avg_sq"].any()
            assert float(of_pair["step"]) == (3 if strategy == "relora" else 0)
    name, m = next(iter(magnitudes.items()))
    gradients: list[torch.Tensor] = []
    hook = m.register_hook(lambda gradient: gradients.append(gradient.double()))
    steps(trainer, 3, 4)  # at a rate of 1e-2
    hook.remove()
    mean = 0.9 * before[f"{name}.exp_avg"].double() + 0.1 * gradients[0]
    square = 0.999 * before[f"{name}.exp_avg_sq"].double() + 0.001 * gradients[0] ** 2
    moved = 1e-2 * mean / (1 - 0.9**4) / ((square / (1 - 0.999**4)).sqrt() + 1e-8)
    torch.testing.assert_close(m.detach().double(), before[name].double() - moved, rtol=1e-6, atol=1e-8)


def test_lora_fa_trains_B_alone(tmp_path: Path) -> None:
    """A is as drawn to the bit after training, without gradient and moments, and another one in the next expert."""
    trainer = make_trainer(tmp_path, **{"cascade.strategy": "cascade", "adapter.method": "lora-fa"})
    optimizer = trainer.engine.optimizer
    for expert in list(trainer.preparation.plan)[:2]:
        trainer.cascade.open_expert(expert)
        steps(trainer, 0, 2)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]} | {id(p) for p in optimizer.state}
        assert held == {id(one.B) for one in trainer.weights}
        for position, one in enumerate(trainer.weights):
            drawn = reference.fresh_A(8, one.A.shape[1], position, expert.index, 0)
            assert np.array_equal(one.A.detach().numpy(), drawn)
            assert one.A.grad is None
            assert one.B.any()
        trainer.cascade.close_expert(expert)


@pytest.mark.parametrize("strategy", ["lora", "noisytune", "lorasc"])
def test_a_dora_model_ships_with_its_magnitudes(run: Start, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    """`AutoModelForCausalLM` computes from m·W/‖W‖ what the live layers compute from m and W.

    Both round each weight or its factor to float32, 2**-24 of a logit's terms: 1e-6 of the logits' spread was seen.
    W alone, or a norm of another W, is 1e-2 of it off.
    """
    live: list[Trainer] = []
    build = Trainer.__init__
    monkeypatch.setattr(Trainer, "__init__", lambda self, *a: (build(self, *a), live.append(self))[0])
    done = run(**CASCADE, **{"cascade.strategy": strategy, "adapter.method": "dora"})
    inputs = AutoTokenizer.from_pretrained(done.directory / "model")("a a d m p b a a =", return_tensors="pt")
    with evaluation_mode(live[0].module), torch.no_grad():
        wanted = live[0].module(**inputs).logits
    model = AutoModelForCausalLM.from_pretrained(done.directory / "model").eval()

    def off() -> float:
        with torch.no_grad():
            return float((model(**inputs).logits - wanted).abs().max() / wanted.std())

    assert off() < 1e-4
    for one in live[0].weights:
        assert one.magnitude is not None
        last = load_file(done.directory / "ledger" / f"expert_{len(done.closed):04d}.safetensors")
        assert torch.equal(last[f"{one.name}.magnitude"], one.magnitude)
        model.get_parameter(one.name).data.copy_(one.weight)
    assert off() > 1e-2, "the magnitudes should matter, or this test shows nothing"
