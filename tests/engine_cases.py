"""Runs under every engine, looped inside one set of processes per world size; `test_engines.py` judges what they write.

Started as `engine_cases.py GROUP FOLDER MODEL WIDE_MODEL` by as many processes as WORLD_SIZE says. Each case is given
pairs to merge, then trained for three experts of three steps and scored between; rank 0 writes `FOLDER/CASE.json`.
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import reference
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from conftest import base_weights
from deepspeed.utils import groups
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from lorasc_ds.algorithm.experts import Pair
from lorasc_ds.algorithm.ledger import Ledger, digest
from lorasc_ds.cli import parse_command_line
from lorasc_ds.errors import ConfigError, DivergedError
from lorasc_ds.models import load_model
from lorasc_ds.preparation import Preparation, prepare
from lorasc_ds.sharding import Launch, Slice, sharded_loading, start
from lorasc_ds.trainer import Trainer

RECIPE = Path(__file__).parents[1] / "launch" / "recipes" / "quickstart.yaml"
BATCH, RANK = 12, 5
LEARNING_RATE = 1e-2
SETTINGS = {
    "adapter.rank": RANK,
    "cascade.slow_retention": 0.6,
    "cascade.noise_intensity": 1.0,
    "task.train_examples": 33,  # three steps an epoch, the last of nine examples
    "task.dev_examples": 6,
    "task.test_examples": 2,
    "training.epochs": 3,
    "training.batch_size": BATCH,
    "training.learning_rate": LEARNING_RATE,
    "training.max_grad_norm": "null",
}
WHOLE = {"stage3_param_persistence_threshold": 0}  # nothing is small enough to be kept whole
BUCKETS = {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}
CPU = {"device": "cpu", "pin_memory": False}


@dataclass(frozen=True)
class Case:
    """`zero` is DeepSpeed's zero_optimization section, or None for torch alone; `measure` is what else is looked at."""

    name: str
    world_size: int
    zero: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    measure: str = "equality"


def cases() -> Iterator[Case]:
    gather, bf16 = {"cascade.merge_path": "gather"}, {"model.dtype": "bfloat16"}
    zero3 = {"stage": 3, **WHOLE}
    offload = {"offload_param": CPU, "offload_optimizer": CPU}
    for dtype, settings in (("float32", {}), ("bfloat16", bf16)):
        yield Case(f"ddp-{dtype}", 2, None, settings)
        yield Case(f"zero0-{dtype}", 2, {"stage": 0}, settings)
        yield Case(f"zero1-{dtype}", 2, {"stage": 1}, settings)
        yield Case(f"zero2-{dtype}", 2, {"stage": 2}, settings)
        yield Case(f"zero3-{dtype}", 2, zero3, settings)
        yield Case(f"zero3-gather-{dtype}", 2, zero3, settings | gather)
        yield Case(f"zero3-offload-{dtype}", 2, zero3 | offload, settings)
    yield Case("zero3-offload-gather", 2, zero3 | offload, gather)
    yield Case("zero3-offload-param", 2, zero3 | {"offload_param": CPU})
    yield Case("zero2-offload", 2, {"stage": 2, "offload_optimizer": CPU})
    yield Case("zero3-persisted", 2, {"stage": 3})
    yield Case("zero3-persisted-gather", 2, {"stage": 3}, gather)
    yield Case("zero3-sub-groups", 2, zero3 | {"sub_group_size": 100})
    yield Case("zero3-no-reuse", 2, zero3 | {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0})
    for name, zero in (("ddp", None), ("zero1", {"stage": 1}), ("zero2", {"stage": 2}), ("zero3", zero3)):
        yield Case(f"{name}-accumulated", 2, zero, {"training.micro_batch_size": 3})
        yield Case(f"{name}-clipped", 2, zero, {"training.max_grad_norm": 0.05})
        yield Case(f"{name}-every-step", 2, zero, {"cascade.experts": 9})
        yield Case(f"{name}-three", 3, zero)
    yield Case("zero3-offload-every-step", 2, zero3 | offload, {"cascade.experts": 9})
    yield Case("zero2-offload-accumulated", 2, {"stage": 2, "offload_optimizer": CPU}, {"training.micro_batch_size": 3})
    # The epoch's last step has fewer micro batches than the others, and one process has nothing left to do in it.
    short = {"task.train_examples": 27, "training.micro_batch_size": 3}
    yield Case("ddp-short", 2, None, short)
    for stage in (1, 2, 3):
        yield Case(f"zero{stage}-short", 2, {"stage": stage}, short)
    yield Case("zero2-offload-short", 2, {"stage": 2, "offload_optimizer": CPU}, short)
    yield Case("zero3-recomputed", 2, zero3, {"training.gradient_checkpointing": "true"})
    yield Case("ddp-recomputed", 2, None, {"training.gradient_checkpointing": "true"})
    yield Case("host-accumulator", 2, zero3, bf16 | {"cascade.accumulator": "host"})
    yield Case("zero3-three-bfloat16", 3, zero3, bf16)
    yield Case("zero3-three-gather", 3, zero3, gather)
    yield Case("zero3-three-offload", 3, zero3 | offload)
    yield Case("zero3-three-persisted", 3, {"stage": 3})
    yield Case("zero2-three-bfloat16", 3, {"stage": 2}, bf16)
    yield Case("loading-zero3", 2, zero3, {}, "loading")
    for path in ({}, gather):
        name = f"zero3-{'gather' if path else 'local'}"
        yield Case(f"memory-{name}", 2, zero3, path, "memory")
        yield Case(f"growth-{name}", 2, zero3, path, "growth")
    yield Case("memory-zero1", 2, {"stage": 1}, {}, "memory")
    yield Case("growth-zero1", 2, {"stage": 1}, {}, "growth")
    yield Case("growth-ddp", 2, None, {}, "growth")
    yield Case("layout-auto", 2, zero3, {}, "layout")
    yield Case("layout-local", 2, zero3, {"cascade.merge_path": "local"}, "layout")
    for stage in range(4):
        yield Case(f"zero{stage}-alone", 1, {"stage": stage})
    yield Case("zero1-four", 4, {"stage": 1})
    yield Case("zero3-four", 4, zero3)
    yield Case("zero3-four-hpz", 4, zero3 | {"zero_hpz_partition_size": 2})
    yield Case("zero3-four-hpz-gather", 4, zero3 | {"zero_hpz_partition_size": 2}, gather)
    yield Case("zero3-four-hpz-bfloat16", 4, zero3 | {"zero_hpz_partition_size": 2}, bf16)


class PeakResident:
    """The most anonymous memory this process held inside, above what it held before; files mapped are not counted."""

    def __enter__(self) -> PeakResident:
        self.before, self.peak, self.left = self.held(), 0, threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def watch(self) -> None:
        while not self.left.wait(0.002):
            self.peak = max(self.peak, self.held() - self.before)

    def held(self) -> int:
        (line,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(line) * 1024

    def __exit__(self, *_: object) -> None:
        self.left.set()
        self.watcher.join()


def load(case: Case, model: Path, rank: int) -> tuple[Preparation, Accelerator, PreTrainedModel, int]:
    """What `train.run` has before it makes the trainer; and the most memory that loading the weights took."""
    settings = SETTINGS | {"model.name_or_path": model} | case.settings
    invocation = parse_command_line([f"--{key}={value}" for key, value in settings.items()], RECIPE)
    assert not isinstance(invocation, str)
    config = invocation.config
    engine = None
    if case.zero is not None:
        engine = {"zero_optimization": BUCKETS | case.zero, "zero_force_ds_cpu_optimizer": False}
    launch = Launch(rank, case.world_size, rank, engine, "the test")
    preparation = prepare(config, rank, case.world_size)
    accelerator = start(
        launch,
        micro_batch_size=preparation.data.micro_batch_size,
        accumulation=preparation.accumulation,
        max_grad_norm=config.training.max_grad_norm,
        timeout_seconds=60,
    )
    with PeakResident() as loading, sharded_loading(launch, accelerator, config.model.dtype):
        module = load_model(config.model)
    return preparation, accelerator, module, loading.peak


def make_trainer(case: Case, model: Path, folder: Path, rank: int) -> Trainer:
    """The run of a case, as `train.run` begins it."""
    preparation, accelerator, module, _ = load(case, model, rank)
    return Trainer(preparation, module, accelerator, folder)


def given_pair(expert: int, position: int, shape: tuple[int, int]) -> Pair:
    """Some pair, the same on every engine."""
    generator = torch.Generator().manual_seed(1000 * expert + position)
    return Pair(
        torch.randn(RANK, shape[1], generator=generator) * 0.1, torch.randn(shape[0], RANK, generator=generator) * 0.02
    )


def trained(trainer: Trainer) -> dict[str, Any]:
    """Train as `train.train` does, with a virtual close and an evaluation before every boundary."""
    losses, norms, digests, scores, reports = [], [], [], [], []
    trainer.cascade.ledger.experts.clear()
    for expert in trainer.preparation.plan:
        trainer.cascade.open_expert(expert)
        digests.append(trainer.weights_sha256())
        for step in range(expert.start, expert.stop):
            report = trainer.training_step(step, trainer.preparation.learning_rate(expert, step))
            losses.append(report.loss)
            norms.append(report.grad_norm)
        few = trainer.preparation.plan.experts == 3  # an evaluation costs more than a step
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
    return {
        "losses": losses,
        "norms": norms,
        "digests": digests,
        "scores": scores,
        "reports": reports,
        "base": trainer.base_sha256,
    }


def merged_from_given_pairs(trainer: Trainer) -> list[str]:
    """Digests after each boundary of experts whose pairs are written, not trained."""
    digests = []
    for expert in trainer.preparation.plan:
        trainer.cascade.open_expert(expert)
        digests.append(trainer.weights_sha256())
        for position, one in enumerate(trainer.weights):
            trainer.cascade.write_pair(one, given_pair(expert.index, position, one.shape))
        trainer.cascade.close_expert(expert)
        digests.append(trainer.weights_sha256())
    return digests


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
    rate = trainer.engine.optimizer.param_groups[0]["lr"] if trainer.engine.name in ("plain", "ddp") else None
    rate = rate or trainer.engine.model.optimizer.param_groups[0]["lr"]
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

    def copy_only(parameter: Any, value: Tensor) -> None:
        if not hasattr(parameter, "ds_id"):
            parameter.detach().copy_(value)
            return
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
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
    """What is said where one rank's gradient, or its loss, is not finite; and how far `B` then moved."""
    one = trainer.weights[0]
    before = [whole(other.B) for other in trainer.weights]
    last = trainer.processes.rank == trainer.processes.world_size - 1
    said = []
    for spoil in (one.B.register_hook, trainer.module.lm_head.register_forward_hook):
        hook = spoil(lambda *values: values[-1] * torch.inf) if last else None
        try:
            trainer.training_step(0, LEARNING_RATE)
            said.append("nothing")
        except DivergedError as error:
            said.append(str(error))
        if hook is not None:
            hook.remove()
    moved = max(float((whole(other.B) - old).abs().max()) for other, old in zip(trainer.weights, before, strict=True))
    return {"said": said, "moved": moved}


def wrong_layout(case: Case, model: Path, folder: Path, rank: int) -> dict[str, str]:
    """Which merge path is taken where slices lie elsewhere than they are looked for."""
    from lorasc_ds.sharding.zero3 import LocalBackend

    own = LocalBackend.own

    def own_of_another(self: LocalBackend, parameter: Any) -> Slice:
        part = own(self, parameter)
        return Slice(part.flat, len(part.flat) - part.start)

    LocalBackend.own = own_of_another
    try:
        trainer = make_trainer(case, model, folder, rank)
        return {"merge_path": trainer.backend.merge_path}
    except ConfigError as error:
        return {"refused": str(error)}
    finally:
        LocalBackend.own = own


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
        for one in trainer.weights:
            with trainer.backend.edit(one.weight) as part:
                part.flat.add_(0)

    return edit


def live_bytes() -> int:
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor.device.type == "cpu")


def hooks(trainer: Trainer) -> int:
    return sum(
        len(getattr(module, name))
        for module in trainer.module.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


def growth(trainer: Trainer) -> dict[str, list[int]]:
    """Live bytes and module hooks after each of twenty boundaries, and whether ZeRO-3 kept its fetch trace."""
    expert = trainer.preparation.plan.expert(1)
    sizes, counts, traces = [], [], []
    for _ in range(20):
        trainer.cascade.ledger.experts.clear()
        trainer.cascade.open_expert(expert)
        trainer.training_step(0, LEARNING_RATE)
        trainer.cascade.close_expert(expert)
        sizes.append(live_bytes())
        counts.append(hooks(trainer))
        if trainer.engine.name == "zero3":
            traces.append(trainer.backend.optimizer.parameter_offload.get_param_coordinator().is_complete_trace())
    return {"bytes": sizes, "hooks": counts, "traces": traces}


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        known = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for one in tree_leaves(outputs):
            if isinstance(one, Tensor):
                storage = one.untyped_storage()
                if storage._cdata not in self.live and storage._cdata not in known:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return outputs


def boundary_peak(trainer: Trainer) -> dict[str, int]:
    """Bytes above steady state during a boundary, without its probes, which are forward passes; and one weight's."""
    plan = trainer.preparation.plan
    trainer.cascade.ledger.experts.clear()
    trainer.cascade.open_expert(plan.expert(1))
    trainer.training_step(0, LEARNING_RATE)
    logits = trainer.cascade.probe()
    trainer.cascade.probe = lambda: logits
    if hasattr(trainer.backend, "settle"):
        trainer.backend.settle(trainer.weights[0].weight)
    with PeakBytes() as boundary:
        trainer.cascade.close_expert(plan.expert(1))
        trainer.cascade.open_expert(plan.expert(2))
    one = trainer.weights[0]
    return {"peak": boundary.peak, "weight": one.shape[0] * one.shape[1] * one.weight.element_size()}


@contextmanager
def clean_state() -> Iterator[None]:
    """Many engines live one after the other in one set of processes."""
    try:
        yield
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        unset_hf_deepspeed_config()
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ's
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]
        gc.collect()


def replayed(trainer: Trainer, model: Path) -> str:
    """Digest of the ledger replayed on one process from the pretrained weights."""
    ledger = Ledger.load(trainer.cascade.ledger.directory)
    base = base_weights(model, list(ledger.weights), getattr(torch, ledger.base.dtype))
    return digest(weight for _, weight in ledger.replay(base.__getitem__))


def run_case(case: Case, model: Path, folder: Path, rank: int) -> dict[str, Any]:
    if case.measure == "loading":
        *_, module, peak = load(case, model, rank)
        size = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in module.parameters())
        return {"peak": peak, "model": size}
    if case.measure == "layout":
        return wrong_layout(case, model, folder, rank)
    trainer = make_trainer(case, model, folder, rank)
    found: dict[str, Any] = {"engine": trainer.engine.name, "merge_path": trainer.backend.merge_path}
    if case.measure == "memory":
        return found | boundary_peak(trainer)
    if case.measure == "growth":
        return found | growth(trainer)
    found["given"] = merged_from_given_pairs(trainer)
    if rank == 0:
        found["replayed"] = replayed(trainer, model)
    found |= trained(trainer)
    found["first_step"] = first_step_after_a_boundary(trainer)
    if case.zero is not None:
        found["collectives"] = collectives_of(edit_all(trainer))
        if case.zero["stage"] > 0:
            found["planted_fault"] = planted_fault(trainer)
    found["not_finite"] = not_finite_on_one_rank(trainer)
    return found


def main(group: str, folder: Path, model: Path, wide_model: Path) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    for case in cases():
        if case.world_size != world_size or (case.measure == "loading") != group.startswith("loading"):
            continue
        began = time.perf_counter()
        directory = folder / case.name
        directory.mkdir(exist_ok=True)
        with clean_state():
            try:
                found = run_case(case, wide_model if case.measure in ("memory", "loading") else model, directory, rank)
            except Exception:
                found = {"error": traceback.format_exc()}
        if rank == 0:
            found["seconds"] = time.perf_counter() - began
            (folder / f"{case.name}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
