"""How long a run would take on one H100, from shapes and data alone: an estimate, for a plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from lorasc_ds.encoding import EncodedExample
from lorasc_ds.image_reading import ImageReading
from lorasc_ds.layout import trees_of
from lorasc_ds.models import forward_parameters
from lorasc_ds.preparation import Preparation, Reading
from lorasc_ds.streaming import looked_at
from lorasc_ds.tasks import Task
from lorasc_ds.vision_tower import patches, tower_parameters

# One H100 SXM (NVIDIA's data sheet, dense): operations and bytes per second, and the share of them that LoRA reaches in
# published measurements of 7B models; and what launching the kernels of a layer takes, whatever their size.
OPERATIONS = {"bfloat16": 989e12, "float32": 67e12}
BANDWIDTH = 3.35e12
REACHED = 0.4
LAYER_SECONDS = 5e-4
BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Scored:
    """Examples that a model scores.

    Args:
        shape: the model, of which no weight is read.
        dtype: of its weights.
        splits: of the reading, which are scored.
        batch_size: examples that are scored together.
    """

    shape: PreTrainedModel
    dtype: str
    task: Task
    reading: Reading
    splits: Sequence[str]
    batch_size: int


def scored_in(preparation: Preparation) -> Scored:
    """What every evaluation of a run scores."""
    return Scored(
        preparation.shape,
        preparation.config.model.dtype,
        preparation.task,
        preparation.reading,
        preparation.task.evaluation_splits,
        preparation.config.training.eval_batch_size,
    )


def run_seconds(preparation: Preparation) -> tuple[float, float]:
    """Of training, and of all evaluations."""
    evaluations = len(preparation.evaluation_steps) + 1  # before training too
    scored = scored_in(preparation)
    # A forward pass, and a backward pass of the same size: frozen weights have no gradients.
    passes = preparation.plan.steps * preparation.accumulation
    rows = preparation.config.training.batch_size * preparation.plan.steps
    training = 2 * (
        seconds(scored, training_tokens(preparation), passes)
        + passes * prompt_seconds(scored)
        + image_seconds(scored, rows)
    )
    return training, evaluations * scoring_seconds(scored)


def scoring_seconds(scored: Scored) -> float:
    """Of scoring every example once."""
    return (
        seconds(scored, scored_tokens(scored), batches(scored))
        + prompt_seconds(scored)
        + decoding_seconds(scored, generation_steps(scored))
        + image_seconds(scored, scored_rows(scored))
    )


def duration_lines(preparation: Preparation) -> Iterator[str]:
    """The tokens of a run and the time that they take."""
    trained, scored = training_tokens(preparation), scored_in(preparation)
    answers = generation_steps(scored)
    training, evaluation = run_seconds(preparation)
    yield (
        f"time      about {readable(training + evaluation)} on one H100 at {REACHED:.0%} of its peak, an estimate:"
        f" training {readable(training)} ({in_words(preparation, trained)}), {len(preparation.evaluation_steps) + 1}"
        f" evaluations {readable(evaluation)} ({in_words(preparation, scored_tokens(scored))}"
        f"{f' and up to {answers:,} steps of generation' if answers else ''} each)"
    )


def in_words(preparation: Preparation, tokens: int) -> str:
    """An amount of tokens; of images, how many these are."""
    reading = preparation.reading
    if isinstance(reading, ImageReading):
        each = reading.tokens(preparation.shape)
        return f"{tokens // each:,} images of {each} tokens"
    return f"{tokens:,} tokens"


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


def scored_tokens(scored: Scored) -> int:
    """Tokens that are read to score every split, prompts of answers included."""
    reading = scored.reading
    if isinstance(reading, ImageReading):
        return sum(len(reading.splits[split]) for split in scored.splits) * reading.tokens(scored.shape)
    shared, splits = reading.layout.share_prefixes, [reading.splits[split] for split in scored.splits]
    return sum(tokens_of(examples, shared) + sum(len(e.prompt) for e in examples) for examples in splits)


def scored_rows(scored: Scored) -> int:
    """Rows that are read to score every split: for the loss, and for an answer where one is generated."""
    rows = sum(len(scored.reading.splits[split]) for split in scored.splits)
    return rows * (1 if scored.task.generation is None else 2)


def batches(scored: Scored) -> int:
    splits = [scored.reading.splits[split] for split in scored.splits]
    return sum(math.ceil(len(examples) / scored.batch_size) for examples in splits)


def generation_steps(scored: Scored) -> int:
    """The most steps that the answers take, batch by batch."""
    generation = scored.task.generation
    return 0 if generation is None else batches(scored) * generation.max_new_tokens


def work_of(scored: Scored) -> tuple[int, int]:
    """Parameters that every token is multiplied by, and layers that it passes."""
    shape, reading = scored.shape, scored.reading
    if isinstance(reading, ImageReading):
        return reading.parameters(shape), reading.tower(shape).num_hidden_layers
    return forward_parameters(shape) - tower_parameters(shape), shape.config.get_text_config().num_hidden_layers


def seconds(scored: Scored, tokens: int, passes: int) -> float:
    """Of forward passes over so many tokens."""
    rate = REACHED * OPERATIONS[scored.dtype]
    parameters, layers = work_of(scored)
    return max(2 * parameters * tokens / rate, passes * layers * LAYER_SECONDS)


def image_seconds(scored: Scored, rows: int) -> float:
    """Of a vision-language model's forward passes over the images of so many rows."""
    rate = REACHED * OPERATIONS[scored.dtype]
    return 2 * tower_parameters(scored.shape) * patches(scored.shape, scored.reading)[0] * rows / rate


def prompt_seconds(scored: Scored) -> float:
    """Of a forward pass of the text tower over the prompts of all classes, where a head is made of them anew."""
    reading = scored.reading
    if not isinstance(reading, ImageReading) or reading.head != "text" or reading.prompts is None:
        return 0.0
    rate = REACHED * OPERATIONS[scored.dtype]
    text = (p for name, p in scored.shape.named_parameters() if name.startswith("text_") and "embed" not in name)
    return 2 * sum(p.numel() for p in text) * reading.prompts.ids.numel() / rate


def decoding_seconds(scored: Scored, steps: int) -> float:
    """Of steps of generation, which read all weights once each."""
    parameters, layers = work_of(scored)
    size = BYTES[scored.dtype] * parameters
    return steps * max(size / (REACHED * BANDWIDTH), layers * LAYER_SECONDS)


def readable(duration: float) -> str:
    if duration >= 5400:
        return f"{duration / 3600:.1f} h"
    return f"{duration / 60:.0f} min" if duration >= 90 else f"{math.ceil(duration)} s"
