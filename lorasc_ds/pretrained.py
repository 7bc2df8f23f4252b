"""A pretrained model as the tensors that `save_pretrained` writes, one at a time, and a model written from such.

Neither needs the model in memory: a 70B model is exported with that of its largest tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from lorasc_ds import models
from lorasc_ds.algorithm.tensor_files import write_tensors
from lorasc_ds.config import ModelConfig
from lorasc_ds.errors import ConfigError

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of tensors by name."""


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors that `save_pretrained` writes, by their keys: tied ones once; on the meta device their shapes."""
    tensors = remove_tied_weights_from_state_dict(model.state_dict(), model)
    ignored = model._keys_to_ignore_on_save or ()
    return revert_weight_conversion(model, {key: tensor for key, tensor in tensors.items() if key not in ignored})


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


@dataclass(frozen=True, slots=True)
class Pretrained:
    """See the module.

    Args:
        model: on the meta device; or loaded, where its files do not hold what `save_pretrained` writes.
        layout: of the tensors that `save_pretrained` writes.
        tensor: gives the tensor of a name of `layout`.
        loaded: why the model was loaded whole; None where it was not.
    """

    model: PreTrainedModel
    layout: Layout
    tensor: Callable[[str], Tensor]
    loaded: str | None = None


def model_with(config: ModelConfig, names: Collection[str]) -> tuple[PreTrainedModel, str | None]:
    """The model without its weights, in which `save_pretrained` knows `names`; loaded whole where that takes loading.

    Returns:
        the model, and why it was loaded, or None.

    Raises:
        ConfigError: it has no such names.
    """
    shape = models.load_shape(config)
    if set(names) <= saved_tensors(shape).keys():
        return shape, None
    model = models.load_model(config)
    missing = sorted(set(names) - saved_tensors(model).keys())
    if missing:
        raise ConfigError(
            f"model.name_or_path {config.name_or_path}: {type(model).__name__} has no weight {missing[0]}, which this"
            " ledger is about; give the model that the run began with"
        )
    return model, "transformers renames the weights of its files"


def open_pretrained(config: ModelConfig, names: Collection[str]) -> Pretrained:
    """Open the files of the model; load it whole where they hold something else than `save_pretrained` would write.

    Args:
        names: that `save_pretrained` must know: the ledger's.

    Raises:
        ConfigError: the model cannot be loaded, or has no such names.
    """
    model, loaded = model_with(config, names)
    files = models.pretrained_tensors(config)
    layout = layout_of(saved_tensors(model))
    other = [name for name, (_, shape) in layout.items() if files.shape(name) != shape]
    if loaded is None and other:
        loaded = f"its files hold no {other[0]} of shape {layout[other[0]][1]}, which transformers makes at load"
    if loaded is None and getattr(model, "_keep_in_fp32_modules_strict", None):
        loaded = "transformers keeps some of its weights in float32"
    if loaded is None:
        model.generation_config = generation_config(config)
        return Pretrained(model, layout, files)
    if next(model.parameters()).is_meta:
        model = models.load_model(config)
    tensors = saved_tensors(model)
    return Pretrained(model, layout_of(tensors), tensors.__getitem__, loaded)


def generation_config(config: ModelConfig) -> GenerationConfig:
    """That of the model's files; old ones keep it among the rest of `config.json`."""
    with models.loading("the generation config", config):
        source = models.source_of(config)
        name, revision = source["pretrained_model_name_or_path"], source["revision"]
        try:
            return GenerationConfig.from_pretrained(name, revision=revision)
        except OSError:
            return GenerationConfig.from_pretrained(name, "config.json", revision=revision, _from_model_config=True)


def shards_of(layout: Layout, size: float) -> list[list[str]]:
    """Names in files of at most `size` bytes, or of one tensor; sorted as strings over all files."""
    shards: list[list[str]] = []
    room = 0.0
    for name in sorted(layout):
        dtype, shape = layout[name]
        needed = dtype.itemsize * math.prod(shape)
        if not shards or needed > room:
            shards.append([])
            room = size
        shards[-1].append(name)
        room -= needed
    return shards


def write_model(
    directory: Path, model: PreTrainedModel, layout: Layout, produce: Callable[[str], Tensor], size: float
) -> None:
    """Write a model as `save_pretrained` does, with one tensor in memory at a time.

    Args:
        directory: exists; not to be used before this returns.
        model: whose configurations and code are written; its weights are not read.
        produce: gives the tensor of a name. Those of one dtype are asked for in the order of their names as strings.
        size: of a file, in bytes.

    Raises:
        OSError: the disk is full, for instance.
    """
    model.save_pretrained(directory, state_dict={})
    shards = shards_of(layout, size)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = SAFE_WEIGHTS_NAME.replace(".safetensors", f"{suffix}.safetensors")
        write_tensors(directory / file, {name: layout[name] for name in names}, produce, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        parameters = sum(math.prod(shape) for _, shape in layout.values())
        total = sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())
        index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
        (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
