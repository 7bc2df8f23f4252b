"""Runs under every engine, looped inside one set of processes per world size; `test_engines.py` judges what they write.

Started as `engine_cases.py GROUP FOLDER MODEL WIDE_MODEL` by as many processes as WORLD_SIZE says. Each case is given
pairs to merge, then trained for three experts of three steps and scored between; rank 0 writes `FOLDER/CASE.json`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from deepspeed.utils import groups
from engine_measures import (
    LEARNING_RATE,
    RANK,
    boundary_peak,
    collectives_of,
    edit_all,
    first_step_after_a_boundary,
    growth,
    left_and_taken_up,
    merged_from_given_pairs,
    not_finite_on_one_rank,
    planted_fault,
    replayed,
    trained,
    turned_with_given_pairs,
)
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from lorasc_ds.adapters import AdaptedWeight
from lorasc_ds.benchmark.memory import PeakResident
from lorasc_ds.cli import parse_command_line
from lorasc_ds.errors import ConfigError
from lorasc_ds.models import load_model
from lorasc_ds.preparation import Preparation, attach_adapters, prepare
from lorasc_ds.sharding import Launch, Slice, sharded_loading, start
from lorasc_ds.sharding.launch import quieten_deepspeed
from lorasc_ds.stopping import Stopping
from lorasc_ds.trainer import Trainer

RECIPE = Path(__file__).parents[1] / "launch" / "recipes" / "quickstart.yaml"
BATCH = 12
M_MMAP_THRESHOLD = -3  # of malloc.h
SETTINGS = {
    "adapter.rank": RANK,
    "cascade.slow_retention": 0.6,
    "cascade.noise_intensity": 1.0,
    "task.train_examples": 33,  # three steps an epoch, the last of nine examples
    "task.dev_examples": 6,
    "task.test_examples": 2,
    "training.epochs": 3,
    "training.batch_size": BATCH,
    "training.eval_batch_size": 3,  # dev is two batches
    "training.learning_rate": LEARNING_RATE,
    "training.max_grad_norm": "null",
}
WHOLE = {"stage3_param_persistence_threshold": 0}  # nothing is small enough to be kept whole
BUCKETS = {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}
CPU = {"device": "cpu", "pin_memory": False}
NOISYTUNE = {"cascade.strategy": "noisytune", "cascade.noise_on": "all"}
RELORA = {"cascade.strategy": "relora", "cascade.prune_fraction": 0.5}
AUTO = {"cascade.slow_retention": "auto", "cascade.noise_intensity": "auto"}
# With these an engine holds and restarts the pairs as it does without them.
RESTARTED_ALIKE = {
    "cascade.accumulator",
    "cascade.experts",
    "training.gradient_checkpointing",
    "training.max_grad_norm",
    "training.micro_batch_size",
}


@dataclass(frozen=True)
class Case:
    """`zero` is DeepSpeed's zero_optimization section, or None for torch alone; `measure` is what else is looked at."""

    name: str
    world_size: int
    zero: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    measure: str = "equality"

    @property
    def looks_at_the_restart(self) -> bool:
        two_show_it = self.world_size > 2 and "model.dtype" in self.settings
        return self.measure == "equality" and not two_show_it and not RESTARTED_ALIKE & self.settings.keys()

    @property
    def is_taken_up(self) -> bool:
        return self.world_size == 2 and (self.looks_at_the_restart or self.measure == "method")


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
    for name, zero in (
        ("ddp", None),
        ("zero0", {"stage": 0}),
        ("zero1", {"stage": 1}),
        ("zero2", {"stage": 2}),
        ("zero3", zero3),
    ):
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
    engines = (("ddp", None), ("zero2", {"stage": 2}), ("zero3", zero3))
    for name, zero in engines:
        for adapter in ("lora+", "dora", "lora-fa"):
            yield Case(f"{name}-{adapter}", 2, zero, {"adapter.method": adapter})
        yield Case(f"{name}-noisytune", 2, zero, NOISYTUNE, "method")
        yield Case(f"{name}-cola", 2, zero, {"cascade.strategy": "cola", "cascade.experts": 3}, "method")
        yield Case(f"{name}-relora", 2, zero, RELORA, "method")
        yield Case(f"{name}-auto", 2, zero, AUTO, "method")
    yield Case("zero3-gather-dora", 2, zero3, gather | {"adapter.method": "dora"})
    yield Case("zero3-offload-dora", 2, zero3 | offload, {"adapter.method": "dora"})
    yield Case("zero3-dora-bfloat16", 2, zero3, bf16 | {"adapter.method": "dora"})
    yield Case("zero3-sub-groups-dora", 2, zero3 | {"sub_group_size": 100}, {"adapter.method": "dora"})
    yield Case("zero3-gather-lora-fa", 2, zero3, gather | {"adapter.method": "lora-fa"})
    yield Case("zero3-offload-relora", 2, zero3 | offload, RELORA, "method")
    yield Case("zero2-offload-relora", 2, {"stage": 2, "offload_optimizer": CPU}, RELORA, "method")
    yield Case("zero3-sub-groups-relora", 2, zero3 | {"sub_group_size": 100}, RELORA, "method")
    yield Case("zero3-relora-random", 2, zero3, RELORA | {"cascade.prune_method": "random"}, "method")
    yield Case("zero3-relora-dora", 2, zero3, RELORA | {"adapter.method": "dora"}, "method")
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
    hpz = zero3 | {"zero_hpz_partition_size": 2}
    yield Case("zero3-four-hpz", 4, hpz)
    if "LORASC_LONG" in os.environ:  # as in .ci/long: four processes on two cores take their time
        yield Case("zero1-four", 4, {"stage": 1})
        yield Case("zero3-four", 4, zero3)
        yield Case("zero3-four-hpz-gather", 4, hpz, gather)
        yield Case("zero3-four-hpz-bfloat16", 4, hpz, bf16)


def load(
    case: Case, model: Path, rank: int
) -> tuple[Preparation, Accelerator, PreTrainedModel, list[AdaptedWeight], int]:
    """What `train.run` has before it makes the trainer; and the most memory that loading the weights took."""
    settings = SETTINGS | {"model.name_or_path": model} | case.settings
    invocation = parse_command_line([f"--{key}={value}" for key, value in settings.items()], RECIPE)
    assert not isinstance(invocation, str)
    config = invocation.config
    engine = None
    if case.zero is not None:
        engine = {"zero_optimization": BUCKETS | case.zero, "zero_force_ds_cpu_optimizer": False}
    launch = Launch(rank, case.world_size, engine)
    preparation = prepare(config, rank, case.world_size)
    for split in preparation.task.evaluation_splits[1:]:  # scored as dev is
        del preparation.splits[split]
    accelerator = start(
        launch,
        micro_batch_size=preparation.data.micro_batch_size,
        accumulation=preparation.accumulation,
        max_grad_norm=config.training.max_grad_norm,
        timeout_seconds=60,
    )
    with PeakResident() as loading, sharded_loading(launch, accelerator, config.model.dtype):
        module = load_model(config.model)
        weights = attach_adapters(config, module)
    return preparation, accelerator, module, weights, loading.peak


def make_trainer(case: Case, model: Path, folder: Path, rank: int) -> Trainer:
    """The run of a case, as `train.run` begins it."""
    preparation, accelerator, module, weights, _ = load(case, model, rank)
    return Trainer(preparation, module, weights, accelerator, folder, Stopping(folder))


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


def run_case(case: Case, model: Path, folder: Path, rank: int) -> dict[str, Any]:
    if case.measure == "loading":
        _, _, module, _, peak = load(case, model, rank)
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
    base = trainer.live.copies()
    found["given"] = merged_from_given_pairs(trainer)
    found["ledger"] = trainer.cascade.ledger.sha256()
    if case.looks_at_the_restart:
        found["turned"] = turned_with_given_pairs(trainer, base)
    if rank == 0:
        found["replayed"] = replayed(trainer, model)
    found |= trained(trainer)
    if case.zero is not None:
        found["collectives"] = collectives_of(edit_all(trainer))
    if case.looks_at_the_restart:
        found["first_step"] = first_step_after_a_boundary(trainer)
        if case.zero is not None and case.zero["stage"] > 0:
            found["planted_fault"] = planted_fault(trainer)
    if case.is_taken_up:
        found["taken_up"] = left_and_taken_up(trainer)
    if case.measure == "equality":
        found["not_finite"] = not_finite_on_one_rank(trainer)
    return found


def main(group: str, *paths: str) -> None:
    folder, model, wide_model = map(Path, paths)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if group.startswith("loading"):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 131072)  # what is freed is given back
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    quieten_deepspeed()  # else a fresh home directory sees a compilation, as without `detect`
    gc.freeze()  # what the imports made is not looked through at every collection
    for case in cases():
        if case.world_size != world_size or (case.measure == "loading") != group.startswith("loading"):
            continue
        began = time.perf_counter()
        directory = folder / case.name
        directory.mkdir(exist_ok=True)
        with clean_state():
            try:
                found = run_case(case, wide_model if case.measure in ("memory", "loading") else model, directory, rank)
            except Exception:  # written down for test_engines.py to show; the next cases can still run
                found = {"error": traceback.format_exc()}
        if rank == 0:
            found["seconds"] = time.perf_counter() - began
            (folder / f"{case.name}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
