"""Examples as tokens. A sequence is scored on some of its tokens, the last ones as a rule, given all before them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorasc_ds.tasks import Example
from lorasc_ds.tasks.base import ImageSource


@dataclass(frozen=True, slots=True)
class Visuals:
    """What a vision-language model is given of a sequence besides its tokens.

    Args:
        images: in the order of their places among the tokens.
        sha256: of the files of the images.
        kinds: of every token, by the name of the model's input (`token_type_ids`, `mm_token_type_ids`).
    """

    images: tuple[ImageSource, ...]
    sha256: str
    kinds: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Token ids, of which some are predicted, each from all before it.

    Args:
        scored: how many are predicted.
        positions: which; None: the last ones. Never the first token.
        visuals: None, where there is text alone.
    """

    ids: tuple[int, ...]
    scored: int
    positions: tuple[int, ...] | None = None
    visuals: Visuals | None = None

    @property
    def targets(self) -> Sequence[int]:
        """The positions of what is predicted."""
        return range(len(self.ids) - self.scored, len(self.ids)) if self.positions is None else self.positions


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """An example as tokens, once per candidate; `gold` as in `Example`.

    Args:
        prompt: what an answer is generated from; empty where none is.
        source: the example itself, where its answer is generated.
        group: as in `Example`.
        cut: tokens that the longest of its sequences lost to the limit.
        shots_left_out: demonstrations that its prompt lost to the limit.
        visuals: of the prompt.
    """

    id: str
    candidates: tuple[ScoredTokens, ...]
    gold: tuple[int, ...]
    prompt: tuple[int, ...] = ()
    source: Example | None = None
    group: str = ""
    cut: int = 0
    shots_left_out: int = 0
    visuals: Visuals | None = None

    @property
    def target(self) -> ScoredTokens:
        """The right answer, which language modelling trains on."""
        return self.candidates[self.gold[0]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an answer is generated from; `cut` and `shots_left_out` as in `EncodedExample`."""

    ids: tuple[int, ...] = ()
    cut: int = 0
    shots_left_out: int = 0


def digest_of(examples: Iterable[EncodedExample]) -> str:
    """sha256 over examples in their order: ids, tokens, images, what is scored and what is right."""
    total = hashlib.sha256()
    for example in examples:
        lengths = [number for candidate in example.candidates for number in (len(candidate.ids), candidate.scored)]
        numbers = array("q", [*lengths, -1, *example.gold, -1])
        for candidate in example.candidates:
            numbers.extend(candidate.ids)
            numbers.extend(candidate.positions or ())
        numbers.extend(example.prompt)
        images = "" if example.visuals is None else example.visuals.sha256
        total.update(example.id.encode() + b"\0" + numbers.tobytes() + images.encode())
    return total.hexdigest()
