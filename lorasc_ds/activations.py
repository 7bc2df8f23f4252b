"""What a forward pass keeps for the backward pass, and an evaluation makes, in bytes, by formulas from shapes."""

from __future__ import annotations

import math

from lorasc_ds.image_reading import ImageReading
from lorasc_ds.kernels.lean import is_lean
from lorasc_ds.layout import trees_of
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

    Per token what `layer_bytes` says; and then either the logits of every place that the head computes, three times in
    float32, or later the gradients of a layer, which were measured to take half as much as it keeps. With gradient
    checkpointing only the inputs of all layers, and one layer computed again. For the norm of a row DoRA makes the
    identity, `W`, `B·A` and their sum whole, in float32.
    """
    shape = preparation.shape.config.get_text_config()
    layers, h = shape.num_hidden_layers, shape.hidden_size
    train = looked_at(preparation.splits["train"])
    of_example = (lambda e: (e.target,)) if preparation.task.loss == "lm" else (lambda e: e.candidates)
    trees = [set(trees_of(of_example(e), reading.layout.share_prefixes).values()) for e in train]
    inputs, longest = max(map(len, trees)), max(tree.size for found in trees for tree in found)
    tokens = preparation.data.micro_batch_size * inputs * longest
    places = preparation.data.micro_batch_size * max(sum(one.scored for one in of_example(e)) for e in train)
    logits = 12 * shape.vocab_size * places
    in_layer = tokens * layer_bytes(preparation, h, getattr(shape, "intermediate_size", None) or 4 * h, layers)
    transient = 0
    if preparation.config.adapter.method == "dora":
        transient = max(4 * (one.shape[1] ** 2 + 3 * one.shape[0] * one.shape[1]) for one in preparation.weights)
    if preparation.config.training.gradient_checkpointing:
        kept, in_backward = tokens * layers * element_size(preparation) * h, 1.5 * in_layer
    else:
        kept, in_backward = layers * in_layer, 0.5 * in_layer
    return kept + max(logits, math.ceil(in_backward)) + transient


def element_size(preparation: Preparation) -> int:
    """Bytes of a number in the dtype that is computed in."""
    return 4 if preparation.config.model.dtype == "float32" else 2


def layer_bytes(preparation: Preparation, h: int, f: int, layers: int) -> int:
    """What a layer of hidden size h and intermediate size f keeps of a token for the backward pass.

    The inputs of norms, of pairs and of attention, and its output, `7h`; gate and up, `2f`. Layers that are not lean
    keep the activated gate too, and in bfloat16 the inputs of their norms in float32. Dropout keeps what it lets
    through and a mask, for every pair; DoRA `W·x`, `B·A·x` and, in bfloat16, its input in float32.
    """
    size, adapter = element_size(preparation), preparation.config.adapter
    kept = size * (7 * h + 2 * f)
    if not is_lean(preparation.shape):
        kept += size * f + (8 * h if size == 2 else 0)
    of_pairs = 0
    if adapter.dropout:
        of_pairs += sum((size + 1) * one.shape[1] for one in preparation.weights)
    if adapter.method == "dora":
        of_pairs += sum(
            (size + 4) * one.shape[0] + (4 * one.shape[1] if size == 2 else 0) for one in preparation.weights
        )
    return kept + math.ceil(of_pairs / layers)


def text_evaluation_bytes(preparation: Preparation, reading: TextReading) -> int:
    """Logits of the longest evaluation batch in the compute dtype; the scored ones again, and twice in float32."""
    size = element_size(preparation)
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
    size = element_size(preparation)
    height, width = reading.layout.how.size
    tower = reading.tower(preparation.shape)
    widest = reading.tokens(preparation.shape) * (2 * tower.hidden_size + 2 * tower.intermediate_size)
    return preparation.config.training.eval_batch_size * ((4 + size) * 3 * height * width + size * widest)


def per_token_bytes(preparation: Preparation, h: int, f: int, layers: int) -> int:
    """Of a token in all layers of hidden size h and intermediate size f; see `text_activation_bytes`."""
    one = layer_bytes(preparation, h, f, layers)
    if preparation.config.training.gradient_checkpointing:
        return layers * element_size(preparation) * h + math.ceil(1.5 * one)
    return layers * one
