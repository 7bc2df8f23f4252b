"""Candidates that share their beginning, and sequences that share a row: the same numbers from fewer tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from lorasc_ds.data import collate
from lorasc_ds.encoding import ScoredTokens
from lorasc_ds.errors import ConfigError
from lorasc_ds.evaluation import check_layout
from lorasc_ds.layout import Layout, Tree, common_length, rows_of, trees_of
from lorasc_ds.models import takes_attention_bias
from lorasc_ds.objectives import attention_bias, summed_loss, token_log_probabilities

CPU = torch.device("cpu")
ids = st.lists(st.integers(1, 4), min_size=0, max_size=5).map(tuple)


@st.composite
def questions(draw: st.DrawFn) -> list[ScoredTokens]:
    """Candidates with a common beginning, some of them equal or the beginning of another."""
    common = (0, *draw(ids), 1)
    texts = [(*common, *draw(ids), draw(st.integers(1, 4))) for _ in range(draw(st.integers(1, 4)))]
    return [ScoredTokens(text, draw(st.integers(1, len(text) - 1))) for text in texts]


@settings(max_examples=200)
@given(st.lists(questions(), min_size=1, max_size=3), st.booleans(), st.booleans())
def test_every_scored_token_stands_where_it_is_looked_for(
    made: list[list[ScoredTokens]], share_prefixes: bool, pack: bool
) -> None:
    """Followed back through what it sees, each scored token has the tokens of its own sequence before it."""
    batch = collate(made, [0] * len(made), Layout(9, share_prefixes, pack))
    sequences = [sequence for candidates in made for sequence in candidates]
    expected = [(n, at) for n, sequence in enumerate(sequences) for at in sequence.targets]
    assert batch.token_sequence.tolist() == [n for n, _ in expected]
    assert batch.token_target.tolist() == [sequences[n].ids[at] for n, at in expected]
    for (n, at), row, place in zip(expected, batch.token_row.tolist(), batch.token_position.tolist(), strict=True):
        if batch.segments is None:
            seen, positions = torch.arange(place + 1), torch.arange(place + 1)
        else:
            seen = (attention_bias(batch.segments, torch.float32)[row, 0, place] == 0).nonzero()[:, 0]
            positions = batch.segments[0, row, seen]
        assert tuple(batch.input_ids[row, seen].tolist()) == sequences[n].ids[:at]
        assert positions.tolist() == list(range(at))


def test_what_is_common_leaves_a_token_of_each() -> None:
    assert common_length([(1, 2, 3), (1, 2, 4)]) == 2
    assert common_length([(1, 2, 3), (1, 2, 3)]) == 2
    assert common_length([(1, 2), (1, 2, 3)]) == 1
    assert common_length([(1, 2), (3, 2)]) == 0


def test_candidates_with_little_in_common_keep_their_rows() -> None:
    cut = [ScoredTokens((1, *range(10, 20)), 3), ScoredTokens((1, *range(30, 40)), 3)]
    assert all(not tree.branches for tree in trees_of(cut, share_prefixes=True).values())


def test_packed_rows_are_as_long_as_the_longest_sequence() -> None:
    trees = [Tree(tuple(range(n))) for n in (3, 9, 2, 5, 4, 9, 1)]
    rows = rows_of(trees, Layout(0, pack=True))
    assert sorted(number for row in rows for number in row) == list(range(7))
    assert all(sum(trees[number].size for number in row) <= 9 for row in rows)
    assert len(rows) == 4  # 33 tokens in rows of 9
    assert rows_of(trees, Layout(0)) == [[number] for number in range(7)]


def rows_with_endings() -> list[list[ScoredTokens]]:
    generator = torch.Generator().manual_seed(1)

    def made(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 40, (length,), generator=generator).tolist())

    found = []
    for number in range(5):
        prompt = (1, *made(4 + 3 * number))
        answers = [made(length) for length in (1, 2, 5, 3)[: 2 + number % 3]]
        found.append([ScoredTokens((*prompt, *answer), len(answer)) for answer in answers])
    return found


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=64, n_embd=24, n_layer=2, n_head=2))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "stories260K"])
@pytest.mark.parametrize("layout", [Layout(2, True), Layout(2, False, True), Layout(2, True, True)], ids=str)
def test_shared_rows_compute_what_separate_rows_do(
    tiny_llama: LlamaForCausalLM, shared_data: Path, kind: str, attention: str, layout: Layout
) -> None:
    model: PreTrainedModel = tiny_llama if kind == "llama" else gpt2()
    if kind == "stories260K":
        model = AutoModelForCausalLM.from_pretrained(shared_data / "models" / "stories260K")
    model.set_attn_implementation(attention)
    made = rows_with_endings()
    with torch.no_grad():
        shared = token_log_probabilities(model.eval(), collate(made, [0] * 5, layout))
        alone = [token_log_probabilities(model, collate([[c]], [0], Layout(2))) for q in made for c in q]
    assert torch.allclose(shared, torch.cat(alone), rtol=0, atol=1e-5)
    check_layout(model, layout, CPU)


@pytest.mark.parametrize("loss", ["lm", "classification"])
def test_gradients_are_those_of_separate_rows(tiny_llama: LlamaForCausalLM, loss: str) -> None:
    made = rows_with_endings()
    made = [[one[1]] for one in made] if loss == "lm" else made

    def gradients(layout: Layout) -> list[torch.Tensor]:
        tiny_llama.zero_grad()
        summed_loss(tiny_llama, collate(made, [0] * 5, layout), loss).backward()
        return [p.grad.clone() for p in tiny_llama.parameters() if p.grad is not None]

    padded, shared = gradients(Layout(2)), gradients(Layout(2, True, True))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(padded, shared, strict=True))


def test_a_model_that_does_not_heed_what_it_is_told_to_see_is_found_out(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def everything(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return attention_bias(torch.zeros_like(segments), dtype)

    monkeypatch.setattr("lorasc_ds.objectives.attention_bias", everything)
    with pytest.raises(ConfigError, match=r"training\.share_prefixes and training\.packing need a model"):
        check_layout(tiny_llama, Layout(2, pack=True), CPU)


def test_sliding_windows_are_left_alone(tiny_llama: LlamaForCausalLM) -> None:
    assert takes_attention_bias(tiny_llama)
    with torch.device("meta"):
        mistral = MistralForCausalLM(
            MistralConfig(
                hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, sliding_window=8
            )
        )
    assert not takes_attention_bias(mistral)
