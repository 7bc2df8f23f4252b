"""Makes the image model in the package: a vision transformer of 0.1 M parameters that reads upright digits.

    python -m lorasc_ds.quickstart.make_vit DIR

writes the files of `lorasc_ds/quickstart/vit`. Everything is seeded and runs on one thread, so the same
versions on the same kind of processor give the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from lorasc_ds.tasks.digit_images import NAMES, SIDE, Pixels, enlarged
from lorasc_ds.tasks.digits import PRETRAINING_IMAGES, TEST_IMAGES, load_images

EPOCHS = 200
BATCH = 50
PEAK_LEARNING_RATE = 2e-3
LARGEST_MOVE = 4  # pixels, one of the original 8 x 8
SEED = 0


def make_model() -> ViTForImageClassification:
    config = ViTConfig(
        image_size=SIDE,
        patch_size=8,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        id2label=dict(enumerate(NAMES)),
        label2id={name: label for label, name in enumerate(NAMES)},
    )
    return ViTForImageClassification(config)


def moved(images: Pixels, rng: np.random.Generator) -> Pixels:
    """Each image of (count, SIDE, SIDE, 3) moved by up to LARGEST_MOVE pixels in both directions, white coming in."""
    most = LARGEST_MOVE
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), constant_values=255)
    corners = rng.integers(0, 2 * most + 1, (len(images), 2))
    return np.stack([p[r : r + SIDE, c : c + SIDE] for p, (r, c) in zip(padded, corners, strict=True)])


def encode(images: Pixels) -> torch.Tensor:
    """Pixels of (count, 3, SIDE, SIDE), from -1 to 1, as the preprocessing makes them."""
    return torch.tensor(images).permute(0, 3, 1, 2).div(127.5).sub(1)


def train(model: ViTForImageClassification, epochs: int) -> None:
    """Cross-entropy with smoothed labels; AdamW, cosine to zero, after a tenth of warm-up."""
    images, labels = load_images()
    pixels, classes = enlarged(images), torch.tensor(labels)
    rng = np.random.default_rng(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.05)
    steps_per_epoch = PRETRAINING_IMAGES // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=epochs * steps_per_epoch, pct_start=0.1
    )
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for batch in rng.permutation(PRETRAINING_IMAGES).reshape(-1, BATCH):
            logits = model(pixel_values=encode(moved(pixels[batch], rng))).logits
            loss = torch.nn.functional.cross_entropy(logits, classes[batch], label_smoothing=0.1)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item()
        print(f"epoch {epoch + 1}/{epochs}: loss {total / steps_per_epoch:.4f}", flush=True)

    model.eval()
    with torch.no_grad():
        correct = model(pixel_values=encode(pixels[-TEST_IMAGES:])).logits.argmax(-1) == classes[-TEST_IMAGES:]
    print(f"accuracy on {TEST_IMAGES} unseen upright digits: {correct.float().mean():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="fewer for a trial (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model = make_model()
    train(model, options.epochs)
    model.save_pretrained(options.directory)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(options.directory)


if __name__ == "__main__":
    main()
