"""Makes the quickstart's base model: a Llama of 0.2 M parameters that reads upright digits.

    python -m lorasc_ds.quickstart.make_base DIR

writes the files of `lorasc_ds/quickstart/base`.
"""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorasc_ds.quickstart.pretraining import SEED, Indices, parse, pretrain, tell_accuracy
from lorasc_ds.tasks.digits import GREY_LETTERS, TEST_IMAGES, Image, load_images, prompt_of

EPOCHS = 150
BATCH = 32
PEAK_LEARNING_RATE = 3e-3


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
    """Cross-entropy on the digit after the image, after one epoch of warm-up."""
    images, labels = load_images()
    rng = np.random.default_rng(SEED)
    answers = torch.tensor(tokenizer.convert_tokens_to_ids(list("0123456789")))

    def logits_of(some: Image) -> torch.Tensor:
        return model(input_ids=encode(tokenizer, some), logits_to_keep=1).logits[:, -1]

    def loss_of(indices: Indices) -> torch.Tensor:
        logits = logits_of(moved_by_a_pixel(images[indices], rng))
        return torch.nn.functional.cross_entropy(logits, answers[labels[indices]])

    warm_up = 1 / max(epochs, 2)
    pretrain(model, loss_of, rng, epochs=epochs, batch=BATCH, peak_learning_rate=PEAK_LEARNING_RATE, warm_up=warm_up)
    with torch.no_grad():
        tell_accuracy(logits_of(images[-TEST_IMAGES:])[:, answers], torch.tensor(labels[-TEST_IMAGES:]))


def main() -> None:
    options = parse(__doc__, EPOCHS)
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    train(model, tokenizer, options.epochs)
    model.save_pretrained(options.directory)
    tokenizer.save_pretrained(options.directory)


if __name__ == "__main__":
    main()
