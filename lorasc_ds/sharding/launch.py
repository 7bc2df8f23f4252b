"""What the launcher started: how many processes, under which engine; and the process group that they form."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs

from lorasc_ds.errors import ConfigError
from lorasc_ds.sharding.engine_config import check_engine_config, fill_engine_config, load_engine_config, stage_of

# What `accelerate launch` was asked for, by the variable it sets, and why it cannot be had.
REFUSED = {
    "ACCELERATE_USE_FSDP": "--use_fsdp: FSDP is not supported; take --use_deepspeed with ds_configs/zero3.json",
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm: Megatron-LM is not supported; take --use_deepspeed",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config: tensor, context and sequence parallel are not"
    " supported; take data parallel or --use_deepspeed with ds_configs/zero3.json",
}


@dataclass(frozen=True, slots=True)
class Launch:
    """What the launcher started.

    Args:
        rank, world_size: of this process over all nodes.
        engine: DeepSpeed settings, checked, with "auto" where the run's configuration owns the number; None
            without DeepSpeed.
        note: what the launcher was asked for and is not done; None where there is nothing.
    """

    rank: int
    world_size: int
    engine: dict[str, Any] | None
    note: str | None = None

    @property
    def stage(self) -> int | None:
        """The ZeRO stage; None without DeepSpeed."""
        return None if self.engine is None else stage_of(self.engine)


def detect(deepspeed: Path | None, environment: Mapping[str, str] = os.environ) -> Launch:
    """Read what the launcher says, before a process group or a weight exists.

    Raises:
        ConfigError: an engine or a setting that no backend covers; or processes without a launcher's numbers.
    """
    for variable, reason in REFUSED.items():
        if environment.get(variable, "false").lower() == "true":
            raise ConfigError(f"accelerate launch {reason}")
    accumulation = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        raise ConfigError(
            f"accelerate launch --gradient_accumulation_steps {accumulation}: leave it out and set"
            " training.micro_batch_size"
        )
    clipping = environment.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    if clipping.lower() != "none":
        raise ConfigError(
            f"accelerate launch --gradient_clipping {clipping}: leave it out and set training.max_grad_norm"
        )
    compiler = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() != "no":
        raise ConfigError(
            f"accelerate launch --dynamo_backend {compiler.lower()}: leave it out, or take it from the accelerate"
            " config, and set training.compile"
        )
    if "WORLD_SIZE" not in environment:
        for variable in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
            if int(environment.get(variable, "1")) > 1:
                raise ConfigError(
                    f"{variable} is {environment[variable]}, but no launcher says which process this is: start one"
                    " torchrun per node, as launch/slurm/train.sbatch does"
                )
    engine, source = engine_settings(deepspeed, environment)
    if engine is not None:
        quieten_deepspeed()
        check_engine_config(engine, source)
        if environment.get("DS_ACCELERATOR") == "cpu" and torch.cuda.is_available():
            raise ConfigError(
                "DS_ACCELERATOR is cpu, but there is a GPU that Accelerate takes: set CUDA_VISIBLE_DEVICES="
            )
        if environment.get("ACCELERATE_USE_CPU", "false").lower() == "true":
            raise ConfigError(
                f"{source}: accelerate launch --cpu switches DeepSpeed off; set DS_ACCELERATOR=cpu instead of --cpu"
            )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return Launch(
        note=None
        if precision == "no"
        else f"mixed_precision {precision} of accelerate is not used: model.dtype owns it",
        rank=int(environment.get("RANK", "0")),
        world_size=int(environment.get("WORLD_SIZE", "1")),
        engine=engine,
    )


def engine_settings(deepspeed: Path | None, environment: Mapping[str, str]) -> tuple[dict[str, Any] | None, str]:
    """DeepSpeed settings from `--deepspeed`, from the file `accelerate launch` names, or from its flags."""
    by_accelerate = environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if deepspeed is not None:
        if by_accelerate and file.lower() != "none" and Path(file).resolve() != deepspeed.resolve():
            raise ConfigError(
                f"--deepspeed {deepspeed}, but accelerate launch names {file}: give the file in one place"
            )
        source = f"--deepspeed {deepspeed}"
        return load_engine_config(deepspeed, source), source
    if not by_accelerate:
        return None, ""
    if file.lower() != "none":
        source = f"accelerate's deepspeed_config_file {file}"
        return load_engine_config(Path(file), source), source
    settings: dict[str, Any] = {
        "stage": int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")),
        "reduce_bucket_size": 5_000_000,  # DeepSpeed's own default takes gigabytes for a few megabytes of gradients
        "allgather_bucket_size": 5_000_000,
    }
    for what in ("param", "optimizer"):
        device = environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none")
        if device.lower() != "none":
            settings[f"offload_{what}"] = {"device": device}
    content = {"zero_optimization": settings, "zero_force_ds_cpu_optimizer": False}
    return content, "the flags of accelerate launch"


def start(
    launch: Launch,
    *,
    micro_batch_size: int,
    accumulation: int,
    max_grad_norm: float | None,
    timeout_seconds: int,
    skips_weights: bool = False,
) -> Accelerator:
    """Form the process group and begin Accelerate, with DeepSpeed's settings complete.

    Args:
        skips_weights: whether trained weights may have no part in a loss, which DDP has to look for at every step.

    Raises:
        ConfigError: the group has another size than the launcher says.
    """
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    if on_cpu:
        # transformers imports DeepSpeed to save a model, and that would warn of what is known here
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Named, because without a GPU Accelerate would name none and believe each process alone.
    group = InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=timedelta(seconds=timeout_seconds))
    # model.dtype owns the precision, whatever the launcher's default
    if launch.engine is None and launch.world_size == 1:
        accelerator = Accelerator(mixed_precision="no", cpu=on_cpu)
    elif launch.engine is None:
        buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True, find_unused_parameters=skips_weights)
        accelerator = Accelerator(mixed_precision="no", cpu=on_cpu, kwargs_handlers=[group, buckets])
    else:
        if "WORLD_SIZE" not in os.environ:
            form_group_of_one()
        settings = fill_engine_config(
            launch.engine,
            micro_batch_size=micro_batch_size,
            accumulation=accumulation,
            world_size=launch.world_size,
            max_grad_norm=max_grad_norm,
        )
        plugin = DeepSpeedPlugin(hf_ds_config=settings)
        accelerator = Accelerator(
            mixed_precision="no",
            deepspeed_plugin=plugin,
            gradient_accumulation_steps=accumulation,
            kwargs_handlers=[group],
        )
    formed = dist.get_world_size() if dist.is_initialized() else 1
    if not launch.world_size == formed == accelerator.num_processes:
        raise ConfigError(
            f"the launcher says {launch.world_size} processes, torch.distributed {formed}, Accelerate"
            f" {accelerator.num_processes}: start the run by torchrun, accelerate launch or the deepspeed command"
        )
    # All have looked at the output directory, and the first may now write there.
    accelerator.wait_for_everyone()
    return accelerator


def form_group_of_one() -> None:
    """What a launcher would set for one process: DeepSpeed wants a group even then."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in alone.items()})


def quieten_deepspeed() -> None:
    """No compilation of a helper that takes minutes on a CPU, no page of its log per engine."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read at import; else every process is warned
    import deepspeed.ops
    from deepspeed.utils import logger

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has renamed.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
