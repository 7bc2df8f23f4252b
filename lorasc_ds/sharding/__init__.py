"""Where the weights live. The only place that knows engines and collectives; the cascade sees `Backend`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from lorasc_ds.errors import ConfigError
from lorasc_ds.sharding.backend import Backend, Engine, Slice
from lorasc_ds.sharding.engines import DeepSpeedEngine, TorchEngine, keep_scalars_whole
from lorasc_ds.sharding.failure import failing_together, speaking_once_per_node
from lorasc_ds.sharding.launch import Launch, detect, start
from lorasc_ds.sharding.optimizer_state import check_restartable
from lorasc_ds.sharding.processes import Processes, bound_waiting
from lorasc_ds.sharding.replicated import ReplicatedBackend, ZeroBackend

__all__ = [
    "Backend",
    "Engine",
    "Launch",
    "Processes",
    "Slice",
    "detect",
    "failing_together",
    "gathered",
    "overwriting",
    "place",
    "prepare_engine",
    "reach",
    "sharded_loading",
    "speaking_once_per_node",
    "start",
]


@contextmanager
def sharded_loading(launch: Launch, accelerator: Accelerator, dtype: str) -> Iterator[None]:
    """Inside, `from_pretrained` under ZeRO-3 cuts every weight up as it is made: no rank holds the whole model.

    Args:
        dtype: `model.dtype`, in which the weights are kept.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or launch.stage != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    from lorasc_ds.sharding.zero3 import cutting_no_scalars

    # The engine's own precision is off, since pairs stay float32; but this is how the weights learn their dtype.
    settings = plugin.deepspeed_config | {"bf16": {"enabled": dtype == "bfloat16"}}
    alive = HfDeepSpeedConfig(settings)  # transformers keeps a weak reference
    try:
        with cutting_no_scalars():
            yield
    finally:
        del alive
        unset_hf_deepspeed_config()


def prepare_engine(
    accelerator: Accelerator,
    processes: Processes,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: Sequence[nn.Parameter],
    merge_path: str,
    timeout_seconds: int,
) -> tuple[Engine, Backend]:
    """Hand model and optimizer to the engine, once, and find how its weights are reached.

    Args:
        weights: the frozen weights that boundaries edit.
        merge_path: `cascade.merge_path`.
        timeout_seconds: `training.ddp_timeout`.

    Raises:
        ConfigError: `merge_path` is `local`, and slices do not lie where they are looked for.
    """
    if accelerator.state.deepspeed_plugin is not None:
        keep_scalars_whole(model)
    model, prepared = accelerator.prepare(model, optimizer)
    bound_waiting(timedelta(seconds=timeout_seconds))
    backend = reach(prepared, processes, weights, merge_path)
    if accelerator.state.deepspeed_plugin is None:
        return TorchEngine(model, optimizer, processes), backend
    return DeepSpeedEngine(model, processes), backend


def place(accelerator: Accelerator, launch: Launch, model: nn.Module) -> nn.Module:
    """A model that is only to be scored, where it computes; under ZeRO-3 in an engine that gathers its weights."""
    if launch.stage == 3:
        return accelerator.prepare(model)
    return model.to(accelerator.device)


def gathered(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """Inside, parameters that `sharded_loading` has cut up are whole, to be read on every process."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(list(parameters))


@contextmanager
def overwriting(launch: Launch, parameter: nn.Parameter) -> Iterator[bool]:
    """Inside, a parameter that no engine has been given yet may be set; says whether this process is to do it."""
    if launch.stage != 3:
        yield True
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0):
        yield launch.rank == 0


def reach(optimizer: Any, processes: Processes, weights: Sequence[nn.Parameter], merge_path: str) -> Backend:
    """Find how the weights of a prepared model and its optimizer are reached.

    Args:
        optimizer: as `Accelerator.prepare` gave it, or torch's.
        weights: the frozen weights that boundaries edit.
        merge_path: `cascade.merge_path`.

    Raises:
        ConfigError: `merge_path` is `local`, and slices do not lie where they are looked for; or this optimizer keeps
            copies of the pairs that are not known here, or is no Adam.
    """
    if isinstance(optimizer, AcceleratedOptimizer):  # around torch's optimizer, or ZeRO's wrapper of one
        optimizer = optimizer.optimizer
    check_restartable(optimizer)
    if not hasattr(weights[0], "ds_id"):
        if isinstance(optimizer, torch.optim.Optimizer):
            return ReplicatedBackend(optimizer, processes)
        if hasattr(optimizer, "single_partition_of_fp32_groups"):
            return ZeroBackend(optimizer, processes)
        raise ConfigError(
            f"{type(optimizer).__name__} keeps copies of the pairs that are not known here: take torch's AdamW, or"
            " ZeRO-1, 2 or 3 without data_types.grad_accum_dtype"
        )
    from lorasc_ds.sharding.zero3 import GatherBackend, LocalBackend, local_edits_work

    gather, local = GatherBackend(optimizer, processes), LocalBackend(optimizer, processes)
    if merge_path == "gather":
        gather.merge_path = "gather: one weight at a time, as cascade.merge_path asks"
        return gather
    if local_edits_work(local, weights):
        local.merge_path = "local: each rank edits its own slices, tried on the live model"
        return local
    if merge_path == "local":
        raise ConfigError(
            "cascade.merge_path is local, but ZeRO-3 slices of this DeepSpeed lie elsewhere than in 0.19: take auto or"
            " gather"
        )
    gather.merge_path = "gather: one weight at a time, since a trial of local edits failed"
    return gather
