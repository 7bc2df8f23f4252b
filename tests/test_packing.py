"""Several sequences in one row: the model computes of each what it computes of it alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from conftest import Start
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lorasc_ds import objectives
from lorasc_ds.data import Batch, collate
from lorasc_ds.encoded import ScoredTokens
from lorasc_ds.kernels import attention
from lorasc_ds.kernels.attention import SEQUENCES, Sequences
from lorasc_ds.layout import Layout, Tree, rows_of
from lorasc_ds.models import takes_attention_bias, takes_sequences
from lorasc_ds.objectives import scored_logits, summed_loss
from lorasc_ds.order import Order

SIZES = {"vocab_size": 40, "max_position_embeddings": 128}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_positions=128, n_embd=24, n_layer=2, n_head=4, attn_pdrop=0, bos_token_id=0, eos_token_id=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, **SIZES)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(hidden_size=24, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=24, **SIZES)
    ),
}  # fmt: skip


@pytest.fixture(params=["tiny_llama", "stories260K", *MODELS])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Tiny models; in GPT-2 and OPT every position has a vector of its own. Weights wide enough for leaks to show."""
    torch.manual_seed(0)
    if request.param == "tiny_llama":
        made: PreTrainedModel = request.getfixturevalue("tiny_llama")
    elif request.param == "stories260K":
        folder = request.getfixturevalue("shared_data") / "models" / "stories260K"
        made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        made = MODELS[request.param]()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if request.param != "stories260K" and weight.dim() == 2:
                weight.mul_(8 if "embed" in name or "wte" in name or "wpe" in name else 4)
    return made.eval()


def sequences(lengths: Sequence[int], scored: Sequence[int], seed: int = 0) -> list[ScoredTokens]:
    generator = torch.Generator().manual_seed(seed)
    return [
        ScoredTokens(tuple(torch.randint(2, 40, (length,), generator=generator).tolist()), count)
        for length, count in zip(lengths, scored, strict=True)
    ]


LENGTHS, SCORED = (30, 9, 17, 12, 5, 2, 28, 14), (29, 3, 16, 1, 4, 1, 5, 13)


def alone(model: PreTrainedModel, some: Sequence[ScoredTokens]) -> torch.Tensor:
    """The logits of every scored token, its sequence read by itself without any mask."""
    return torch.cat([model(torch.tensor([one.ids])).logits[0, -one.scored - 1 : -1] for one in some])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_packed_sequence_has_the_logits_it_has_alone(model: PreTrainedModel, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    assert takes_attention_bias(model)
    some = sequences(LENGTHS, SCORED)
    batch = collate([[one] for one in some], [0] * 8, Layout(0, pack=True))
    assert len(batch.input_ids) == 4  # of 109 tokens, 29 in a row
    with torch.no_grad():
        expected = alone(model, some)
        assert (scored_logits(model, batch) - expected).abs().max() <= 1e-5 * max(1, float(expected.std()))


def test_a_flat_row_has_the_logits_and_gradients_of_rows_of_their_own(model: PreTrainedModel) -> None:
    """And a model so told reads padded rows, biased ones and a single sequence as before."""
    assert takes_sequences(model)
    some = sequences(LENGTHS, SCORED)
    flat = collate([[one] for one in some], [0] * 8, Layout(0, pack=True, flat=True))
    assert flat.input_ids.shape == (1, sum(LENGTHS) - 8)
    assert flat.sequences is not None
    assert flat.sequences.bounds.tolist() == [0, *accumulate(length - 1 for length in LENGTHS)]

    def gradients(batch: Batch) -> dict[str, torch.Tensor]:
        model.zero_grad()
        summed_loss(model, batch, "lm").backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    padded = gradients(collate([[one] for one in some], [0] * 8, Layout(0)))
    with torch.no_grad():
        expected = alone(model, some)
    model.set_attn_implementation(SEQUENCES)
    found = gradients(flat)
    scale = max(float(one.abs().max()) for one in padded.values())
    assert max(float((padded[name] - found[name]).abs().max()) for name in padded) <= 1e-5 * scale
    with torch.no_grad():
        for layout in (Layout(0, pack=True, flat=True), Layout(0, pack=True), Layout(0)):
            batch = collate([[one] for one in some], [0] * 8, layout)
            assert (scored_logits(model, batch) - expected).abs().max() <= 1e-5 * max(1, float(expected.std()))
        wrong = replace(
            flat, sequences=Sequences.of((29, 9, 15, 11, 4, 1, 27, 13))
        )  # the second holds a token too many
        assert (scored_logits(model, wrong) - expected).abs().max() > 1e-3


def test_one_launch_is_asked_for_what_each_by_itself_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the CUDA kernel is given, tried on a reckoning of what its documentation says."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 12, 8) for heads in (4, 2, 2))
    sequences = Sequences.of((5, 1, 6))

    def documented(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_bounds: torch.Tensor, k_bounds: torch.Tensor,
                   longest_q: int, longest_k: int, *, scale: float, window_size: tuple[int, int], enable_gqa: bool) -> torch.Tensor:  # fmt: skip
        assert q_bounds.dtype == k_bounds.dtype == torch.int32
        assert (longest_q, longest_k, window_size, enable_gqa) == (6, 6, (-1, 0), True)
        output = torch.empty_like(q)
        for start, stop in zip(q_bounds.tolist(), q_bounds.tolist()[1:], strict=False):
            k_all, v_all = (one[start:stop].repeat_interleave(2, dim=1) for one in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q[start:stop], k_all) * scale
            seen = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
            output[start:stop] = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v_all)
        return output

    monkeypatch.setattr(attention, "varlen_attn", documented)
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # pyright: ignore
    expected, _ = attention.attend(module, query, key, value, None, scaling=0.3, sequences=sequences)
    found = attention.in_one_launch(query, key, value, sequences, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_model_that_shows_no_head_computes_all_logits_and_the_same(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = collate([[one] for one in sequences(LENGTHS, SCORED)], [0] * 8, Layout(0))
    heads = []
    tiny_llama.lm_head.register_forward_hook(lambda _, inputs, logits: heads.append(logits.shape[:-1].numel()))
    with torch.no_grad():
        expected = scored_logits(tiny_llama, batch)
        monkeypatch.setattr(tiny_llama, "get_output_embeddings", lambda: None)
        found = scored_logits(tiny_llama, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert heads == [len(batch.places), batch.input_ids.numel()]


def test_what_leaks_is_seen(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof above would not hold if rows were plainly causal, if one wrong token were seen, or if positions ran on."""
    some = sequences(LENGTHS, SCORED)
    batch = collate([[one] for one in some], [0] * 8, Layout(0, pack=True))
    assert batch.segments is not None
    expected = alone(model, some)
    right = objectives.attention_bias

    def causal(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return right(torch.zeros_like(segments), dtype)

    def one_token(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        bias = right(segments, dtype).clone()
        row = int((segments[1] != segments[1, :, :1]).any(dim=1).nonzero()[0])
        start = int((segments[1, row] != segments[1, row, 0]).nonzero()[0])
        bias[row, 0, start:, start - 1] = 0  # the end of the first sequence is seen by those after it
        return bias

    for leak in (causal, one_token):
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(objectives, "attention_bias", leak)
            assert (scored_logits(model, batch) - expected).abs().max() > 1e-3, leak.__name__
    if model.config.model_type in ("gpt2", "opt"):
        running_on = batch.segments.clone()
        running_on[0] = torch.arange(running_on.shape[2])
        moved = replace(batch, segments=running_on)
        with torch.no_grad():
            assert (scored_logits(model, moved) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("loss", ["lm", "classification"])
def test_gradients_of_packed_rows_are_those_of_padded_ones(
    model: PreTrainedModel, implementation: str, loss: str
) -> None:
    model.set_attn_implementation(implementation)
    some = sequences(LENGTHS, SCORED)
    examples = [some[at : at + 2] for at in range(0, 8, 2)]

    def gradients(layout: Layout) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        total = summed_loss(model, collate(examples, [0, 1, 0, 1], layout), loss)
        total.backward()
        return total.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    (padded_loss, padded), (packed_loss, packed) = gradients(Layout(0)), gradients(Layout(0, pack=True))
    assert packed_loss == pytest.approx(padded_loss, rel=1e-5)
    assert padded.keys() == packed.keys()
    scale = max(float(one.abs().max()) for one in padded.values())
    assert max(float((padded[name] - packed[name]).abs().max()) for name in padded) <= 1e-5 * scale


def test_shared_beginnings_and_packing_go_together(tiny_llama: LlamaForCausalLM) -> None:
    """Candidates of several questions, each question's beginning read once, several questions in a row."""
    model = tiny_llama.eval()
    endings = sequences([3, 5, 2, 4, 3, 6], [3, 5, 2, 4, 3, 6], seed=1)
    beginnings = sequences([12, 20, 9], [1, 1, 1], seed=2)
    examples = [
        [ScoredTokens(beginnings[at].ids + ending.ids, ending.scored) for ending in endings[2 * at : 2 * at + 2]]
        for at in range(3)
    ]
    batch = collate(examples, [0] * 3, Layout(0, share_prefixes=True, pack=True))
    assert len(batch.input_ids) < 6
    assert batch.input_tokens == sum(map(len, (one.ids for one in (*endings, *beginnings)))) - 6
    with torch.no_grad():
        expected = alone(model, [one for candidates in examples for one in candidates])
        assert (scored_logits(model, batch) - expected).abs().max() <= 1e-5


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_rows_hold_everything_once_and_none_is_longer_than_the_longest(sizes: list[int]) -> None:
    trees = [Tree(tuple(range(size))) for size in sizes]
    rows = rows_of(trees, Layout(0, pack=True))
    assert sorted(number for row in rows for number in row) == list(range(len(sizes)))
    fill = [sum(sizes[number] for number in row) for row in rows]
    assert max(fill) == max(sizes)
    assert all(one + other > max(sizes) for at, one in enumerate(fill) for other in fill[:at]), (
        "two rows would fit in one"
    )
    assert len(rows) <= 1.7 * -(-sum(sizes) // max(sizes)) + 1  # best fit is at most 1.7 times the best there is


def test_real_rows_leave_less_padding_packed(shared_data: Path) -> None:
    """GSM8K's lengths, 32 to a micro batch: what part of a batch's cells is a token."""
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text().splitlines()[:3200]
    lengths = torch.tensor([len(line) // 4 for line in lines])
    some = sequences(lengths.tolist(), [1] * len(lines))

    def efficiency(pack: bool, by_length: bool) -> float:
        order = Order(len(some), 0, 32, lengths=lengths if by_length else None)(0)
        batches = [collate([[some[at]] for at in one], [0] * 32, Layout(0, pack=pack)) for one in order.split(32)[:25]]
        return sum(one.input_tokens for one in batches) / sum(one.input_ids.numel() for one in batches)

    found = {(pack, by_length): efficiency(pack, by_length) for pack in (False, True) for by_length in (False, True)}
    print({key: round(value, 3) for key, value in found.items()})
    assert found[False, False] < 0.6
    assert found[False, True] > 0.9
    assert found[True, False] > 0.85


def test_a_packed_run_is_the_padded_run_up_to_rounding(run: Start, tmp_path: Path) -> None:
    """On rows of very different lengths: the blocks of small files, of which one may not hold another's text."""
    files = []
    for number in range(12):
        files.append(tmp_path / f"{number}.jsonl")
        words = ["abcdefghijklm"[(at * (number + 3)) % 13] for at in range(4 + number * 11 % 37)]
        files[-1].write_text(json.dumps({"text": " ".join(words)}))
    settings = {
        "task.name": "text",
        "task.train_file": ",".join(map(str, files)),
        "task.eval_file": files[0],
        "task.block_size": 64,
        "training.batch_size": 6,
        "training.epochs": 2,
        "training.learning_rate": 1e-2,
        "tracking.log_steps": 1,
    }
    plain, packed, auto = (run(**settings, **{"training.packing": one}) for one in ("false", "true", "null"))
    losses = [[record["loss"] for record in one.metrics("step")] for one in (plain, packed)]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert packed.summary["eval"]["dev"]["loss"] == pytest.approx(plain.summary["eval"]["dev"]["loss"], rel=1e-4)
    assert plain.summary["eval"]["dev"]["loss"] < plain.summary["eval_before"]["dev"]["loss"]
    assert packed.summary["weights_sha256"] != plain.summary["weights_sha256"], "other rows, so other rounding"
    assert auto.summary["weights_sha256"] == packed.summary["weights_sha256"]
    written = json.loads((auto.directory / "model" / "config.json").read_text())
    assert SEQUENCES not in json.dumps(written), "it is loaded where this package is not"
