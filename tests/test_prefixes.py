"""What reading the beginning of a question once saves, on real rows; `launch/benchmark.py` (C10) measures the time."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lorasc_ds.benchmark.data import rows_of, tokens


@pytest.mark.parametrize(("task", "most"), [("rte", 0.51), ("record", 0.5), ("copa", 0.7)])
def test_shared_beginnings_leave_this_much_to_read(shared_data: Path, task: str, most: float) -> None:
    """Against closed form: the longest common beginning, and of every rest all but the last token."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")
    _, examples = rows_of(task, shared_data, tokenizer)
    expected = 0
    for example in examples:
        ids = [candidate.ids for candidate in example.candidates]
        common = 0
        while common < min(map(len, ids)) - 1 and len({one[common] for one in ids}) == 1:
            common += 1
        expected += common + sum(len(rest) for rest in {one[common:-1] for one in ids})
    shared, apart = tokens(examples)
    assert shared == expected
    assert shared <= most * apart
