"""Examples as they are read and scored, as text: what is scored stands between [[ and ]]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from lorasc_ds.encoded import EncodedExample, ScoredTokens
from lorasc_ds.tasks.base import Classes, Example

SHORTENED = 200  # characters that are shown of a longer text


def example_lines(tokenizer: PreTrainedTokenizerBase, example: EncodedExample, *, full: bool) -> Iterator[str]:
    """An example whole: every candidate, the right ones marked, and what an answer is generated from and compared with.

    Args:
        full: show long texts without a gap, and lines as they are broken.
    """

    def text(of: str) -> str:
        return of.replace("\n", "\n        ") if full else one_line(of)

    yield " ".join([example.id, *([f"({example.group})"] if example.group else [])])
    for number, candidate in enumerate(example.candidates):
        mark = ("gold  " if number in example.gold else "      ") if len(example.candidates) > 1 else ""
        lengths = f"{len(candidate.ids)} tokens, {candidate.scored} scored"
        yield f"    {mark}({lengths}) {text(marked(tokenizer, candidate, None if full else SHORTENED))}"
    if example.prompt:
        prompt = str(tokenizer.decode(list(example.prompt)))
        yield f"    prompt ({len(example.prompt)} tokens) {text(prompt if full else shortened(prompt))}"
    if example.source is not None:
        for name, value in (
            *(("image", one.name) for one in example.source.images),
            *(("reference", one) for one in example.source.references),
            *example.source.details.items(),
        ):
            yield f"    {name}: {text(value if full else shortened(value))}"
    if example.shots_left_out:
        yield f"    {example.shots_left_out} demonstrations are left out of the prompt: it was too long"
    if example.cut:
        yield f"    {example.cut} tokens are cut away"


def short_lines(tokenizer: PreTrainedTokenizerBase, examples: Sequence[EncodedExample], loss: str) -> Iterator[str]:
    """Of every example what is trained on."""
    for example in examples:
        yield f"  {example.id} ({len(example.target.ids)} tokens, {example.target.scored} scored)"
        for tokens in trained_on(example, loss):
            yield f"    {one_line(marked(tokenizer, tokens, SHORTENED))}"


def trained_on(example: EncodedExample, loss: str) -> tuple[ScoredTokens, ...]:
    return example.candidates if loss == "classification" else (example.target,)


def marked(tokenizer: PreTrainedTokenizerBase, tokens: ScoredTokens, length: int | None) -> str:
    """The decoded sequence with its scored parts marked.

    Args:
        length: characters that stay of every part; None: all.
    """
    scored = set(tokens.targets)
    flags = [at in scored for at in range(len(tokens.ids))]
    cuts = [0, *(at for at in range(1, len(flags)) if flags[at] != flags[at - 1]), len(flags)]
    parts = []
    for (start, _), part in zip(pairwise(cuts), decoded(tokenizer, tokens.ids, cuts), strict=True):
        part = part if length is None else shortened(part, length)
        parts.append(f"[[{part}]]" if flags[start] else part)
    return "".join(parts)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], cuts: Sequence[int]) -> Iterator[str]:
    """The text between two cuts each, as it stands in the whole: by itself a part would lose its first space."""
    until = ""
    for start, end in pairwise(cuts):
        before, until = until, str(tokenizer.decode(list(ids[:end])))
        alone = str(tokenizer.decode(list(ids[start:end])))
        yield until[len(before) :] if until.startswith(before) else alone


def one_line(text: str) -> str:
    return text.replace("\n", "\\n")


def shortened(text: str, length: int = SHORTENED) -> str:
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


def image_lines(examples: Sequence[Example], classes: Classes, count: int) -> Iterator[str]:
    """The first images, a line each."""
    for at in range(min(count, len(examples))):
        label = examples[at].gold[0]
        name = classes.names[label if classes.subset is None else classes.subset[label]]
        yield f"  {examples[at].id}: {label}, {name}"
