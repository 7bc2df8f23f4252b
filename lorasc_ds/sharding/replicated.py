"""Weights that every process holds whole: one process, data parallel, ZeRO-0, 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorasc_ds.sharding.backend import Slice
from lorasc_ds.sharding.processes import Processes

# Integers of each size, to read a weight's bits.
INTEGERS = {2: torch.int16, 4: torch.int32}


def empty_(optimizer: torch.optim.Optimizer) -> None:
    """State and step counts as before the first step, in place.

    Zeroed, not removed: AdamW's zero state is its first state, nothing is allocated anew, and what an engine
    has linked to the tensors stays linked.
    """
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            else:
                state[key] = type(value)(0)
    for group in optimizer.param_groups:
        if "step" in group:  # fused optimizers begin a new state's count there
            group["step"] = 0


def is_empty(optimizer: torch.optim.Optimizer) -> bool:
    """Whether every moment and step count is zero."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    counts = [group.get("step", 0) for group in optimizer.param_groups]
    return not any(bool(value.any()) if isinstance(value, Tensor) else bool(value) for value in (*values, *counts))


class ReplicatedBackend:
    """A slice is the whole weight; a trainable parameter is its own master, as torch's optimizers have it."""

    merge_path = "local: every process holds the weights whole"

    def __init__(self, optimizer: torch.optim.Optimizer, processes: Processes) -> None:
        self.optimizer = optimizer
        self.processes = processes

    @contextmanager
    def edit(self, weight: nn.Parameter) -> Iterator[Slice]:
        yield Slice(weight.detach().view(-1), 0)

    def full(self, tensor: Tensor) -> Tensor:
        return tensor.detach()

    def read(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().clone()

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        parameter.detach().copy_(value)

    def holds(self, parameter: nn.Parameter, value: Tensor) -> bool:
        return torch.equal(parameter.detach(), value.to(parameter.device))

    def empty_optimizer(self) -> None:
        empty_(self.optimizer)

    def optimizer_is_empty(self) -> bool:
        return is_empty(self.optimizer)

    def differing_replicas(self, weights: Sequence[nn.Parameter]) -> list[int]:
        if self.processes.world_size == 1:
            return []
        sums = [weight.detach().view(INTEGERS[weight.element_size()]).sum(dtype=torch.int64) for weight in weights]
        return self.processes.differing(torch.stack(sums))


class ZeroBackend(ReplicatedBackend):
    """ZeRO-1 and 2: a trainable parameter also has a float32 master, a flat partition of which each rank keeps.

    The master is written back at every step, so that a parameter set without it would come back.
    """

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        super().write(parameter, value)
        safe_set_full_fp32_param(parameter, value.to(parameter.device))

    def holds(self, parameter: nn.Parameter, value: Tensor) -> bool:
        from deepspeed.utils import safe_get_full_fp32_param

        master = safe_get_full_fp32_param(parameter)
        return super().holds(parameter, value) and master is not None and torch.equal(master, value.to(master.device))
