"""What a forward pass keeps for the backward pass, and an evaluation makes, in bytes, by formulas from shapes."""

from __future__ import annotations

import math

from lorasc_ds.data import trees_of
from lorasc_ds.image_reading import ImageReading
from lorasc_ds.preparation import Preparation
from lorasc_ds.streaming import looked_at
from lorasc_ds.text_reading import TextReading
from lorasc_ds.vision_tower import kept_bytes, passing_bytes


def activation_bytes(preparation: Preparation) -> int:
    """Of the longest micro batch."""
    reading = preparation.reading
    if isinstance(reading, ImageReading):
        return image_activation_bytes(preparation, reading)
    images = preparation.data.micro_batch_size * kept_bytes(preparation)
    return text_activation_bytes(preparation, reading) + images


def evaluation_bytes(preparation: Preparation) -> int:
    """Of the longest batch of an evaluation."""
    reading = preparation.reading
    if isinstance(reading, ImageReading):
        return image_evaluation_bytes(preparation, reading)
    images = preparation.config.training.eval_batch_size * passing_bytes(preparation)
    return text_evaluation_bytes(preparation, reading) + images


def text_activation_bytes(preparation: Preparation, reading: TextReading) -> int:
    """What a forward pass keeps for the backward pass, for the longest micro batch, by a formula.

    Per token and layer of hidden size h and intermediate size f: inputs of norms, projections and the gated
    product, `7h + 2f` in the compute dtype and `2h` in float32; the float32 copies that the pairs read; and
    the logits three times in float32. DoRA keeps `W·x` and `B·A·x` besides, and for the norm of a row it makes the
    identity, `W`, `B·A` and their sum whole, in float32. With gradient checkpointing the inputs of all layers, and
    either the logits or later one layer, computed again, whose gradients were measured to take half as much.
    """
    shape = preparation.shape.config.get_text_config()
    layers = shape.num_hidden_layers
    size = 4 if preparation.config.model.dtype == "float32" else 2
    h = shape.hidden_size
    f = getattr(shape, "intermediate_size", None) or 4 * h
    copies = 0 if size == 4 else sum(4 * one.A.shape[1] for one in preparation.weights)
    train = looked_at(preparation.splits["train"])
    of_example = (lambda e: (e.target,)) if preparation.task.loss == "lm" else (lambda e: e.candidates)
    trees = [set(trees_of(of_example(e), reading.layout.share_prefixes).values()) for e in train]
    inputs, longest = max(map(len, trees)), max(tree.size for found in trees for tree in found)
    in_layers = layers * (size * (7 * h + 2 * f) + 8 * h) + copies
    for_magnitudes = transient = 0
    if preparation.config.adapter.method == "dora":
        for_magnitudes = sum((size + 4) * one.shape[0] for one in preparation.weights)
        transient = max(4 * (one.shape[1] ** 2 + 3 * one.shape[0] * one.shape[1]) for one in preparation.weights)
    logits = 12 * shape.vocab_size
    if preparation.config.training.gradient_checkpointing:
        per_token = layers * size * h + max(logits, math.ceil((1.5 * in_layers + for_magnitudes) / layers))
    else:
        per_token = in_layers + for_magnitudes + logits
    return preparation.data.micro_batch_size * inputs * longest * per_token + transient


def text_evaluation_bytes(preparation: Preparation, reading: TextReading) -> int:
    """Logits of the longest evaluation batch in the compute dtype; the scored ones again, and twice in float32."""
    size = 4 if preparation.config.model.dtype == "float32" else 2
    examples = [e for split in preparation.task.evaluation_splits for e in preparation.splits[split] if e.candidates]
    trees = [trees_of(e.candidates, reading.layout.share_prefixes) for e in examples]
    longest = max(tree.size for found in trees for tree in found.values())
    scored = max(
        sum(c.scored for c in e.candidates if found[c.ids[:-1]] is tree)
        for e, found in zip(examples, trees, strict=True)
        for tree in set(found.values())
    )
    per_input = size * longest + (size + 8) * scored
    return (
        preparation.config.training.eval_batch_size * per_input * preparation.shape.config.get_text_config().vocab_size
    )


def image_activation_bytes(preparation: Preparation, reading: ImageReading) -> int:
    """Per token of an image and layer as for texts; and where prompts train a text tower, the same of all of them."""
    shape = preparation.shape.config
    tower, layers = reading.tower(preparation.shape), reading.tower(preparation.shape).num_hidden_layers
    tokens = preparation.data.micro_batch_size * reading.tokens(preparation.shape)
    total = tokens * per_token_bytes(preparation, tower.hidden_size, tower.intermediate_size, layers)
    if reading.head == "text" and reading.prompts is not None:
        text = shape.text_config
        total += reading.prompts.ids.numel() * per_token_bytes(
            preparation, text.hidden_size, text.intermediate_size, text.num_hidden_layers
        )
    return total


def image_evaluation_bytes(preparation: Preparation, reading: ImageReading) -> int:
    """Pixels in float32 and in the compute dtype, and what the widest layer makes of a batch."""
    size = 4 if preparation.config.model.dtype == "float32" else 2
    height, width = reading.layout.how.size
    tower = reading.tower(preparation.shape)
    widest = reading.tokens(preparation.shape) * (2 * tower.hidden_size + 2 * tower.intermediate_size)
    return preparation.config.training.eval_batch_size * ((4 + size) * 3 * height * width + size * widest)


def per_token_bytes(preparation: Preparation, h: int, f: int, layers: int) -> int:
    """Of a token in all layers of hidden size h and intermediate size f; see `text_activation_bytes`."""
    size = 4 if preparation.config.model.dtype == "float32" else 2
    copies = 0 if size == 4 else sum(4 * one.A.shape[1] for one in preparation.weights)
    in_layers = layers * (size * (7 * h + 2 * f) + 8 * h) + copies
    if preparation.config.training.gradient_checkpointing:
        return layers * size * h + math.ceil(1.5 * in_layers / layers)
    return in_layers
