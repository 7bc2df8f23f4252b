"""One process, no engine: every tensor is where torch put it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorasc_ds.sharding.backend import Slice


class PlainBackend:
    """A slice is the whole weight; a trainable parameter is its own float32 master."""

    name = "plain"

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @contextmanager
    def edit(self, weight: nn.Parameter) -> Iterator[Slice]:
        yield Slice(weight.detach().view(-1), 0)

    def full(self, weight: nn.Parameter) -> Tensor:
        return weight.detach()

    def read(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().clone()

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        parameter.detach().copy_(value)

    def empty_optimizer(self, parameters: Iterable[nn.Parameter]) -> None:
        # Zeroed in place, not removed: AdamW's zero state is its first state, and nothing is allocated anew.
        for parameter in parameters:
            for value in self.optimizer.state.get(parameter, {}).values():
                value.zero_()
