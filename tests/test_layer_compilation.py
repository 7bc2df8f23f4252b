"""Compiled layers compute what the layers compute, with one graph for batches of any size."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from conftest import Start
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM, PreTrainedModel

from lorasc_ds import layer_compilation, trainer
from lorasc_ds.adapters import attach
from lorasc_ds.cascade import Boundaries
from lorasc_ds.data import Batch, collate
from lorasc_ds.encoded import ScoredTokens
from lorasc_ds.errors import ConfigError
from lorasc_ds.kernels import attention
from lorasc_ds.kernels.attention import SEQUENCES
from lorasc_ds.kernels.lean import make_lean
from lorasc_ds.layer_compilation import check_compilation, compile_layers
from lorasc_ds.layout import Layout
from lorasc_ds.objectives import summed_loss

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo hides it itself


@pytest.fixture(autouse=True)
def no_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def with_pairs(model: PreTrainedModel, dropout: float = 0.0) -> PreTrainedModel:
    model.requires_grad_(False)
    attach(model, method="lora", rank=2, lora_alpha=4, use_rslora=False, dropout=dropout, target_modules=["q_proj", "v_proj"])  # fmt: skip
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    make_lean(model)
    return model.train()


def batch(seed: int, flat: bool) -> Batch:
    """Of four sequences of lengths that the seed draws."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 30, (4,), generator=generator).tolist()
    texts = [tuple(torch.randint(2, 40, (length,), generator=generator).tolist()) for length in lengths]
    return collate([[ScoredTokens(text, len(text) - 1)] for text in texts], [0] * 4, Layout(0, flat=flat))


def gradients(model: PreTrainedModel, batch: Batch) -> list[Tensor]:
    """The loss first."""
    model.zero_grad()
    torch.manual_seed(3)  # dropout
    loss = summed_loss(model, batch, "lm")
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def documented(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *_: Any, scale: float, **__: Any) -> Tensor:
    """What torch's varlen_attn says that it computes, without a look at a value of `bounds`."""
    number = (torch.arange(q.shape[0]) >= bounds[1:, None]).sum(0)
    seen = (number[:, None] == number) & torch.ones(q.shape[0], q.shape[0], dtype=torch.bool).tril()
    k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], dim=1) for one in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("rows", ["padded", "flat", "flat in one launch", "recomputed"])
def test_compiled_layers_train_alike_with_one_graph_for_all_sizes(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, rows: str
) -> None:
    """And one more for the first layer, whose input needs no gradient."""
    flat = rows.startswith("flat")
    written = with_pairs(tiny_llama, dropout=0.0 if rows == "recomputed" else 0.2)  # dynamo's own recomputation
    if flat:
        written.set_attn_implementation(SEQUENCES)
    if rows == "recomputed":
        written.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    compiled = copy.deepcopy(written)
    if rows == "flat in one launch":
        monkeypatch.setattr(attention, "varlen_attn", documented)
        monkeypatch.setattr(attention, "takes_one_launch", lambda query, dropout: True)
    compile_layers(compiled, backend="eager")
    for seed in range(2):
        gradients(compiled, batch(seed, flat))
    made = graphs()
    assert made > 0
    for seed in range(2, 8):
        one = batch(seed, flat)
        torch.testing.assert_close(gradients(compiled, one), gradients(written, one), rtol=1e-5, atol=1e-6)
    assert graphs() == made
    if rows != "flat":  # where sequences are attended to one by one, outside of the graphs
        assert not counters["graph_break"]
        assert made <= 2
    with torch.no_grad():
        compiled.eval()
        written.eval()
        assert torch.equal(summed_loss(compiled, batch(9, flat), "lm"), summed_loss(written, batch(9, flat), "lm"))
    assert graphs() == made, "evaluation is not compiled"


def test_layers_of_a_vision_tower_are_compiled() -> None:
    torch.manual_seed(0)
    written = with_pairs(
        CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=8,
                patch_size=4,
            )
        )
    )
    compiled = copy.deepcopy(written)
    compile_layers(compiled, backend="eager")
    pixels = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(compiled(pixels).pooler_output, written(pixels).pooler_output)
    assert 1 <= graphs() <= 2


def test_what_cannot_be_compiled_is_refused(tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    check_compilation(tiny_llama, 2)
    with pytest.raises(ConfigError, match=r"training\.compile is true, but ZeRO-3 gathers weights within a layer"):
        check_compilation(tiny_llama, 3)
    with pytest.raises(ConfigError, match=r"training\.compile is true, but Linear has no layers"):
        check_compilation(nn.Linear(2, 2), None)  # type: ignore[arg-type]
    monkeypatch.setattr(layer_compilation.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"training\.compile is true, but there is no C\+\+ compiler"):
        check_compilation(tiny_llama, None)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_run_is_the_run_without_and_boundaries_compile_nothing_again(
    run: Start, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    if backend == "inductor" and os.environ.get("LORASC_LONG") != "1":
        pytest.skip("takes a minute: .ci/long")
    seen = []
    close_expert = Boundaries.close_expert

    def counted(*arguments: Any) -> Any:
        seen.append(graphs())
        return close_expert(*arguments)

    monkeypatch.setattr(Boundaries, "close_expert", counted)
    monkeypatch.setattr(trainer, "compile_layers", partial(compile_layers, backend=backend))
    settings = {"task.train_examples": 12, "task.dev_examples": 8, "task.test_examples": 4, "training.epochs": 6}
    plain, compiled = (run(**settings, **{"training.compile": one}) for one in ("false", "true"))
    before, after = seen[:6], seen[6:]
    assert set(before) == {0}
    assert after[0] > 0
    assert len(set(after)) == 1
    assert len(after) == 6
    if backend == "eager":
        assert compiled.summary["weights_sha256"] == plain.summary["weights_sha256"]
    for name, loss in plain.summary["eval"].items():
        assert compiled.summary["eval"][name]["loss"] == pytest.approx(loss["loss"], rel=1e-4)
