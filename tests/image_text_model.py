"""A tiny LLaVA that answers questions about upright digits, and rows about digits as files.

    python tests/image_text_model.py DIR

writes the model into DIR/model, and rows with their images into DIR/upright and DIR/mirrored.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

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

SIDE, PATCH = 16, 8
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


def make_model(vocab_size: int, image_token: int) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=48,
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=3,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image_token, vision_feature_layer=-2)
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


def pretrain(steps: int = 500, batch: int = 64, lr: float = 4e-3) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    processor = make_processor()
    vocabulary = processor.tokenizer.get_vocab()
    model = make_model(len(vocabulary), vocabulary["<image>"])
    images, labels = load_images()
    count = 1000
    pixels = processor.image_processor([picture(one) for one in images[:count]], return_tensors="pt")["pixel_values"]
    tokens = (SIDE // PATCH) ** 2
    places = "<image> " * tokens
    rows, answers, lengths = {}, {}, {}
    for question, answer in QUESTIONS.items():
        prompt = processor.tokenizer(f"{places}{question}")["input_ids"]
        for digit in range(10):
            rows[question, digit] = [*prompt, vocabulary[answer(digit)], 1]
            lengths[question, digit] = len(prompt)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    questions = list(QUESTIONS)
    width = max(map(len, rows.values()))
    model.train()
    for _ in range(steps):
        chosen = rng.integers(0, count, batch)
        asked = [(questions[rng.integers(3)], int(labels[at])) for at in chosen]
        ids = torch.full((batch, width), 3)
        targets = torch.full((batch, width), -100)
        for row, key in enumerate(asked):
            ids[row, : len(rows[key])] = torch.tensor(rows[key])
            targets[row, lengths[key] : len(rows[key])] = torch.tensor(rows[key][lengths[key] :])
        shift = rng.integers(-1, 2, 2) * 2
        moved = torch.roll(pixels[chosen], tuple(map(int, shift)), dims=(2, 3))
        loss = model(input_ids=ids, attention_mask=(ids != 3).long(), pixel_values=moved, labels=targets).loss
        if _ % 50 == 0: print(_, loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"loss {loss.item():.4f}")
    return model.eval(), processor


if __name__ == "__main__":
    import time

    torch.set_num_threads(1)
    began = time.perf_counter()
    folder = Path(sys.argv[1])
    model, processor = pretrain(int(sys.argv[2]) if len(sys.argv) > 2 else 500)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    print(f"{time.perf_counter() - began:.1f} s")
    for domain in ("upright", "mirrored"):
        write_rows(folder / domain, domain, range(1000, 1297), "train")
        write_rows(folder / domain, domain, range(1297, 1597), "test")
