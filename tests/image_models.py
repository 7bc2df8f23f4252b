"""Tiny random models on images, as folders of the form that the hub's have: weights, preprocessing, tokenizer.

Every tower has two layers of width 32 and takes images of 32 x 32 pixels in patches of 8.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

SIZE = 32
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = TOWER | {"image_size": SIZE, "patch_size": 8}
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
COMMON = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}


def preprocessor(kind: str, size: int) -> dict[str, Any]:
    """As the published files have it, but for the size in pixels."""
    square = {"height": size, "width": size}
    crop = {"do_center_crop": True, "crop_size": square, "resample": 3}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    match kind:
        case "clip":
            own = crop | {"size": {"shortest_edge": size}, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
            return {"image_processor_type": "CLIPImageProcessor"} | own
        case "siglip":
            return {"image_processor_type": "SiglipImageProcessor", "size": square, "resample": 3} | half
        case "vit":
            return {"image_processor_type": "ViTImageProcessor", "size": square, "resample": 2} | half
        case "dinov2":
            own = crop | {"size": {"shortest_edge": size * 8 // 7}}
            own |= {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
            return {"image_processor_type": "BitImageProcessor"} | own
    raise ValueError(kind)


def write_preprocessor(folder: Path, kind: str, size: int = SIZE) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(COMMON | preprocessor(kind, size), indent=2))


def clip_tokenizer(whole: bool = True) -> CLIPTokenizer:
    """CLIP's own, of 49,408 tokens, where the real data is and it is to be whole; else a token per byte, no merges."""
    shared = Path(os.environ.get("LORASC_SHARED", Path(__file__).parents[2] / "shared"))
    file = shared / "data" / "tokenizers" / "clip" / "bpe_simple_vocab_16e6.txt.gz"
    there = whole and file.exists()
    lines = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1] if there else []
    merges = [(left, right) for left, right in map(str.split, lines)]
    # in the order of the bytes that stand for themselves, then the others
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in plain] + [chr(256 + at) for at in range(256 - len(plain))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    vocabulary = {token: at for at, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def siglip_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte; closed by `</s>`, which pads, too; SigLIP's own is not among the real data."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: at for at, token in enumerate(["<unk>", "</s>", *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>", model_max_length=64
    )


def saved(folder: Path, kind: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    model.save_pretrained(folder)
    write_preprocessor(folder, kind)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def clip(folder: Path, *, whole_tokenizer: bool = True) -> Path:
    tokenizer = clip_tokenizer(whole_tokenizer)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = TOWER | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 77}
    torch.manual_seed(0)
    return saved(
        folder, "clip", CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)), tokenizer
    )


def siglip(folder: Path) -> Path:
    tokenizer = siglip_tokenizer()
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
    text = TOWER | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    torch.manual_seed(0)
    return saved(folder, "siglip", SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)), tokenizer)


def vit(folder: Path, classes: int | None = 10) -> Path:
    """
    Args:
        classes: of its classifier; None: none is saved, as with a checkpoint that was only pretrained.
    """
    torch.manual_seed(0)
    config = ViTConfig(**VISION, num_labels=classes or 2)
    return saved(folder, "vit", ViTForImageClassification(config) if classes else ViTModel(config))


def dinov2(folder: Path, classes: int | None = None) -> Path:
    """
    Args:
        classes: as of `vit`; DINOv2's own checkpoints have none.
    """
    torch.manual_seed(0)
    shape = {name: value for name, value in VISION.items() if name != "intermediate_size"}
    config = Dinov2Config(**shape, mlp_ratio=2, num_labels=classes or 2)
    return saved(folder, "dinov2", Dinov2ForImageClassification(config) if classes else Dinov2Model(config))


def bigg14() -> CLIPConfig:
    """Of laion/CLIP-ViT-bigG-14-laion2B-39B-b160k (protocols 6.1): for the meta device, 2.5 G parameters."""
    text = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    vision = {"hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48, "num_attention_heads": 16}
    gelu = {"hidden_act": "gelu", "projection_dim": 1280}
    pictures = {"image_size": 224, "patch_size": 14}
    return CLIPConfig(text_config=text | gelu, vision_config=vision | gelu | pictures, projection_dim=1280)
