"""The layers that keep less: the same bits forward, the true gradient, and what is kept, counted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaModel, LlamaRMSNorm

from lorasc_ds.adapters import LeanLora, attach
from lorasc_ds.kernels.lean import is_lean, lean_layer, make_lean
from lorasc_ds.kernels.norms import RMSNorm
from lorasc_ds.kernels.swiglu import SwiGLU, SwiGLUFunction

SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA_TYPES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8)),
}
QV = {"rank": 4, "lora_alpha": 8.0, "use_rslora": False, "target_modules": ("q_proj", "v_proj")}


def wide_norms(model: PreTrainedModel) -> PreTrainedModel:
    """A model as it is after training: norms' weights that are not 1."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model.requires_grad_(False)


@pytest.mark.parametrize("kind", LLAMA_TYPES)
def test_lean_layers_compute_the_same_bits(kind: str) -> None:
    model = wide_norms(LLAMA_TYPES[kind]()).to(torch.bfloat16)
    before = model(input_ids=torch.arange(24).view(2, 12)).logits
    names = list(model.state_dict())
    make_lean(model)
    kinds = [type(layer) for layer in model.modules()]
    assert kinds.count(SwiGLU) == 2
    assert is_lean(model)
    assert kinds.count(RMSNorm) == (9 if kind == "qwen3" else 5)
    assert torch.equal(model(input_ids=torch.arange(24).view(2, 12)).logits, before)
    assert list(model.state_dict()) == names


def test_other_layers_stay() -> None:
    """Another activation, another norm's arithmetic, a norm that trains."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=24, n_layer=1, n_head=4))
    kinds = [type(layer) for layer in model.modules()]
    make_lean(model.to(torch.bfloat16))
    assert [type(layer) for layer in model.modules()] == kinds
    assert not is_lean(model)
    llama = LLAMA_TYPES["llama"]().requires_grad_(False)
    make_lean(llama)
    assert not any(isinstance(layer, (RMSNorm, SwiGLU)) for layer in llama.modules())
    assert lean_layer(LlamaMLP(LlamaConfig(**SMALL, hidden_act="gelu"))) is None
    assert lean_layer(LlamaRMSNorm(8)) is None
    assert isinstance(lean_layer(LlamaRMSNorm(8).requires_grad_(False)), RMSNorm)


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [one.detach().requires_grad_() for one in inputs]
    output = function(*leaves)
    output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output))
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_gradients_are_those_of_float64(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x, gate, up = (3 * torch.randn(5, 7, 16, dtype=torch.float64).to(dtype) for _ in range(3))
    weight = nn.Parameter(1 + torch.randn(16).to(dtype), requires_grad=False)

    def norm(x: Tensor) -> Tensor:
        return weight.double() * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()

    cases = [
        (RMSNorm(weight, 1e-6), norm, [x]),
        (SwiGLUFunction.apply, lambda gate, up: nn.functional.silu(gate) * up, [gate, up]),
    ]
    for ours, truth, inputs in cases:
        expected = gradients(truth, *(one.double() for one in inputs))
        for found, true in zip(gradients(ours, *inputs), expected, strict=True):
            assert (found.double() - true).abs().max() <= tolerance * true.abs().max()


@pytest.mark.parametrize("method", ["lora", "lora-fa"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_a_pair_has_the_output_and_gradients_of_float64(dtype: torch.dtype, tolerance: float, method: str) -> None:
    model = LLAMA_TYPES["qwen2"]().to(dtype)  # q and v have a bias
    weights = attach(model, **QV, dropout=0.0, method=method)
    one = weights[0]
    torch.manual_seed(0)
    nn.init.normal_(one.B)
    nn.init.normal_(one.A)
    layer = model.get_submodule(one.name.removesuffix(".weight"))
    assert isinstance(layer, LeanLora)
    x = torch.randn(3, 5, 24).to(dtype)
    base = layer.base_layer
    bias = base.bias.double()

    def truth(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return x @ one.weight.double().T + bias + one.scaling * x @ A.T @ B.T

    expected = gradients(truth, x.double(), one.A.double(), one.B.double())
    leaf = x.clone().requires_grad_()
    output = layer(leaf)
    output.backward(torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output).to(dtype))
    assert (
        output.double() - truth(x.double(), one.A.double(), one.B.double())
    ).abs().max() <= 4 * tolerance * output.abs().max()
    for found, true in zip((leaf.grad, one.A.grad, one.B.grad), expected, strict=True):
        if found is None:
            assert method == "lora-fa"
        else:
            assert (found.double() - true).abs().max() <= 4 * tolerance * true.abs().max()


@pytest.fixture(scope="module")
def seven_billion() -> Callable[[], LlamaForCausalLM]:
    """Llama-2-7B's shape in bfloat16, all its layers one and the same; the weights are zeros."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=1
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    return lambda: copy.deepcopy(model, {id(p): p for p in model.parameters()})  # the weights are shared


def kept_bytes(model: nn.Module, layers: int, tokens: int) -> int:
    """What a forward pass through so many layers keeps for the backward pass, each storage once; no parameters."""
    (body,) = (one for one in model.modules() if isinstance(one, LlamaModel))
    body.layers = nn.ModuleList([body.layers[0]] * layers)
    body.config.num_hidden_layers = layers
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=torch.arange(tokens)[None] % 8, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def per_token_and_layer(model: nn.Module) -> float:
    """Of a layer inside the stack, in KiB; what does not grow with the tokens, the pairs in bfloat16, is not counted."""
    one, other = (kept_bytes(model, 3, tokens) - kept_bytes(model, 2, tokens) for tokens in (8, 16))
    return (other - one) / 8 / 1024


def test_what_a_layer_keeps_at_the_7b_shape(seven_billion: Callable[[], LlamaForCausalLM]) -> None:
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    peft = inject_adapter_in_model(lora, seven_billion())
    for layer in peft.modules():
        if isinstance(layer, LoraLinear):
            layer.lora_A.float()  # as `get_peft_model` has them
            layer.lora_B.float()
    plain = per_token_and_layer(peft)
    model = seven_billion()
    attach(model, **{**QV, "rank": 8}, dropout=0.0)
    make_lean(model)
    ours = per_token_and_layer(model)
    print(f"KiB a token and layer: {ours:.1f}, HF + PEFT {plain:.1f}")
    assert 150 < plain < 170
    assert ours == pytest.approx(99, rel=0.01)  # `layer_bytes`; the target is 110
