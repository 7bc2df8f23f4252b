"""What `--dry_run` prints beside the derived numbers: memory, steps, and three examples with what is scored."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from lorasc_ds.encoding import EncodedExample, ScoredTokens
from lorasc_ds.preparation import Preparation

PREVIEWED_EXAMPLES = 3
SHOWN_EXPERTS = 3


def report(preparation: Preparation) -> str:
    """Memory plan, step plan and label-mask preview; nothing has been loaded for it but shapes."""
    return "\n".join(("", *memory_lines(preparation), "", *step_lines(preparation), "", *preview_lines(preparation)))


def memory_plan(preparation: Preparation) -> dict[str, int]:
    """Bytes on the device by what holds them; activations are an estimate."""
    config, weights = preparation.config, preparation.weights
    frozen = [p for p in preparation.shape.parameters() if not p.requires_grad]
    trained = sum(one.A.numel() + one.B.numel() for one in weights)
    adapted = sum(one.weight.numel() for one in weights)
    rounded = config.model.dtype != "float32"
    accumulated = 4 * adapted if rounded and config.cascade.accumulator == "device" else 0
    kept = 4 * adapted if not rounded and preparation.evaluation_steps - {e.stop for e in preparation.plan} else 0
    return {
        "frozen weights": sum(p.numel() * p.element_size() for p in frozen),
        "pairs, gradients, moments, slow pairs": (4 + 4 + 8 + 4) * trained,
        "float32 accumulators": accumulated,
        "copy during an evaluation inside an expert": kept,
        "a micro batch's activations, or an evaluation's logits (estimate)": max(
            activation_bytes(preparation), evaluation_bytes(preparation)
        ),
    }


def activation_bytes(preparation: Preparation) -> int:
    """What a forward pass keeps for the backward pass, for the longest micro batch, by a formula.

    Per token and layer of hidden size h and intermediate size f: inputs of norms, projections and the gated
    product, `7h + 2f` in the compute dtype and `2h` in float32; the float32 copies that the pairs read; and
    the logits three times in float32.
    """
    shape = preparation.shape.config.get_text_config()
    size = 4 if preparation.config.model.dtype == "float32" else 2
    h = shape.hidden_size
    f = getattr(shape, "intermediate_size", None) or 4 * h
    copies = 0 if size == 4 else sum(4 * one.A.shape[1] for one in preparation.weights)
    train = preparation.splits["train"]
    longest = max(len(candidate.ids) for example in train for candidate in example.candidates) - 1
    inputs = 1 if preparation.task.loss == "lm" else max(example.inputs for example in train)
    per_token = shape.num_hidden_layers * (size * (7 * h + 2 * f) + 8 * h) + copies + 12 * shape.vocab_size
    return preparation.data.micro_batch_size * inputs * longest * per_token


def evaluation_bytes(preparation: Preparation) -> int:
    """Logits of the longest evaluation batch in the compute dtype; the scored ones again, and twice in float32."""
    size = 4 if preparation.config.model.dtype == "float32" else 2
    rows = [c for split in preparation.task.evaluation_splits for e in preparation.splits[split] for c in e.candidates]
    longest, scored = max(len(row.ids) for row in rows) - 1, max(row.scored for row in rows)
    per_input = size * longest + (size + 8) * scored
    return (
        preparation.config.training.eval_batch_size * per_input * preparation.shape.config.get_text_config().vocab_size
    )


def readable(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def memory_lines(preparation: Preparation) -> Iterator[str]:
    plan = memory_plan(preparation)
    yield "memory"
    for what, count in {**plan, "sum": sum(plan.values())}.items():
        yield f"  {what:<65} {readable(count):>12}"


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
    yield f"the first {PREVIEWED_EXAMPLES} training examples; what is scored stands between [[ and ]]"
    for example in preparation.splits["train"][:PREVIEWED_EXAMPLES]:
        yield f"  {example.id} ({len(example.target.ids)} tokens, {example.target.scored} scored)"
        for tokens in shown(example, preparation.task.loss):
            yield f"    {marked(preparation.tokenizer, tokens)}"


def shown(example: EncodedExample, loss: str) -> tuple[ScoredTokens, ...]:
    return example.candidates if loss == "classification" else (example.target,)


def marked(tokenizer: PreTrainedTokenizerBase, tokens: ScoredTokens) -> str:
    """The decoded sequence with its scored end marked; long ones without their middle."""
    cut = len(tokens.ids) - tokens.scored
    given, scored = (
        str(tokenizer.decode(list(ids))).replace("\n", "\\n") for ids in (tokens.ids[:cut], tokens.ids[cut:])
    )
    return f"{shortened(given)}[[{shortened(scored)}]]"


def shortened(text: str, length: int = 200) -> str:
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"
