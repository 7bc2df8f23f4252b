"""Metrics of an answer in words, each from 0 to 1 (protocols 1.7 and 4)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

NO_ANSWER = ("CANNOTANSWER", "no answer")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case, without punctuation and articles, one space between words."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split())


def token_f1(answer: str, gold: str) -> float:
    """F1 of the bags of words; 0 where they share none, as two empty ones do."""
    found, wanted = normalize(answer).split(), normalize(gold).split()
    shared = (Counter(found) & Counter(wanted)).total()
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


def f1(answer: str, golds: Sequence[str]) -> float:
    """The best F1 over the right answers; where there is none to be given, only saying so is right."""
    if golds[0] in NO_ANSWER:
        return float(normalize(answer) == normalize(golds[0]))
    return max(token_f1(answer, gold) for gold in golds)


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """Whether the answer is one of the right ones after `normalize`."""
    return float(normalize(answer) in map(normalize, golds))


def same_but_for_punctuation(answer: str, gold: str) -> float:
    """Whether two texts are the same in lower case and without punctuation, the decimal point among it."""
    return float(answer.lower().translate(PUNCTUATION) == gold.lower().translate(PUNCTUATION))
