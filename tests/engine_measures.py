"""What `engine_cases.py` does with the run of a case, and what it reads from the live engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import reference
import torch
from conftest import base_weights
from torch import Tensor

from lorasc_ds.algorithm.experts import Pair
from lorasc_ds.algorithm.ledger import Ledger, digest
from lorasc_ds.benchmark.memory import PeakBytes, live_bytes
from lorasc_ds.errors import DivergedError, PreemptedError
from lorasc_ds.safe_points import Progress, restore_adapters, state_of
from lorasc_ds.trainer import Trainer

RANK = 5
LEARNING_RATE = 1e-2


def given_pair(expert: int, position: int, shape: tuple[int, int]) -> Pair:
    """Some pair, the same on every engine."""
    generator = torch.Generator().manual_seed(1000 * expert + position)
    return Pair(
        torch.randn(RANK, shape[1], generator=generator) * 0.1, torch.randn(shape[0], RANK, generator=generator) * 0.02
    )


def trained(trainer: Trainer) -> dict[str, Any]:
    """Train as `train.train` does, with a virtual close and an evaluation before every boundary."""
    losses, norms, digests, scores, reports, choices, magnitudes = [], [], [], [], [], [], []
    trainer.cascade.ledger.experts.clear()
    for expert in trainer.preparation.plan:
        opening = trainer.cascade.open_expert(expert)
        digests.append(trainer.weights_sha256())
        for step in range(expert.start, expert.stop):
            report = trainer.training_step(step, trainer.preparation.learning_rate(expert, step)).read()
            losses.append(report.loss)
            norms.append(report.grad_norm)
        few = trainer.preparation.plan.experts <= 3  # an evaluation costs more than a step
        with trainer.cascade.as_if_closed():
            if few:
                scores.append(trainer.evaluate()["dev"])
            virtual = trainer.weights_sha256()
        closing = trainer.cascade.close_expert(expert)
        digests.append(trainer.weights_sha256())
        assert digests[-1] == virtual
        if few:
            scores.append(trainer.evaluate()["dev"])
        reports.append([closing.norm, closing.lost, closing.drift, closing.averaging_change])
        choices.append([opening.noise_intensity, opening.pruned, closing.slow_retention])
        magnitudes.append(digest(trainer.live.persistent().values()))
    return {
        "losses": losses,
        "norms": norms,
        "digests": digests,
        "scores": scores,
        "reports": reports,
        "choices": choices,
        "magnitudes": magnitudes,
        "shipped": trainer.live.shipped_sha256(),
        "others": trainer.live.of_main(digest(map(trainer.backend.full, trainer.live.other_matrices.values()))),
        "base": trainer.base_sha256,
    }


def merged_from_given_pairs(trainer: Trainer) -> list[str]:
    """Digests after each boundary of experts whose pairs are written, not trained; `trained` asks the probes."""
    digests = []
    trainer.cascade.checks = False
    for expert in trainer.preparation.plan:
        trainer.cascade.open_expert(expert)
        digests.append(trainer.weights_sha256())
        trainer.cascade.live.write_pairs(
            {one.name: given_pair(expert.index, n, one.shape) for n, one in enumerate(trainer.weights)}
        )
        trainer.cascade.close_expert(expert)
        digests.append(trainer.weights_sha256())
    trainer.cascade.checks = True
    return digests


def turned_with_given_pairs(trainer: Trainer, base: dict[str, Tensor]) -> list[str]:
    """The same from the pretrained weights again, one pass from expert to expert: the last digest and the ledger's."""
    cascade, plan = trainer.cascade, trainer.preparation.plan
    cascade.ledger.experts.clear()
    trainer.live.write_accumulators(lambda name, start, stop: base[name].float())
    cascade.checks = False
    for expert in plan:
        cascade.open_expert(expert)
        trainer.live.write_pairs(
            {one.name: given_pair(expert.index, n, one.shape) for n, one in enumerate(trainer.weights)}
        )
        last = expert.index == plan.experts
        cascade.close_expert(expert, None if last or not cascade.can_turn else plan.expert(expert.index + 1))
    cascade.checks = True
    return [trainer.weights_sha256(), cascade.ledger.sha256()]


def whole(parameter: Any) -> Tensor:
    """What computes, gathered by DeepSpeed's documented call."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().clone()
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def master(trainer: Trainer, parameter: Any) -> Tensor:
    """The float32 master by DeepSpeed's documented call; torch's optimizers have the parameter itself."""
    if trainer.engine.name in ("plain", "ddp", "zero0"):
        return parameter.detach()
    if not parameter.requires_grad:  # LoRA-FA's A
        return whole(parameter)
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def gradient(trainer: Trainer, parameter: Any) -> Tensor:
    if trainer.engine.name in ("plain", "ddp", "zero0"):
        return parameter.grad.clone()
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter).clone()


def first_step_after_a_boundary(trainer: Trainer) -> dict[str, float]:
    """How far the restarted engine is from a fresh pair, and its first step from Adam's first, relative to the rate."""
    plan = trainer.preparation.plan
    trainer.cascade.ledger.experts.clear()
    trainer.cascade.open_expert(plan.expert(1))
    trainer.training_step(0, LEARNING_RATE)
    trainer.training_step(1, LEARNING_RATE)
    trainer.cascade.close_expert(plan.expert(1))
    trainer.cascade.open_expert(plan.expert(2))
    fresh, zero = 0.0, 0.0
    for position, one in enumerate(trainer.weights):
        A = torch.from_numpy(reference.fresh_A(RANK, one.shape[1], position, 2, 0))
        for held in (whole(one.A), master(trainer, one.A)):
            fresh = max(fresh, float((held.cpu() - A).abs().max()))
        for held in (whole(one.B), master(trainer, one.B)):
            zero = max(zero, float(held.abs().max()))
    gradients: list[Tensor] = []
    update = trainer.engine.update

    def keep_gradients(learning_rate: float, max_grad_norm: float | None) -> Tensor:
        gradients.extend(gradient(trainer, one.B) for one in trainer.weights)
        return update(learning_rate, max_grad_norm)

    trainer.engine.update = keep_gradients
    trainer.training_step(2, LEARNING_RATE)
    trainer.engine.update = update
    optimizer = trainer.engine.optimizer if trainer.engine.name in ("plain", "ddp") else trainer.engine.model.optimizer
    (rate,) = (group["lr"] for group in optimizer.param_groups if group["role"] in ("pairs", "B"))
    off, moved = 0.0, 0.0
    for one, g in zip(trainer.weights, gradients, strict=True):
        expected = -rate * g / (g.abs() + 1e-8)
        for held in (whole(one.B), master(trainer, one.B)):
            off = max(off, float((held - expected).abs().max()) / rate)
        moved = max(moved, float(expected.abs().max()) / rate)
    return {"A_off": fresh, "B_off": zero, "step_off": off, "moved": moved, "rate": rate}


def planted_fault(trainer: Trainer) -> str:
    """What is said where only the copy that computes is set, and the master is forgotten."""
    plan = trainer.preparation.plan
    write = trainer.backend.write

    def copy_only(parameters: list[Any], values: list[Tensor]) -> None:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(parameters, modifier_rank=0, enabled=hasattr(parameters[0], "ds_id")):
            for parameter, value in zip(parameters, values, strict=True):
                parameter.detach().copy_(value)

    trainer.training_step(0, LEARNING_RATE)
    trainer.backend.write = copy_only
    try:
        trainer.cascade.open_expert(plan.expert(1))
    except DivergedError as error:
        return str(error)
    finally:
        trainer.backend.write = write
    return ""


def not_finite_on_one_rank(trainer: Trainer) -> dict[str, Any]:
    """Whether a step counts as finite where one rank's gradient, or its loss, is not; how far `B` then moved, and how
    far the step after it is from the same step without all that, relative to the rate."""
    one = trainer.weights[0]
    before = [whole(other.B) for other in trainer.weights]
    last = trainer.processes.rank == trainer.processes.world_size - 1
    finite = []
    for spoil in (one.B.register_hook, trainer.module.lm_head.register_forward_hook):
        hook = spoil(lambda *values: values[-1] * torch.inf) if last else None
        finite.append(trainer.training_step(0, LEARNING_RATE).read().finite)
        if hook is not None:
            hook.remove()
    moved = max(float((whole(other.B) - old).abs().max()) for other, old in zip(trainer.weights, before, strict=True))
    pairs, magnitudes = trainer.live.pairs(), trainer.live.persistent()
    steps = []
    for _ in range(2):
        trainer.live.write_pairs(pairs)
        trainer.live.write_persistent(magnitudes)
        trainer.backend.empty_optimizer(trainer.live.pair_parameters)
        trainer.training_step(0, LEARNING_RATE)
        steps.append([whole(other.B) for other in trainer.weights])
    off = max(float((one - two).abs().max()) / LEARNING_RATE for one, two in zip(*steps, strict=True))
    return {"finite": finite, "moved": moved, "off": off}


def left_and_taken_up(trainer: Trainer) -> dict[str, Any]:
    """An expert is stopped as it is scored, and its state saved, spoiled and restored: what is not as it was."""
    expert = trainer.preparation.plan.expert(1)
    trainer.live.restart_pairs(1)
    trainer.backend.empty_optimizer(trainer.live.pair_parameters)
    trainer.training_step(0, LEARNING_RATE)
    before, pairs = trainer.weights_sha256(), trainer.live.pairs()
    try:
        with trainer.cascade.as_if_closed():
            raise PreemptedError("the test")
    except PreemptedError:
        undone = trainer.weights_sha256() == before and not trainer.live.differing(pairs)
    recorded = SimpleNamespace(state=dict)
    state, tensors = trainer.processes.share(state_of(trainer, cast(Any, recorded), Progress.after(0, expert)))
    ends = []
    for spoiled in (False, True):
        if spoiled:
            trainer.training_step(0, 10 * LEARNING_RATE)
            restore_adapters(trainer, True, tensors, state["optimizer_steps"])
        trainer.training_step(1, LEARNING_RATE)
        ends.append(trainer.live.pairs())
    same = all(torch.equal(one, two) for name in ends[0] for one, two in zip(ends[0][name], ends[1][name], strict=True))
    counts = {count for name, count in state["optimizer_steps"].items() if not name.endswith(".magnitude")}
    return {"undone": undone, "same": same, "counts": sorted(counts)}


def collectives_of(work: Callable[[], None]) -> int:
    """How many collectives DeepSpeed issues inside."""
    from deepspeed.comm import comm

    count = 0
    kind = type(comm.cdb)
    names = ("all_gather_into_tensor", "broadcast", "all_reduce")
    calls = {name: getattr(kind, name) for name in names}

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return call(*args, **kwargs)

        return counted

    for name, call in calls.items():
        setattr(kind, name, counting(call))
    try:
        work()
    finally:
        for name, call in calls.items():
            setattr(kind, name, call)
    return count


def edit_all(trainer: Trainer) -> Callable[[], None]:
    def edit() -> None:
        for parts in trainer.backend.edit([one.weight for one in trainer.weights]):
            for part in parts:
                part.flat.add_(0)

    return edit


def hooks(trainer: Trainer) -> int:
    return sum(
        len(getattr(module, name))
        for module in trainer.module.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


def growth(trainer: Trainer) -> dict[str, list[int]]:
    """Module hooks and whether ZeRO-3 kept its fetch trace after each of twenty boundaries; live bytes after two."""
    expert = trainer.preparation.plan.expert(1)
    sizes, counts, traces = [], [], []
    for boundary in range(20):
        trainer.cascade.ledger.experts.clear()
        trainer.cascade.open_expert(expert)
        trainer.training_step(0, LEARNING_RATE)
        trainer.cascade.close_expert(expert)
        if boundary in (1, 19):  # counting takes longer than all else here
            sizes.append(live_bytes())
        counts.append(hooks(trainer))
        if trainer.engine.name == "zero3":
            traces.append(trainer.backend.optimizer.parameter_offload.get_param_coordinator().is_complete_trace())
    return {"bytes": sizes, "hooks": counts, "traces": traces}


def boundary_peak(trainer: Trainer) -> dict[str, int]:
    """Bytes above steady state during a boundary, without its probes, which are forward passes; and one weight's."""
    plan = trainer.preparation.plan
    trainer.cascade.ledger.experts.clear()
    trainer.cascade.open_expert(plan.expert(1))
    trainer.training_step(0, LEARNING_RATE)
    logits = trainer.cascade.probe()
    trainer.cascade.probe = lambda: logits
    if hasattr(trainer.backend, "settle"):
        trainer.backend.settle([trainer.weights[0].weight])
    with PeakBytes() as boundary:
        trainer.cascade.close_expert(plan.expert(1))
        trainer.cascade.open_expert(plan.expert(2))
    one = trainer.weights[0]
    return {"peak": boundary.peak, "weight": one.shape[0] * one.shape[1] * one.weight.element_size()}


def replayed(trainer: Trainer, model: Path) -> str:
    """Digest of the ledger replayed on one process from the pretrained weights."""
    ledger = Ledger.load(trainer.cascade.ledger.directory)
    base = base_weights(model, list(ledger.weights), getattr(torch, ledger.base.dtype))
    return digest(weight for _, weight in ledger.replay(base.__getitem__))
