"""What the part of a vision-language model that reads images costs: from shapes, and the pixels of a few rows."""

from __future__ import annotations

from itertools import islice

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lorasc_ds.preparation import Preparation, Reading
from lorasc_ds.streaming import looked_at
from lorasc_ds.text_reading import TextReading

LOOKED_AT = 4  # rows


def tower_of(shape: PreTrainedModel) -> list[nn.Module]:
    """The modules of a model that are neither of its language model nor its head, each with all that it holds."""
    parts = (shape.get_decoder(), shape.get_output_embeddings())
    spoken = {id(module) for part in parts if part is not None for module in part.modules()}
    return [module for module in shape.modules() if id(module) not in spoken]


def tower_parameters(shape: PreTrainedModel) -> int:
    return sum(one.numel() for module in tower_of(shape) for one in module.parameters(recurse=False))


def patches(shape: PreTrainedModel, reading: Reading) -> tuple[int, int]:
    """The patches of a row's images and the numbers of their pixels, the most that one of the first rows has.

    Of the examples that are trained on, where there are any. A tower that cuts images up by other means than a
    convolution is counted as one patch.
    """
    if not isinstance(reading, TextReading) or reading.layout.pixels is None:
        return 0, 0
    examples = looked_at(reading.splits.get("train") or next(iter(reading.splits.values())))
    rows = (example.visuals for example in examples if example.visuals is not None)
    numbers = max(reading.layout.pixels([one])["pixel_values"].numel() for one in islice(rows, LOOKED_AT))
    weights = (one for module in tower_of(shape) for one in module.parameters(recurse=False))
    of_patch = max((one[0].numel() for one in weights if one.ndim > 3), default=numbers)  # of the convolution that cuts
    return numbers // of_patch, numbers


def passing_bytes(preparation: Preparation) -> int:
    """What a row's images take while they are read: their pixels, and what the widest matrix makes of all patches."""
    count, numbers = patches(preparation.shape, preparation.reading)
    return 4 * numbers + count * max(map(matrix_bytes, tower_of(preparation.shape)), default=0)


def kept_bytes(preparation: Preparation) -> int:
    """What a row's images leave for the backward pass: inputs and outputs of all matrices where one of them is adapted.

    With gradient checkpointing the inputs of all layers: what one of them computes again is there when what a layer of
    the language model computed again, counted with the text, is gone.
    """
    tower = tower_of(preparation.shape)
    if not any(one.requires_grad for module in tower for one in module.parameters(recurse=False)):
        return passing_bytes(preparation)
    count, numbers = patches(preparation.shape, preparation.reading)
    if preparation.config.training.gradient_checkpointing:
        layers = [module for module in tower if isinstance(module, GradientCheckpointingLayer)]
        inputs = [next(one for one in layer.modules() if isinstance(one, nn.Linear)) for layer in layers]
        per_patch = sum(one.weight.element_size() * one.in_features for one in inputs)
    else:
        per_patch = sum(map(matrix_bytes, tower))
    return 4 * numbers + count * per_patch


def matrix_bytes(module: nn.Module) -> int:
    """Of what a token has before and after a matrix."""
    if not isinstance(module, nn.Linear):
        return 0
    return module.weight.element_size() * (module.in_features + module.out_features)
