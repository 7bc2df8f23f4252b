"""A tiny LLaVA that answers questions about upright digits, and rows about digits as files.

    python tests/image_text_model.py DIR

writes the model into DIR/model, and rows with their images into DIR/upright and DIR/mirrored.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lorasc_ds.tasks.digits import DOMAINS, load_images
from lorasc_ds.train import main as run

SIDE, PATCH = 16, 8  # pixels
KNOWN = 1000  # images that the model is trained on
STEPS, BATCH, LEARNING_RATE = 120, 64, 8e-3
QUESTIONS = {
    "which digit ?": str,
    "is it even ?": lambda digit: "no" if digit % 2 else "yes",
    "is it above four ?": lambda digit: "yes" if digit > 4 else "no",
}
WORDS = sorted({word for question in QUESTIONS for word in question.split()} | {"yes", "no"} | set("0123456789"))


def make_processor() -> LlavaProcessor:
    words = ["<s>", "</s>", "<unk>", "<pad>", "<image>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, resample=2, do_convert_rgb=True
    )
    return LlavaProcessor(
        images, wrapped, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def make_model(vocabulary: dict[str, int]) -> LlavaForConditionalGeneration:
    """Two layers in each tower; the image is four tokens."""
    layers: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
    }
    vision = CLIPVisionConfig(**layers, image_size=SIDE, patch_size=PATCH, projection_dim=32)
    text = LlamaConfig(
        **layers,
        vocab_size=len(vocabulary),
        max_position_embeddings=64,
        bos_token_id=vocabulary["<s>"],
        eos_token_id=vocabulary["</s>"],
        pad_token_id=vocabulary["<pad>"],
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=vocabulary["<image>"], vision_feature_layer=-1
    )
    return LlavaForConditionalGeneration(config)


def picture(image: np.ndarray) -> Image.Image:
    """An image of (8, 8), levels 0 to 16, as RGB."""
    return Image.fromarray(np.clip(image * 255 / 16, 0, 255).astype(np.uint8)).convert("RGB")


def write_rows(folder: Path, domain: str, positions: range, name: str) -> Path:
    """A question about each of these images, in turn, and the images."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, labels = load_images()
    shifted = DOMAINS[domain](images)
    lines = []
    for number, at in enumerate(positions):
        picture(shifted[at]).save(folder / "images" / f"{at}.png")
        question, answer = list(QUESTIONS.items())[number % len(QUESTIONS)]
        lines.append({"image": f"images/{at}.png", "question": question, "answer": answer(int(labels[at]))})
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def pretrain(steps: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Cross-entropy on the answers to questions about 1000 upright digits."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    processor = make_processor()
    vocabulary = processor.tokenizer.get_vocab()
    model = make_model(vocabulary)
    images, labels = load_images()
    pixels = processor.image_processor([picture(one) for one in images[:KNOWN]], return_tensors="pt")["pixel_values"]
    asked = {q: processor.tokenizer("<image> " * (SIDE // PATCH) ** 2 + q)["input_ids"] for q in QUESTIONS}
    width = max(map(len, asked.values())) + 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        chosen = rng.integers(0, KNOWN, BATCH)
        ids = torch.full((BATCH, width), vocabulary["<pad>"])
        targets = torch.full((BATCH, width), -100)
        for row, at in enumerate(chosen):
            question = list(QUESTIONS)[rng.integers(len(QUESTIONS))]
            answer = [vocabulary[QUESTIONS[question](int(labels[at]))], vocabulary["</s>"]]
            start, end = len(asked[question]), len(asked[question]) + 2
            ids[row, :end] = torch.tensor(asked[question] + answer)
            targets[row, start:end] = torch.tensor(answer)
        mask = (ids != vocabulary["<pad>"]).long()
        loss = model(input_ids=ids, attention_mask=mask, pixel_values=pixels[chosen], labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval(), processor


def write(folder: Path, steps: int = STEPS) -> None:
    """The model as `folder/model`; rows of images that it has not seen, 200 to train on and 200 to test with."""
    model, processor = pretrain(steps)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    for domain in ("upright", "mirrored"):
        write_rows(folder / domain, domain, range(KNOWN, KNOWN + 240), "train")
        write_rows(folder / domain, domain, range(KNOWN + 300, KNOWN + 450), "test")


def train(*arguments: str) -> int:
    """The command."""
    return run(list(arguments), Path(__file__).parents[1] / "launch" / "recipes" / "quickstart.yaml")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write(Path(sys.argv[1]))
