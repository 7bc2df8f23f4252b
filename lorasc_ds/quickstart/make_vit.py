"""Makes the image model in the package: a vision transformer of 0.1 M parameters that reads upright digits.

    python -m lorasc_ds.quickstart.make_vit DIR

writes the files of `lorasc_ds/quickstart/vit`.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from lorasc_ds.quickstart.pretraining import SEED, Indices, parse, pretrain, tell_accuracy
from lorasc_ds.tasks.digit_images import NAMES, SIDE, Pixels, enlarged
from lorasc_ds.tasks.digits import TEST_IMAGES, load_images

EPOCHS = 200
BATCH = 50
PEAK_LEARNING_RATE = 2e-3
LARGEST_MOVE = 4  # pixels, one of the original 8 x 8


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
    """Cross-entropy with smoothed labels, after a tenth of warm-up."""
    images, labels = load_images()
    pixels, classes = enlarged(images), torch.tensor(labels)
    rng = np.random.default_rng(SEED)

    def loss_of(indices: Indices) -> torch.Tensor:
        logits = model(pixel_values=encode(moved(pixels[indices], rng))).logits
        return torch.nn.functional.cross_entropy(logits, classes[indices], label_smoothing=0.1)

    pretrain(model, loss_of, rng, epochs=epochs, batch=BATCH, peak_learning_rate=PEAK_LEARNING_RATE, warm_up=0.1)
    with torch.no_grad():
        tell_accuracy(model(pixel_values=encode(pixels[-TEST_IMAGES:])).logits, classes[-TEST_IMAGES:])


def main() -> None:
    options = parse(__doc__, EPOCHS)
    model = make_model()
    train(model, options.epochs)
    model.save_pretrained(options.directory)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(options.directory)


if __name__ == "__main__":
    main()
