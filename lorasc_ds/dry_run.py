"""What `--dry_run` prints beside the derived numbers: memory, steps, and three examples with what is scored."""

from __future__ import annotations

from collections.abc import Iterator

from lorasc_ds.activations import activation_bytes, evaluation_bytes
from lorasc_ds.duration import duration_lines
from lorasc_ds.memory import (
    FREE_SHARE,
    GIB,
    SHIPPED,
    Memory,
    bytes_of,
    engines,
    memory_plan,
    tensors_of,
)
from lorasc_ds.preparation import Preparation
from lorasc_ds.preview import image_lines, short_lines
from lorasc_ds.text_reading import TextReading

PREVIEWED_EXAMPLES = 3
SHOWN_EXPERTS = 3
# The table's headers, in two lines, by what `Memory` calls the columns.
HEADERS = {
    "weights": ("frozen", "weights"),
    "pairs": ("pairs and", "moments"),
    "slow_pairs": ("slow", "pairs"),
    "accumulators": ("accumu-", "lators"),
    "copy": ("copy to", "evaluate"),
    "activations": ("activa-", "tions"),
    "buffers": ("ZeRO", "buffers"),
    "gathered": ("boundary", "gathers"),
    "device": ("sum on", "the GPU"),
    "host": ("in host", "memory"),
}


def report(preparation: Preparation, gpu_memory: int) -> str:
    """Memory plan, step plan and label-mask preview; nothing has been loaded for it but shapes.

    Args:
        gpu_memory: bytes that each GPU has.
    """
    return "\n".join(
        (
            *duration_lines(preparation),
            "",
            *memory_lines(preparation, gpu_memory),
            "",
            *step_lines(preparation),
            "",
            *preview_lines(preparation),
        )
    )


def memory_lines(preparation: Preparation, gpu_memory: int) -> Iterator[str]:
    """The plan of every engine as a table, without columns of zeros, and which engine to take."""
    processes = preparation.data.world_size
    usable = round((1 - FREE_SHARE) * gpu_memory)
    plans = {name: memory_plan(preparation, zero) for name, zero in engines(processes).items()}
    columns = [field for field in HEADERS if any(getattr(plan, field) for plan in plans.values())]
    yield (
        f"memory of a process by engine, {processes} GPU{'s' if processes > 1 else ''} of {readable(gpu_memory)}"
        f" ({readable(usable)} without {FREE_SHARE:.0%} for fragmentation and CUDA); G is GiB, M is MiB"
    )
    for line, name in enumerate(("", "engine")):
        yield f"  {name:<18}" + "".join(f"{HEADERS[field][line]:>10}" for field in columns)
    for name, plan in plans.items():
        cells = "".join(f"{readable(getattr(plan, field)):>10}" for field in columns)
        yield f"  {name:<18}{cells}  {'fits' if plan.device <= usable else 'too much'}"
    model = readable(bytes_of(tensors_of(preparation)[0]))
    yield "  pairs with gradients and masters; float32 accumulators; activations, or an evaluation's logits, estimated"
    yield (
        f"  besides, in host memory: {model} in every process to load the model; under ZeRO-3 in rank 0 alone, to load"
        " and to save"
    )
    yield advice(preparation, {name: plan for name, plan in plans.items() if plan.device <= usable})


def advice(preparation: Preparation, fitting: dict[str, Memory]) -> str:
    """The first engine that fits, or what to change where none does."""
    training, processes = preparation.config.training, preparation.data.world_size
    for name, plan in fitting.items():
        engine = f" --deepspeed ds_configs/{name}" if name in SHIPPED else " (no DeepSpeed)"
        host = f"; every process needs {readable(plan.host)} of host memory" if plan.host else ""
        return f"take: accelerate launch --num_processes {processes} launch/train.py{engine}{host}"
    micro, logits = preparation.data.micro_batch_size, evaluation_bytes(preparation) > activation_bytes(preparation)
    remedies = {
        f"lower training.eval_batch_size ({training.eval_batch_size})": logits and training.eval_batch_size > 1,
        f"lower training.micro_batch_size ({micro})": micro > 1,
        "set training.gradient_checkpointing true": not training.gradient_checkpointing,
        f"raise --gpus ({processes})": True,
    }
    return f"nothing fits: {', or '.join(remedy for remedy, helps in remedies.items() if helps)}"


def readable(count: int) -> str:
    return "-" if count == 0 else f"{count / GIB:.2f}G" if count >= GIB else f"{count / 2**20:.2f}M"


def step_lines(preparation: Preparation) -> Iterator[str]:
    yield "experts (optimizer steps, learning rate of the first and the last)"
    experts = list(preparation.plan)
    for expert in experts:
        if SHOWN_EXPERTS < expert.index < len(experts):
            continue
        if expert.index == len(experts) > SHOWN_EXPERTS + 1:
            yield "  ..."
        first, last = (preparation.learning_rate(expert, step) for step in (expert.start, expert.stop - 1))
        yield f"  {expert.index:>5}  steps {expert.start + 1} to {expert.stop}  {first:.3g} to {last:.3g}"
    yield f"every split is scored before training and {len(preparation.evaluation_steps)} times after"


def preview_lines(preparation: Preparation) -> Iterator[str]:
    reading = preparation.reading
    if isinstance(reading, TextReading):
        yield f"the first {PREVIEWED_EXAMPLES} training examples; what is scored stands between [[ and ]]"
        yield from short_lines(reading.tokenizer, reading.splits["train"][:PREVIEWED_EXAMPLES], preparation.task.loss)
    else:
        yield f"the first {PREVIEWED_EXAMPLES} training images and their classes"
        yield from image_lines(reading.splits["train"], reading.classes, PREVIEWED_EXAMPLES)
