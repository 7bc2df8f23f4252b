"""Makes the quickstart's base model: a Llama of 0.2 M parameters that reads upright digits.

    python -m lorasc_ds.quickstart.make_base DIR

writes the files of `lorasc_ds/quickstart/base`. Everything is seeded and runs on one thread, so the same
versions on the same kind of processor give the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorasc_ds.tasks.digits import GREY_LETTERS, PRETRAINING_IMAGES, TEST_IMAGES, Image, load_images, prompt_of

EPOCHS = 150
BATCH = 32
PEAK_LEARNING_RATE = 3e-3
SEED = 0


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<s>", "</s>", "<unk>", "=", *"0123456789", *GREY_LETTERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=128
    )


def make_model(vocab_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def moved_by_a_pixel(images: Image, rng: np.random.Generator) -> Image:
    """Each image of (count, 8, 8) moved by -1, 0 or 1 pixel in both directions, white coming in."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    rows, columns = rng.integers(0, 3, (2, len(images)))
    return np.stack([p[r : r + 8, c : c + 8] for p, r, c in zip(padded, rows, columns, strict=True)])


def encode(tokenizer: PreTrainedTokenizerFast, images: Image) -> torch.Tensor:
    return torch.tensor(tokenizer([prompt_of(image) for image in images])["input_ids"])


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, epochs: int) -> None:
    """Cross-entropy on the digit after the image; AdamW, cosine to zero, after one epoch of warm-up."""
    images, labels = load_images()
    rng = np.random.default_rng(SEED)
    answers = torch.tensor(tokenizer.convert_tokens_to_ids(list("0123456789")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.05)
    steps_per_epoch = PRETRAINING_IMAGES // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=epochs * steps_per_epoch, pct_start=1 / max(epochs, 2)
    )
    model.train()
    for epoch in range(epochs):
        order = rng.permutation(PRETRAINING_IMAGES)
        total = 0.0
        for batch in order[: steps_per_epoch * BATCH].reshape(-1, BATCH):
            ids = encode(tokenizer, moved_by_a_pixel(images[batch], rng))
            logits = model(input_ids=ids, logits_to_keep=1).logits[:, -1]
            loss = torch.nn.functional.cross_entropy(logits, answers[labels[batch]])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item()
        print(f"epoch {epoch + 1}/{epochs}: loss {total / steps_per_epoch:.4f}", flush=True)

    model.eval()
    with torch.no_grad():
        logits = model(input_ids=encode(tokenizer, images[-TEST_IMAGES:]), logits_to_keep=1).logits[:, -1]
    correct = logits[:, answers].argmax(-1) == torch.tensor(labels[-TEST_IMAGES:])
    print(f"accuracy on {TEST_IMAGES} unseen upright digits: {correct.float().mean():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="fewer for a trial (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    train(model, tokenizer, options.epochs)
    model.save_pretrained(options.directory)
    tokenizer.save_pretrained(options.directory)


if __name__ == "__main__":
    main()
