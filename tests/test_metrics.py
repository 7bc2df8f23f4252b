"""F1, exact match and the comparison of numbers: check values, and another way to count."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasc_ds.tasks.metrics import exact_match, f1, normalize, same_but_for_punctuation


@pytest.mark.parametrize(
    ("answer", "golds", "expected_f1", "expected_match"),
    [
        ("the Eiffel Tower.", ["Eiffel tower"], 1, 1),
        ("in 1998 or 1999", ["1998"], 0.4, 0),
        ("21 points", ["21", "twenty one points"], 2 / 3, 0),
        ("well-known", ["well known"], 0, 0),
        ("", ["x"], 0, 0),
        ("the", ["a"], 0, 1),  # both normalise to nothing
        ("no answer", ["no answer", "yes"], 1, 1),
        ("yes", ["no answer", "yes"], 0, 1),  # the first gold alone decides
        ("answer", ["yes", "no answer"], 2 / 3, 0),
        ("Cannotanswer.", ["CANNOTANSWER"], 1, 1),
        ("red red blue", ["red blue blue"], 2 / 3, 0),  # bags, not sets
    ],
)
def test_check_values(answer: str, golds: list[str], expected_f1: float, expected_match: float) -> None:
    assert f1(answer, golds) == pytest.approx(expected_f1)
    assert exact_match(answer, golds) == expected_match


def test_normalize_works_in_its_order() -> None:
    assert normalize("  The  A-an\tU.S.A. Theatre an\n") == "aan usa theatre"
    assert normalize("a.n apple") == "apple", "punctuation goes before articles"
    assert normalize("«An»") == "« »", "punctuation is ASCII's"


WORDS = st.lists(st.sampled_from(["red", "blue", "the", "one", "1,000", "x."]), max_size=6).map(" ".join)


@given(WORDS, WORDS)
def test_f1_is_that_of_words_crossed_out_one_by_one(answer: str, gold: str) -> None:
    left, shared = normalize(gold).split(), 0
    for word in normalize(answer).split():
        if word in left:
            left.remove(word)
            shared += 1
    found, wanted = len(normalize(answer).split()), len(normalize(gold).split())
    expected = 0.0 if not shared else 2 / (found / shared + wanted / shared)
    assert f1(answer, [gold]) == pytest.approx(expected)
    assert f1(answer, ["green", gold]) == pytest.approx(expected)


def test_numbers_are_compared_without_punctuation() -> None:
    assert same_but_for_punctuation("3.5", "35") == 1
    assert same_but_for_punctuation("18.00", "18") == 0
    assert same_but_for_punctuation("-7", "7") == 1
    assert same_but_for_punctuation("Yes", "yes.") == 1
    assert same_but_for_punctuation(" 7", "7") == 0
