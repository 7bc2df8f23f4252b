"""Loading and saving Hugging Face models and tokenizers; the quickstart's model sits in the package."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lorasc_ds.adapters import backbone_state
from lorasc_ds.config import ModelConfig
from lorasc_ds.errors import ConfigError

QUICKSTART_BASE = Path(__file__).parent / "quickstart" / "base"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def source_of(config: ModelConfig) -> dict[str, Any]:
    """The arguments that every `from_pretrained` here takes."""
    name = str(QUICKSTART_BASE) if config.name_or_path == "quickstart" else config.name_or_path
    return {
        "pretrained_model_name_or_path": name,
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
    }


def unusable(config: ModelConfig, what: str, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())
    return ConfigError(
        f"model.name_or_path {config.name_or_path}: {what} cannot be loaded: {reason}; give a hub id that can be"
        " reached, or a local folder with config.json, model.safetensors and a tokenizer"
    )


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(**source_of(config))
    except (OSError, ValueError) as error:
        raise unusable(config, "the tokenizer", error) from error


def load_shape(config: ModelConfig) -> PreTrainedModel:
    """The model on the meta device: all names and shapes, no weights read."""
    try:
        architecture = AutoConfig.from_pretrained(**source_of(config))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                architecture, dtype=DTYPES[config.dtype], trust_remote_code=config.trust_remote_code
            )
    except (OSError, ValueError) as error:
        raise unusable(config, "the model", error) from error


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The pretrained causal language model in `model.dtype`, from safetensors only."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            **source_of(config), dtype=DTYPES[config.dtype], use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise unusable(config, "the model", error) from error


def longest_sequence(model: PreTrainedModel) -> int | None:
    """Tokens that the model's positions allow; None where it sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the embedding: every token id must be smaller."""
    return model.get_input_embeddings().weight.shape[0]  # type: ignore[return-value]


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write the backbone as a plain Hugging Face model; `directory` appears whole or not at all."""
    temporary = directory.with_name(f".tmp-{directory.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, state_dict=backbone_state(model))
    tokenizer.save_pretrained(temporary)
    umask = os.umask(0)
    os.umask(umask)
    for file in temporary.iterdir():
        file.chmod(0o666 & ~umask)  # safetensors writes 0600
    temporary.rename(directory)


def read_weights(directory: Path, names: list[str]) -> dict[str, Tensor]:
    """Weights of a saved model, by their names in its safetensors files."""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in set(names) & set(file.keys())}
    return found
