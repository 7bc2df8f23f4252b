"""Engines that take optimizer steps: torch (one process, data parallel) and DeepSpeed (ZeRO-0 to 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lorasc_ds.sharding.processes import Processes


def keep_scalars_whole(module: nn.Module) -> None:
    """Make frozen parameters without a dimension, as CLIP's `logit_scale`, buffers.

    DeepSpeed 0.19 sends parameters to the other ranks as bytes, which torch makes of no tensor without a dimension.
    """
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.dim() == 0:
                delattr(owner, name)
                owner.register_buffer(name, parameter.detach())


class TorchEngine:
    """One process, or several that each hold the whole model and average their gradients.

    Args:
        optimizer: a torch one; a fused Adam can be told on the device to leave a step out.
    """

    def __init__(self, model: nn.Module, optimizer: Any, processes: Processes) -> None:
        self.model = model
        self.optimizer = optimizer
        self.processes = processes
        self.name = "ddp" if isinstance(model, DistributedDataParallel) else "plain"
        self.zero_stage: int | None = None

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) and not last else nullcontext()

    def backward(self, loss: Tensor) -> None:
        (loss * self.processes.world_size).backward()  # data parallel averages

    def learning_rates(self, learning_rate: float) -> dict[str, float]:
        set_learning_rate(self.optimizer, learning_rate)
        return rates_of(self.optimizer)

    def update(self, learning_rate: float, max_grad_norm: float | None) -> Tensor:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
        set_learning_rate(self.optimizer, learning_rate)
        if self.optimizer.defaults.get("fused"):
            # What a gradient scaler says: the kernel reads it where it runs, so that the host need not know the norm.
            self.optimizer.grad_scale, self.optimizer.found_inf = None, 1 - norm.isfinite().float()
            self.optimizer.step()
        elif norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


class DeepSpeedEngine:
    """A DeepSpeed engine whose accumulation boundaries are ours; it clips by its own `gradient_clipping`."""

    def __init__(self, engine: Any, processes: Processes) -> None:
        self.model = engine
        self.processes = processes
        self.zero_stage = engine.zero_optimization_stage()
        self.name = f"zero{self.zero_stage}"

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        self.model.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over ranks; the loss is already divided by what it is a mean of.
        self.model.backward(loss * self.processes.world_size, scale_wrt_gas=False)

    def learning_rates(self, learning_rate: float) -> dict[str, float]:
        set_learning_rate(self.model.optimizer, learning_rate)
        return rates_of(self.model.basic_optimizer)

    def update(self, learning_rate: float, max_grad_norm: float | None) -> Tensor:
        set_learning_rate(self.model.optimizer, learning_rate)
        if self.model.zero_optimization_stage() == 0:
            gradients = [p.grad for p in self.model.module.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            if torch.isfinite(norm):
                self.model.step()
            self.model.zero_grad()
            return norm
        self.model.step()  # skips the update where the norm is not finite, and then reports infinity
        return torch.as_tensor(self.model.get_global_grad_norm())


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Every group's rate is its multiple of it; ZeRO's wrappers share the groups of the optimizer they were given."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_ratio"]


def rates_of(optimizer: Any) -> dict[str, float]:
    """The rate of every parameter group, by its `role`."""
    return {group["role"]: group["lr"] for group in optimizer.param_groups}
