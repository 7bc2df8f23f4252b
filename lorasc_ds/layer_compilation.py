"""The layers of a model's stacks, compiled one for all (`torch.compile`), for any number of rows and tokens."""

from __future__ import annotations

import os
import shutil
from functools import wraps
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lorasc_ds.errors import ConfigError

COMPILERS = ("g++", "clang++", "gcc", "clang", "cc")  # of C alone on a GPU, for Triton


def layers_of(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """What transformers marks as one of a stack."""
    return [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]


def check_compilation(model: PreTrainedModel, zero_stage: int | None) -> None:
    """
    Raises:
        ConfigError: the layers cannot be compiled here.
    """
    asked = "training.compile is true, but"
    if zero_stage == 3:
        raise ConfigError(
            f"{asked} ZeRO-3 gathers weights within a layer, which breaks its graph at each: set it false, or take"
            " ZeRO-2 (ds_configs/zero2.json)"
        )
    if not layers_of(model):
        raise ConfigError(
            f"{asked} {type(model).__name__} has no layers that transformers marks as alike: set it false"
        )
    if not os.environ.get("CXX") and not any(map(shutil.which, COMPILERS)):
        raise ConfigError(f"{asked} there is no C++ compiler: install g++, or set it false")


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Compile the layers of a model in place, as they are trained; in evaluation mode they run as they were written.

    All layers share their graphs, in which the sizes of a batch are symbols. A graph for each size, with sizes rounded
    up so that they are few, would compute padding and be built for tens of seconds each. Evaluations read rows of more
    kinds, and fewer of each.
    """
    for layer in layers_of(model):
        compile_layer(layer, backend)


def compile_layer(layer: Any, backend: str) -> None:
    written = layer.forward
    options: Any = {"fallback_random": True} if backend == "inductor" else None  # dropout's masks as without
    compiled = torch.compile(written, backend=backend, dynamic=True, options=options)

    @wraps(written)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if layer.training else written)(*args, **kwargs)

    layer.forward = forward
