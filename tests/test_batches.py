"""The order of an epoch: shares of weighted sources, batches of like length; each against a plain reckoning."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RECIPE
from hypothesis import given
from hypothesis import strategies as st
from transformers.trainer_pt_utils import get_length_grouped_indices

from lorasc_ds.cli import build_config, fields_of, parse_command_line, parse_override
from lorasc_ds.errors import ConfigError
from lorasc_ds.order import Order, derived_seed, shares_of, sources_of
from lorasc_ds.preparation import prepare


def weighted(counts: dict[str, int], weights: dict[str, float], seed: int = 0) -> tuple[Order, list[str]]:
    """The order of sources that stand mixed up, and the source of every example."""
    groups = [name for at in range(max(counts.values())) for name, count in counts.items() if at < count]
    return Order(len(groups), seed, batch_size=4, sources=sources_of(groups, weights)), groups


@given(
    weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6),
    count=st.integers(1, 500),
)
def test_shares_are_whole_and_nearest_to_the_weights(weights: list[float], count: int) -> None:
    shares = shares_of(weights, count)
    assert sum(shares) == count
    assert all(abs(share - count * w / sum(weights)) < 1 + 1e-9 for share, w in zip(shares, weights, strict=True))


def test_shares_by_largest_remainder() -> None:
    assert shares_of([3, 1], 40) == [30, 10]
    assert shares_of([1, 1, 1], 10) == [4, 3, 3]
    assert shares_of([0.5, 0.3, 0.2], 7) == [4, 2, 1]  # 3.5, 2.1, 1.4


def test_an_epoch_has_the_shares_and_a_source_repeats_itself_only_when_it_is_used_up() -> None:
    """a has 30 examples and gives 10 an epoch, b has 10 and gives 30."""
    order, groups = weighted({"a": 30, "b": 10}, {"a": 1, "b": 3})
    epochs = [order(epoch).tolist() for epoch in range(6)]
    for epoch in epochs:
        assert Counter(groups[at] for at in epoch) == {"a": 10, "b": 30}
        assert set(Counter(at for at in epoch if groups[at] == "b").values()) == {3}
    for first in (0, 3):  # three epochs are one pass over a
        of_a = Counter(at for epoch in epochs[first : first + 3] for at in epoch if groups[at] == "a")
        assert set(of_a.values()) == {1}
        assert len(of_a) == 30
    assert epochs[0] != epochs[1]
    assert "".join(groups[at] for at in epochs[0]) not in ("a" * 10 + "b" * 30, "b" * 30 + "a" * 10)


def test_a_share_that_ends_inside_a_pass_goes_on_there() -> None:
    """Of 7 examples 5 an epoch: after 7 epochs each was seen five times, and never two times more than another."""
    order, groups = weighted({"a": 7, "b": 3}, {"a": 1, "b": 1})
    assert [source.share for source in order.sources] == [5, 5]
    seen: Counter[int] = Counter({at: 0 for at, group in enumerate(groups) if group == "a"})
    for epoch in range(7):
        seen.update(at for at in order(epoch).tolist() if groups[at] == "a")
        assert max(seen.values()) - min(seen.values()) <= 1
        assert sum(seen.values()) == 5 * (epoch + 1)
    assert set(seen.values()) == {5}


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    order, _ = weighted({"a": 30, "b": 10}, {"a": 1, "b": 3})
    again, _ = weighted({"a": 30, "b": 10}, {"a": 1, "b": 3})
    other, _ = weighted({"a": 30, "b": 10}, {"a": 1, "b": 3}, seed=1)
    assert torch.equal(order(5), again(5))  # drawn without the epochs before
    assert not torch.equal(order(5), other(5))
    seed = int.from_bytes(hashlib.sha256(b"3:1").digest()[:8], "big") >> 1
    expected = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(Order(10, seed=3, batch_size=4)(1), expected)


def test_a_source_without_a_share_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"task.weights gives b 0.001, which is 0 of the 40 examples of an epoch"):
        weighted({"a": 30, "b": 10}, {"a": 1, "b": 0.001})
    with pytest.raises(ConfigError, match=r"task.weights gives c 1, .* it has 0"):
        weighted({"a": 30, "b": 10}, {"a": 1, "b": 1, "c": 1})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.jsonl,b.jsonl", ("a.jsonl", "b.jsonl")),
        ("a.jsonl, b.jsonl", ("a.jsonl", "b.jsonl")),
        ("[a.jsonl, b.jsonl]", ("a.jsonl", "b.jsonl")),
        ('["a, b.jsonl"]', ("a, b.jsonl",)),
        ("a.jsonl", "a.jsonl"),
        ("on.txt", "on.txt"),
    ],
)
def test_one_file_is_a_text_and_several_are_a_list(text: str, value: object) -> None:
    config = build_config({"task": {"name": "text"}}, {}, {"task.train_file": text})
    assert config.task.model_dump()["train_file"] == value


def test_other_lists_on_the_command_line_are_what_they_were() -> None:
    known = fields_of()
    assert parse_override("q_proj", known["adapter.target_modules"]) == ["q_proj"]
    assert parse_override("3,1", known["task.weights"]) == [3, 1]
    assert parse_override("null", known["task.train_file"]) is None
    assert parse_override("0.5,0.6", known["cascade.slow_retention_candidates"]) == [0.5, 0.6]
    assert parse_override("auto", known["cascade.slow_retention"]) == "auto"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train_file": "a.txt", "weights": [1, 2]}, "task.weights has 2 numbers, but task.train_file names 1 files"),
        ({"train_file": ["a.txt", "b.txt"], "weights": [1, 2, 3]}, "task.weights has 3 numbers, but .* names 2 files"),
        ({"train_file": ["a.txt", "a.txt"]}, "task.train_file names 'a.txt' twice"),
        ({"train_file": ["a.txt", "b.txt"], "weights": [1, 0]}, "task.weights is 0: .* greater than 0"),
        ({"train_file": ["a.jsonl", "b.txt"], "streaming": True}, "task.streaming is true, but .* is 'b.txt': .jsonl"),
    ],
)
def test_sources_that_do_not_fit_are_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_config({"task": {"name": "text"} | settings}, {}, {})


@pytest.mark.parametrize(("count", "batch_size"), [(1003, 4), (1003, 1), (37, 4), (7, 4), (3, 4), (33, 8)])
def test_length_groups_are_hugging_face_s(count: int, batch_size: int) -> None:
    """Theirs puts the longest example first of all, in exchange for one; here its whole batch changes places."""
    lengths = torch.randint(1, 100, (count,), generator=torch.Generator().manual_seed(count))
    for epoch in range(4):
        order = Order(count, seed=5, batch_size=batch_size, lengths=lengths)(epoch)
        assert sorted(order.tolist()) == list(range(count))
        batches = order.split(batch_size)
        generator = torch.Generator().manual_seed(derived_seed(5, epoch))
        theirs = get_length_grouped_indices(lengths.tolist(), batch_size, generator=generator)
        assert lengths[order[0]] == lengths[theirs[0]] == lengths.max()
        their_lengths = [lengths[one].tolist() for one in torch.tensor(theirs).split(batch_size)]
        moved = [lengths[one].tolist() for one in batches]
        different = [at for at, (ours, other) in enumerate(zip(moved, their_lengths, strict=True)) if ours != other]
        assert len(different) <= 2, "the first batch, and the one it changed places with"
        assert sum(max(one) * len(one) for one in moved) <= sum(max(one) * len(one) for one in their_lengths)


def test_length_groups_keep_batches_together_and_differ_between_epochs() -> None:
    lengths = torch.arange(400) % 97
    order = Order(400, seed=0, batch_size=4, lengths=lengths)
    epochs = [order(epoch) for epoch in range(2)]
    assert not torch.equal(*epochs)
    assert torch.equal(epochs[1], Order(400, 0, 4, lengths=lengths)(1))
    spread = [float(sum(one.max() - one.min() for one in lengths[e].split(4))) for e in epochs]
    shuffled = lengths[Order(400, seed=0, batch_size=4)(0)].split(4)
    assert max(spread) < 0.2 * float(sum(one.max() - one.min() for one in shuffled))


def test_length_groups_of_weighted_sources_keep_the_shares() -> None:
    _, groups = weighted({"a": 30, "b": 10}, {"a": 1, "b": 3})
    sources = sources_of(groups, {"a": 1, "b": 3})
    order = Order(40, 0, 4, sources, lengths=torch.arange(40))
    assert Counter(groups[at] for at in order(3).tolist()) == {"a": 10, "b": 30}
    assert sorted(order(3).tolist()) == sorted(Order(40, 0, 4, sources)(3).tolist())


Files = Callable[..., str]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Writes .jsonl files of made digits-like documents, and gives their names as one argument."""

    def write(**rows: int) -> str:
        for name, count in rows.items():
            lines = [
                json.dumps({"text": " ".join("abcdefgh"[(at * 7 + i) % 8] for i in range(3 + at % 9))})
                for at in range(count)
            ]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        return ",".join(f"{tmp_path / name}.jsonl" for name in rows)

    return write


def test_a_block_belongs_to_one_file_and_the_shares_are_told(files: Files) -> None:
    names = files(a=60, b=20)
    arguments = ["--task.name=text", f"--task.train_file={names}", "--task.block_size=8", "--task.weights=1,3"]
    invocation = parse_command_line(arguments, RECIPE)
    assert not isinstance(invocation, str)
    preparation = prepare(invocation.config)
    one, other = names.split(",")
    blocks = {file: [e for e in preparation.splits["train"] if e.group == file] for file in (one, other)}
    tokenizer = preparation.reading.tokenizer
    for file, rows in ((one, 54), (other, 18)):  # a tenth of each is held out
        texts = [json.loads(line)["text"] for line in Path(file).read_text().splitlines()[:rows]]
        expected = [id for text in texts for id in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
        assert [id for block in blocks[file] for id in block.target.ids] == expected
        assert blocks[file][1].id == f"{file} block 2"
    count = len(preparation.splits["train"])
    shares = shares_of([1, 3], count)
    told = next(line for line in preparation.derived_numbers() if line.startswith("sources"))
    assert told == (
        f"sources   {shares[0] / count:.1%} {one}: {shares[0]} an epoch, {shares[0] / len(blocks[one]):.3g} times its"
        f" {len(blocks[one])}; {shares[1] / count:.1%} {other}: {shares[1]} an epoch,"
        f" {shares[1] / len(blocks[other]):.3g} times its {len(blocks[other])} examples"
    )
    step = preparation.data.step(0)
    assert step.ids == tuple(preparation.splits["train"][at].id for at in preparation.data.order(0)[:4].tolist())
