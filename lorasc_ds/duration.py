"""How long a run would take on one H100, from shapes and data alone: an estimate, for a plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lorasc_ds.data import trees_of
from lorasc_ds.encoding import EncodedExample
from lorasc_ds.image_reading import ImageReading
from lorasc_ds.models import forward_parameters
from lorasc_ds.preparation import Preparation
from lorasc_ds.streaming import looked_at

# One H100 SXM (NVIDIA's data sheet, dense): operations and bytes per second, and the share of them that LoRA reaches in
# published measurements of 7B models; and what launching the kernels of a layer takes, whatever their size.
OPERATIONS = {"bfloat16": 989e12, "float32": 67e12}
BANDWIDTH = 3.35e12
REACHED = 0.4
LAYER_SECONDS = 5e-4
BYTES = {"bfloat16": 2, "float32": 4}


def run_seconds(preparation: Preparation) -> tuple[float, float]:
    """Of training, and of all evaluations."""
    evaluations = len(preparation.evaluation_steps) + 1  # before training too
    # A forward pass, and a backward pass of the same size: frozen weights have no gradients.
    passes = preparation.plan.steps * preparation.accumulation
    training = 2 * seconds(preparation, training_tokens(preparation), passes)
    scoring = seconds(preparation, scored_tokens(preparation), evaluation_batches(preparation))
    return training, evaluations * (scoring + decoding_seconds(preparation, generation_steps(preparation)))


def duration_lines(preparation: Preparation) -> Iterator[str]:
    """The tokens of a run and the time that they take."""
    trained = training_tokens(preparation)
    scored, answers = scored_tokens(preparation), generation_steps(preparation)
    training, evaluation = run_seconds(preparation)
    yield (
        f"time      about {readable(training + evaluation)} on one H100 at {REACHED:.0%} of its peak, an estimate:"
        f" training {readable(training)} ({trained:,} tokens), {len(preparation.evaluation_steps) + 1} evaluations"
        f" {readable(evaluation)} ({scored:,} tokens{f' and up to {answers:,} steps of generation' if answers else ''}"
        " each)"
    )


def tokens_of(examples: Sequence[EncodedExample], share_prefixes: bool) -> int:
    """Tokens that the model reads to score every candidate."""
    rows = [set(trees_of(e.candidates, share_prefixes).values()) for e in examples if e.candidates]
    return sum(tree.size for trees in rows for tree in trees)


def training_tokens(preparation: Preparation) -> int:
    """Tokens of all optimizer steps, padding and recomputation not counted."""
    data, reading = preparation.data, preparation.reading
    epochs = preparation.plan.steps / data.steps_per_epoch
    if isinstance(reading, ImageReading):
        return round(epochs * len(data.examples) * reading.tokens(preparation.shape))
    seen = looked_at(reading.splits["train"])
    if preparation.task.loss == "lm":
        tokens = sum(len(example.target.ids) - 1 for example in seen)
    else:
        tokens = tokens_of(seen, reading.layout.share_prefixes)
    return round(epochs * tokens * len(data.examples) / len(seen))


def scored_tokens(preparation: Preparation) -> int:
    """Tokens of one evaluation of every split, prompts of answers included."""
    reading = preparation.reading
    scored = preparation.task.evaluation_splits
    if isinstance(reading, ImageReading):
        return sum(len(reading.splits[split]) for split in scored) * reading.tokens(preparation.shape)
    shared, splits = reading.layout.share_prefixes, [reading.splits[split] for split in scored]
    return sum(tokens_of(examples, shared) + sum(len(e.prompt) for e in examples) for examples in splits)


def evaluation_batches(preparation: Preparation) -> int:
    splits = [preparation.splits[split] for split in preparation.task.evaluation_splits]
    return sum(math.ceil(len(examples) / preparation.config.training.eval_batch_size) for examples in splits)


def generation_steps(preparation: Preparation) -> int:
    """The most steps that the answers of one evaluation take, batch by batch."""
    generation = preparation.task.generation
    return 0 if generation is None else evaluation_batches(preparation) * generation.max_new_tokens


def work_of(preparation: Preparation) -> tuple[int, int]:
    """Parameters that every token is multiplied by, and layers that it passes."""
    shape, reading = preparation.shape, preparation.reading
    if isinstance(reading, ImageReading):
        return reading.parameters(shape), reading.tower(shape).num_hidden_layers
    return forward_parameters(shape), shape.config.get_text_config().num_hidden_layers


def seconds(preparation: Preparation, tokens: int, passes: int) -> float:
    """Of forward passes over so many tokens."""
    rate = REACHED * OPERATIONS[preparation.config.model.dtype]
    parameters, layers = work_of(preparation)
    return max(2 * parameters * tokens / rate, passes * layers * LAYER_SECONDS)


def decoding_seconds(preparation: Preparation, steps: int) -> float:
    """Of steps of generation, which read all weights once each."""
    parameters, layers = work_of(preparation)
    size = BYTES[preparation.config.model.dtype] * parameters
    return steps * max(size / (REACHED * BANDWIDTH), layers * LAYER_SECONDS)


def readable(duration: float) -> str:
    if duration >= 5400:
        return f"{duration / 3600:.1f} h"
    return f"{duration / 60:.0f} min" if duration >= 90 else f"{math.ceil(duration)} s"
