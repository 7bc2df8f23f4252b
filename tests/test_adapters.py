"""Which weights are adapted, what they are called, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lorasc_ds.adapters import AdaptedWeight, attach, backbone_items
from lorasc_ds.errors import ConfigError

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


def attached(model: PreTrainedModel, *targets: str, **options: Any) -> list[AdaptedWeight]:
    settings: dict[str, Any] = {"rank": 4, "lora_alpha": 8.0, "use_rslora": False, "dropout": 0.0} | options
    return attach(model, target_modules=targets or ("q_proj", "v_proj"), **settings)


MODELS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, intermediate_size=48, num_key_value_heads=2)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=48)),
    "clip": lambda: CLIPVisionModel(
        CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_names_are_the_keys_of_the_saved_file(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    model.save_pretrained(tmp_path / "plain")
    weights = attached(model, *(("query_key_value",) if kind == "gpt-neox" else ("q_proj", "v_proj")))
    assert [one.name for one in weights] == sorted(one.name for one in weights)
    with safe_open(tmp_path / "plain" / "model.safetensors", framework="pt") as file:
        for one in weights:
            assert torch.equal(file.get_tensor(one.name), one.weight)
        saved = set(file.keys())
    model.save_pretrained(tmp_path / "adapted", state_dict=dict(backbone_items(model)))
    with safe_open(tmp_path / "adapted" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_pairs_train_and_they_are_float32(tiny_llama: LlamaForCausalLM, dtype: torch.dtype) -> None:
    weights = attached(tiny_llama.to(dtype))
    trainable = {id(p) for p in tiny_llama.parameters() if p.requires_grad}
    assert trainable == {id(p) for one in weights for p in (one.A, one.B)}
    assert len(weights) == 4
    for one in weights:
        assert one.A.dtype == one.B.dtype == torch.float32
        assert one.weight.dtype == dtype
        assert one.A.shape == (4, 24)
        assert one.B.shape == (one.weight.shape[0], 4)


def test_the_live_model_computes_w_plus_s_b_a(tiny_llama: LlamaForCausalLM) -> None:
    """Adapters as deltas of the weights, the way a merge will make them."""
    ids = torch.arange(10)[None]
    weights = attached(tiny_llama, lora_alpha=12.0)
    for one in weights:
        torch.nn.init.normal_(one.B, std=0.1)
    adapted = tiny_llama(input_ids=ids).logits
    for one in weights:
        one.weight.data += one.scaling * one.B.data @ one.A.data
        one.B.data.zero_()
    torch.testing.assert_close(tiny_llama(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-5)
    assert weights[0].scaling == 3.0


def test_rslora_changes_the_scaling_only(tiny_llama: LlamaForCausalLM) -> None:
    assert attached(tiny_llama, use_rslora=True)[0].scaling == 8.0 / 2.0  # alpha / sqrt(rank)


def test_dropout_is_on_the_branch_only(tiny_llama: LlamaForCausalLM) -> None:
    ids = torch.arange(10)[None]
    weights = attached(tiny_llama, dropout=0.5)
    tiny_llama.train()
    torch.testing.assert_close(tiny_llama(input_ids=ids).logits, tiny_llama(input_ids=ids).logits)  # B is 0
    torch.nn.init.normal_(weights[0].B)
    assert not torch.equal(tiny_llama(input_ids=ids).logits, tiny_llama(input_ids=ids).logits)


def test_a_target_that_matches_nothing_ends_the_run_with_what_exists(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match=r"query matches no module; .* are: .*k_proj \(2\).*q_proj \(2\)"):
        attached(tiny_llama, "q_proj", "query")


def test_fused_projections_are_named() -> None:
    """q and v alone cannot be adapted where one matrix holds them; all of it can."""
    model = MODELS["gpt-neox"]()
    with pytest.raises(ConfigError, match=r"q_proj matches no module; .*query_key_value holds q, k and v in one"):
        attached(model)
    assert [one.shape for one in attached(model, "query_key_value")] == [(96, 32)] * 2


def test_a_target_in_some_layers_only_ends_the_run(tiny_llama: LlamaForCausalLM) -> None:
    layer = tiny_llama.model.layers[1].self_attn
    layer.renamed = layer.q_proj
    del layer.q_proj
    with pytest.raises(ConfigError, match=r"q_proj matches 1 modules but none in model\.layers\.1; .*renamed \(1\)"):
        attached(tiny_llama, "q_proj")


def test_layers_named_by_number_are_taken_as_asked(tiny_llama: LlamaForCausalLM) -> None:
    weights = attached(tiny_llama, "layers.1.self_attn.q_proj")
    assert [one.name for one in weights] == ["model.layers.1.self_attn.q_proj.weight"]


def test_conv1d_is_refused_by_name() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64))
    with pytest.raises(ConfigError, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D"):
        attached(model, "c_attn")


def test_a_tied_weight_is_refused_by_name() -> None:
    config = Qwen2Config(**SMALL, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True)
    with pytest.raises(
        ConfigError, match=r"lm_head and model\.embed_tokens share one tensor|embed_tokens and lm_head share"
    ):
        attached(Qwen2ForCausalLM(config), "lm_head")


def test_a_rank_above_the_weight_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.rank 13 is larger than model\.layers\.0\.self_attn\.v_proj"):
        attached(tiny_llama, rank=13)
