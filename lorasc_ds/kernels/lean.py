"""Puts layers that keep less for the backward pass in the place of a model's own, where those compute the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from lorasc_ds.kernels.norms import RMSNorm
from lorasc_ds.kernels.swiglu import SwiGLU


def same_code(one: Callable[..., object], other: Callable[..., object]) -> bool:
    """Whether two functions are the same, instruction for instruction and name for name."""
    a, b = one.__code__, other.__code__
    return (a.co_code, a.co_names) == (b.co_code, b.co_names)


def lean_layer(layer: Any) -> nn.Module | None:
    """What takes the layer's place, around the same parameters under the same names; None: it stays.

    Mistral, Qwen, SmolLM, Granite and others have Llama's norm and MLP, word for word, under names of their own.
    """
    forward = type(layer).forward
    if same_code(forward, LlamaRMSNorm.forward) and not layer.weight.requires_grad:
        return RMSNorm(layer.weight, layer.variance_epsilon)
    if same_code(forward, LlamaMLP.forward) and isinstance(layer.act_fn, (nn.SiLU, SiLUActivation)):
        return SwiGLU(layer.gate_proj, layer.up_proj, layer.down_proj)
    return None


def make_lean(model: PreTrainedModel) -> None:
    """Exchange norms and gated MLPs in place: the model computes the same bits, and keeps less to train.

    Not in float32, where their norms keep no more than ours, and the gated product costs more time to make again than
    its memory is worth.
    """
    if model.dtype == torch.float32:
        return
    for owner in list(model.modules()):
        for name, layer in list(owner.named_children()):
            lean = lean_layer(layer)
            if lean is not None:
                setattr(owner, name, lean.train(layer.training))


def is_lean(model: PreTrainedModel) -> bool:
    """Whether the gated MLPs, which keep the most, are ours."""
    return any(isinstance(layer, SwiGLU) for layer in model.modules())
