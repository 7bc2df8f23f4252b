"""SST-2, RTE, CB, WSC, WiC and COPA: prompts on a sentence or two (protocols 1.3)."""

from __future__ import annotations

from pathlib import Path

from lorasc_ds.tasks.base import Example
from lorasc_ds.tasks.mezo import BOOLEAN, DATA_DIR, Released, labelled, with_fields
from lorasc_ds.tasks.rows import Row, read_rows


def sst2(row: Row) -> Example:
    label = row.choice("label", ("negative", "positive"))
    return labelled(row, f"{row.text('sentence').strip()} It was", (" terrible", " great"), label)


def rte(row: Row) -> Example:
    prompt = f'{row.text("premise")}\nDoes this mean that "{row.text("hypothesis")}" is true? Yes or No?\n'
    return labelled(row, prompt, ("Yes", "No"), row.choice("label", ("entailment", "not_entailment")))


def cb(row: Row) -> Example:
    prompt = f'Suppose {row.text("premise")} Can we infer that "{row.text("hypothesis")}"? Yes, No, or Maybe?\n'
    label = row.choice("label", ("entailment", "contradiction", "neutral"))
    return labelled(row, prompt, ("Yes", "No", "Maybe"), label)


def wsc(row: Row) -> Example:
    pronoun, noun = row.text("span2_text").lower(), row.text("span1_text")
    prompt = f'{row.text("text")}\nIn the previous sentence, does the pronoun "{pronoun}" refer to {noun}? Yes or No?\n'
    return labelled(row, prompt, ("No", "Yes"), row.choice("label", BOOLEAN))


def read_wsc(path: Path, split: str) -> Released:
    """SuperGLUE's WSC with the spans of `wsc.fixed`."""
    rows = read_rows(path, DATA_DIR)
    fixed = [
        with_fields(row, **{f"{span}_text": fixed_span(row, row.row("target"), span) for span in ("span1", "span2")})
        for row in rows
    ]
    changed = sum(
        new.fields["span1_text"] != old.row("target").text("span1_text")
        or new.fields["span2_text"] != old.row("target").text("span2_text")
        for new, old in zip(fixed, rows, strict=True)
    )
    return fixed, (f"spans as in wsc.fixed: {changed} of {len(rows)} rows of {split} differ from the file",)


def fixed_span(row: Row, target: Row, span: str) -> str:
    """A span as it stands in the sentence: the case of its first letter, no full stop, spaces for newlines.

    So does SuperGLUE's loader on the hub; it leaves a span as released that is in the sentence, or that words of the
    sentence interrupt.
    """
    sentence, released = row.text("text"), target.text(f"{span}_text")
    words, index = sentence.split(), target.integer(f"{span}_index")
    if released in sentence or not released or not 0 <= index < len(words):
        return released
    first = released[0].lower() if words[index][0].islower() else released[0].upper()
    fixed = (first + released[1:]).rstrip(".").replace("\n", " ")
    return fixed if fixed in sentence else released


def wic(row: Row) -> Example:
    prompt = (
        f'Does the word "{row.text("word")}" have the same meaning in these two sentences? Yes, No?\n'
        f"{row.text('sentence1')}\n{row.text('sentence2')}\n"
    )
    return labelled(row, prompt, ("No", "Yes"), row.choice("label", BOOLEAN))


def copa(row: Row) -> Example:
    conjunction = (" because ", " so ")[row.choice("question", ("cause", "effect"))]
    prompt = row.text("premise").rstrip().removesuffix(".") + conjunction
    choices = [continued(row.text(key)) for key in ("choice1", "choice2")]
    return labelled(row, prompt, choices, row.choice("label", ("choice1", "choice2")))


def continued(sentence: str) -> str:
    """As the second half of a sentence: the first word in lower case, a name too, but not `I`."""
    first, *rest = sentence.split(" ")
    return " ".join([first if first == "I" else first.lower(), *rest])
