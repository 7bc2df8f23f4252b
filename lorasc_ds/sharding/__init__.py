"""Where the weights live. The only place that knows engines and collectives; the cascade sees `Backend`."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend

from lorasc_ds.errors import ConfigError
from lorasc_ds.sharding.backend import Backend, Slice
from lorasc_ds.sharding.plain import PlainBackend

__all__ = ["Backend", "PlainBackend", "Slice", "backend_for", "refuse_unsupported"]


def refuse_unsupported(accelerator: Accelerator) -> None:
    """Stop before anything is loaded where no backend covers what the launcher started.

    Raises:
        ConfigError: another engine, more than one process, or a setting that a run owns itself.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.distributed_type != DistributedType.NO or launched != 1:
        engine = accelerator.distributed_type.value
        raise ConfigError(
            f"the launcher started {launched} processes under engine {engine}, and this version trains on one process"
            " without an engine: leave out --num_processes, --multi_gpu, --use_deepspeed and --use_fsdp"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigError(
            f"the launcher sets --gradient_accumulation_steps {accelerator.gradient_accumulation_steps}:"
            " leave it out and set training.micro_batch_size"
        )
    compiler = accelerator.state.dynamo_plugin
    if compiler is not None and compiler.backend != DynamoBackend.NO:
        raise ConfigError(
            f"the launcher sets --dynamo_backend {compiler.backend.value.lower()}, and this"
            " version does not compile the model: leave it out, or take it from the accelerate config"
        )


def backend_for(optimizer: torch.optim.Optimizer) -> Backend:
    """The backend of this run; `refuse_unsupported` has seen that it is the plain one."""
    return PlainBackend(optimizer)
