"""RMSNorm that keeps its input and one number a token for the backward pass, not the normed input in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RMSNormFunction(torch.autograd.Function):
    """`weight · x/rms(x)`, the mean in float32, rounded before the weight is applied as transformers' Llama does.

    `weight` is frozen: it gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        towards = (gradients[0] * weight).float()
        normed = x.float() * scale
        mean = (towards * normed).mean(-1, keepdim=True)
        return torch.addcmul(towards, normed, mean, value=-1).mul_(scale).to(x.dtype), None, None


class RMSNorm(nn.Module):
    """
    Args:
        weight: (features,), frozen.
        epsilon: added to the mean square.
    """

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        return RMSNormFunction.apply(hidden_states, self.weight, self.epsilon)
