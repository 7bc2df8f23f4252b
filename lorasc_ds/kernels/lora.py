"""The two small products of a pair, in the dtype that the layer computes in, whatever dtype the pair is kept in.

They are layers, so that an engine that cuts parameters up gathers them as it does any other's. Of the input nothing is
kept but the tensor that the layer was given, which q and v share; where `A` is frozen (LoRA-FA), not even that.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Down(nn.Linear):
    """`x·Aᵀ`: (..., in) to (..., rank). `weight` is A, (rank, in)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight.to(input.dtype))


class Up(nn.Linear):
    """`y + s·h·Bᵀ` in one product. `weight` is B, (out, rank)."""

    def forward(self, input: Tensor, to: Tensor, scaling: float) -> Tensor:
        """
        Args:
            input: h, (..., rank).
            to: y, (..., out).
            scaling: s.
        """
        B = self.weight.to(input.dtype)
        return torch.addmm(to.flatten(0, -2), input.flatten(0, -2), B.T, alpha=scaling).view_as(to)


def around(kind: type[nn.Linear], weight: nn.Parameter) -> nn.Linear:
    """A layer of this kind around a weight that there is already, (out, in)."""
    layer = kind(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = weight
    return layer
