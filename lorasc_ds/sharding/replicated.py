"""Weights that every process holds whole: one process, data parallel, ZeRO-0, 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lorasc_ds.sharding.backend import Slice
from lorasc_ds.sharding.optimizer_state import OptimizerVerbs, link_, moment_names

# Integers of each size, to read a weight's bits.
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_sum(weight: Tensor) -> Tensor:
    """The bits of a weight's elements as integers, added; int64 of ()."""
    return weight.detach().view(INTEGERS[weight.element_size()]).sum(dtype=torch.int64)


class ReplicatedBackend(OptimizerVerbs):
    """A slice is the whole weight; a trainable parameter is its own master, as torch's optimizers have it."""

    merge_path = "local: every process holds the weights whole"

    def edit(self, weights: Sequence[nn.Parameter]) -> Iterator[list[Slice]]:
        yield [Slice(weight.detach().view(-1), 0) for weight in weights]

    def full(self, tensor: Tensor) -> Tensor:
        return tensor.detach()

    def read(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().to(torch.float32, copy=True)

    def write(self, parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
        torch._foreach_copy_([parameter.detach() for parameter in parameters], list(values))  # pyright: ignore[reportPrivateImportUsage]

    def holds(self, parameter: nn.Parameter, value: Tensor) -> bool:
        return torch.equal(parameter.detach(), value.to(parameter.device, parameter.dtype))

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {name: self.optimizer.state[parameter][name].clone() for name in moment_names(self.optimizer)}

    def write_moments(self, parameter: nn.Parameter, moments: Mapping[str, Tensor]) -> None:
        for name, value in moments.items():
            self.optimizer.state[parameter][name].copy_(value)

    def bit_sums(self, weights: Sequence[nn.Parameter]) -> list[int]:
        return torch.stack([bit_sum(weight) for weight in weights]).tolist()

    def differing_replicas(self, weights: Sequence[nn.Parameter]) -> list[int]:
        if self.processes.world_size == 1:
            return []
        return self.processes.differing(torch.tensor(self.bit_sums(weights)))


class ZeroBackend(ReplicatedBackend):
    """ZeRO-1 and 2: a trainable parameter also has a float32 master, a flat partition of which each rank keeps.

    The master is written back at every step, so that a parameter set without it would come back.
    """

    def read(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        if parameter.dtype == torch.float32 or not parameter.requires_grad:  # then the copy has the master's bits
            return super().read(parameter)
        return cast(Tensor, safe_get_full_fp32_param(parameter))

    def write(self, parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        super().write(parameters, values)
        for parameter, value in zip(parameters, values, strict=True):
            if parameter.requires_grad:
                safe_set_full_fp32_param(parameter, value.to(parameter.device))

    def holds(self, parameter: nn.Parameter, value: Tensor) -> bool:
        from deepspeed.utils import safe_get_full_fp32_param

        if not parameter.requires_grad:
            return super().holds(parameter, value)
        master = safe_get_full_fp32_param(parameter)
        return super().holds(parameter, value) and master is not None and torch.equal(master, value.to(master.device))

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        link_(self.optimizer)
        names = moment_names(self.optimizer)
        return {name: cast(Tensor, safe_get_full_optimizer_state(parameter, name)) for name in names}

    def write_moments(self, parameter: nn.Parameter, moments: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        link_(self.optimizer)
        for name, value in moments.items():
            safe_set_full_optimizer_state(parameter, value, name)
