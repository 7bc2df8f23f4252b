"""What the shape of Llama-2-7B alone decides, counted without its weights on the meta device: C7, C8 and C11."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, LlamaConfig

from lorasc_ds.algorithm.experts import Pair
from lorasc_ds.algorithm.ledger import Adapter, Base, Ledger
from lorasc_ds.benchmark import peers
from lorasc_ds.benchmark.ours import prepared, text_of, write_model
from lorasc_ds.benchmark.results import Result, Target
from lorasc_ds.benchmark.setting import Setting
from lorasc_ds.data import Batch, collate
from lorasc_ds.encoded import ScoredTokens
from lorasc_ds.layout import Layout
from lorasc_ds.objectives import summed_loss

META = torch.device("meta")
SCORED = 0.3  # of the tokens; the others are a prompt's
FLASH = "benchmark_attention"  # transformers looks for a package, where a name says flash


def llama2_7b(layers: int = 32) -> LlamaConfig:
    return LlamaConfig(num_hidden_layers=layers, max_position_embeddings=4096)  # its other defaults are the 7B shape


def flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: object
) -> tuple[Tensor, None]:
    """Causal attention as a flash kernel keeps it for the backward pass: q, k, v, the output and a number a row."""
    out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=module.scaling)[0]
    return out.transpose(1, 2), None


AttentionInterface.register(FLASH, flash)


def our_pass(setting: Setting, architecture: LlamaConfig, tokens: int, scored: int) -> Callable[[], Tensor]:
    """A forward pass of a sequence, as a run takes it, to its loss."""
    folder = setting.fresh("shape")
    (folder / "text.txt").write_text(text_of(512, 0, 1000))
    settings = {
        "model": {"dtype": "bfloat16"},
        "task": {"name": "text", "train_file": str(folder / "text.txt"), "block_size": 16},
    }
    preparation = prepared(write_model(folder, architecture), settings)
    model = preparation.shape.train()
    model.set_attn_implementation(FLASH)
    sequence = ScoredTokens(tuple(range(tokens + 1)), scored)
    batch: Batch = collate([[sequence]], [0], Layout(0)).to(META)
    return lambda: summed_loss(model, batch, "lm")


def peer_pass(architecture: LlamaConfig, tokens: int, recomputed: bool) -> Callable[[], Tensor]:
    """The same with PEFT at its defaults: pairs in float32, all logits."""
    model = peers.with_peft(peers.random_model(architecture, torch.bfloat16, META))
    model.set_attn_implementation(FLASH)
    if recomputed:
        model.enable_input_require_grads()  # as HF Trainer's recipes do
        model.gradient_checkpointing_enable()
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=META)
    return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss


def flops_of(forward: Callable[[], Tensor]) -> int:
    """Of a forward and backward pass; attention counted as if it were not causal."""
    with FlopCounterMode(display=False) as counter:
        forward().backward()
    return counter.get_total_flops()


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Of the tensors that a forward pass keeps for the backward pass, each storage once, parameters left out."""
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not (tensor._is_view() and isinstance(tensor._base, nn.Parameter)):
            held[tensor.untyped_storage()._cdata] = tensor  # kept alive, so that no number is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    del loss
    return total


def flops(setting: Setting) -> Iterator[Result]:
    """C7: FLOPs a token of a 2048-token sequence, 70 % of it a prompt."""
    tokens, layers = (256, 2) if setting.quick else (2048, 32)
    architecture = llama2_7b(layers)
    ours = flops_of(our_pass(setting, architecture, tokens, round(SCORED * tokens))) / tokens / 1e9
    for recomputed, bound in ((True, 0.68), (False, 0.97)):
        peer = flops_of(peer_pass(architecture, tokens, recomputed)) / tokens / 1e9
        name = "HF + PEFT, recomputing" if recomputed else "HF + PEFT"
        yield setting.judged(
            Result(
                "C7",
                f"GFLOP a token of {tokens}, {layers} layers, 70 % prompt: ours / {name}",
                ours / peer,
                target=Target("<=", bound),
                ours=f"{ours:.2f}",
                peer=f"{name}: {peer:.2f}",
            )
        )


def kept_per_layer(make: Callable[[LlamaConfig], Callable[[], Tensor]], tokens: int) -> float:
    """Bytes a token and layer: what a third layer adds to two."""
    two, three = (saved_bytes(make(llama2_7b(layers))) for layers in (2, 3))
    return (three - two) / tokens


def activations(setting: Setting) -> Iterator[Result]:
    """C8: in KiB a token and layer, as the published counts are."""
    tokens = 256
    ours = kept_per_layer(lambda one: our_pass(setting, one, tokens, tokens), tokens) / 1024
    peer = kept_per_layer(lambda one: peer_pass(one, tokens, False), tokens) / 1024
    yield Result(
        "C8",
        "kept for the backward pass, a token and layer",
        ours,
        "KiB",
        target=Target("<=", 110.0),
        ours=f"{ours:.1f} KiB",
        peer=f"HF + PEFT: {peer:.1f} KiB",
        details={"peer_kibibytes": peer},
    )


def checkpoints(setting: Setting) -> Iterator[Result]:
    """C11: the file of an expert, really written, beside all weights in bfloat16."""
    architecture = llama2_7b(2 if setting.quick else 32)
    with META:
        model = peers.AutoModelForCausalLM.from_config(architecture, dtype=torch.bfloat16)
    merged = sum(one.nbytes for one in model.parameters())
    folder = setting.fresh("ledger")
    written = expert_bytes(model, folder)
    yield setting.judged(
        Result(
            "C11",
            "bytes of an expert in the ledger / of the merged model",
            written / merged,
            target=Target("<=", 1 / 500),
            ours=f"{written / 1e6:.2f} MB",
            peer=f"merged model: {merged / 1e6:,.0f} MB",
            details={"expert_bytes": written, "merged_bytes": merged},
        )
    )


def expert_bytes(model: nn.Module, folder: Path) -> int:
    """Of the file that a closed expert of rank 8 on q and v leaves."""
    slow = {
        f"{name}.weight": Pair(torch.zeros(peers.RANK, one.in_features), torch.zeros(one.out_features, peers.RANK))
        for name, one in sorted(model.named_modules())
        if isinstance(one, nn.Linear) and name.endswith(peers.TARGETS)
    }
    ledger = Ledger(
        directory=folder,
        strategy="lorasc",
        base=Base("llama2-7b", None, "bfloat16", "0" * 64),
        adapter=Adapter("lora", peers.RANK, 2.0),
        seed=0,
        slow_retention=0.6,
        noise_intensity=0.1,
        weights=tuple(sorted(slow)),
        noised=(),
    )
    ledger.append(
        index=1,
        steps=(0, 1),
        slow_retention=0.6,
        noise_intensity=0.0,
        noise_scale=dict.fromkeys(slow, 0.0),
        slow=slow,
        persistent={},
    )
    return sum(file.stat().st_size for file in folder.glob("expert_*"))
