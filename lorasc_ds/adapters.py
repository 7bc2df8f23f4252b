"""LoRA pairs on a Hugging Face model, through PEFT: which weights are adapted and how they are called.

The only file that imports peft, and the only one that knows where a pair sits inside a model.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lorasc_ds.errors import ConfigError

ADAPTER = "default"


@dataclass(frozen=True, slots=True)
class AdaptedWeight:
    """A frozen weight with the trainable pair on it.

    Args:
        name: the key under which `save_pretrained` writes the weight, `.weight` included.
        shape: (out, in), also where an engine has cut the weight up and left an empty tensor.
        rank: r.
        weight: (out, in), frozen, in the storage dtype.
        A: (rank, in), trainable, float32.
        B: (out, rank), trainable, float32.
        scaling: s in `D = s·B·A`.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    weight: nn.Parameter
    A: nn.Parameter
    B: nn.Parameter
    scaling: float


def matches(path: str, target: str) -> bool:
    """PEFT's rule: the target is the module's path or a dotted end of it."""
    return path == target or path.endswith(f".{target}")


def select_modules(model: nn.Module, target_modules: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers to adapt, by path.

    Raises:
        ConfigError: a target matches nothing, only some layers of a stack, or something that is no plain
            `nn.Linear`; or two targets share one tensor. The message lists the names that exist.
    """
    modules = dict(model.named_modules())
    available = Counter(path.rsplit(".", 1)[-1] for path, m in modules.items() if type(m) is nn.Linear)
    names = ", ".join(f"{name} ({count})" for name, count in sorted(available.items())) or "none"
    selected: dict[str, nn.Linear] = {}
    for target in target_modules:
        found = {path: module for path, module in modules.items() if matches(path, target)}
        if not found:
            fused = sorted(name for name in available if re.search("qkv|query_key_value", name))
            hint = f"; {fused[0]} holds q, k and v in one: name it to adapt all three" if fused else ""
            raise ConfigError(
                f"adapter.target_modules: {target} matches no module; the linear layers of this model are:"
                f" {names}{hint}"
            )
        missing = [] if names_a_layer(target) else layers_without(found, modules)
        if missing:
            raise ConfigError(
                f"adapter.target_modules: {target} matches {len(found)} modules but none in {', '.join(missing)};"
                f" name the layers, as in {next(iter(found))}, or take names that every layer has: {names}"
            )
        for path, module in found.items():
            if type(module) is not nn.Linear:
                raise ConfigError(
                    f"adapter.target_modules: {path} is a {type(module).__name__}, and only torch.nn.Linear can be"
                    f" merged into exactly; the linear layers of this model are: {names}"
                )
            selected[path] = module
    owners: dict[int, str] = {}
    for path, module in modules.items():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            other = owners.setdefault(id(weight), path)
            if other != path and (path in selected or other in selected):
                raise ConfigError(
                    f"adapter.target_modules: {path} and {other} share one tensor, so a merge would change both;"
                    " leave it out"
                )
    return selected


def names_a_layer(target: str) -> bool:
    """Whether the target holds a layer's number, and so asks for some layers on purpose."""
    return any(part.isdigit() for part in target.split("."))


def layers_without(found: dict[str, nn.Module], modules: dict[str, nn.Module]) -> list[str]:
    """Layers of a repeated stack (`layers.0`, `layers.1`, ...) that hold no match though others of it do."""
    reached: dict[str, set[str]] = defaultdict(set)
    for path in found:
        for match in re.finditer(r"\.(\d+)(?=\.|$)", path):
            reached[path[: match.start()]].add(match.group(1))
    missing = []
    for stack, indices in reached.items():
        container = modules.get(stack)
        if isinstance(container, nn.ModuleList):
            missing += [f"{stack}.{i}" for i in range(len(container)) if str(i) not in indices]
    return missing


def saved_name(model: PreTrainedModel, path: str, shape: tuple[int, int]) -> str:
    """The key under which `save_pretrained` writes the weight of the module at `path`.

    Raises:
        ConfigError: the checkpoint stores it in another shape, fused with others for instance.
    """
    key = f"{path}.weight"
    written = revert_weight_conversion(model, {key: torch.empty(shape, device="meta")})
    if len(written) != 1 or next(iter(written.values())).shape != shape:
        raise ConfigError(
            f"adapter.target_modules: {key} is stored as {', '.join(written)} in this model's checkpoints,"
            " in another shape, so its merged weight cannot be named; take other layers"
        )
    return next(iter(written))


def attach(
    model: PreTrainedModel,
    *,
    rank: int,
    lora_alpha: float,
    use_rslora: bool,
    dropout: float,
    target_modules: Sequence[str],
) -> list[AdaptedWeight]:
    """Put a LoRA pair on every targeted layer, freeze everything else, and name the weights.

    The pairs are float32 whatever the model's dtype, `B` is 0; the cascade draws `A`.

    Returns:
        the adapted weights in ledger order: sorted by name, as strings.

    Raises:
        ConfigError: see `select_modules`; or the rank is larger than a weight.
    """
    selected = select_modules(model, target_modules)
    for path, module in selected.items():
        if rank > min(shape_of(module)):
            raise ConfigError(
                f"adapter.rank {rank} is larger than {path}, whose weight is {shape_of(module)}: lower it"
            )
    names = {path: saved_name(model, path, shape_of(module)) for path, module in selected.items()}
    inject_adapter_in_model(
        LoraConfig(
            r=rank,
            lora_alpha=lora_alpha,  # type: ignore[arg-type]  # annotated int, used as a number
            use_rslora=use_rslora,
            lora_dropout=dropout,
            target_modules=list(selected),
        ),
        model,
        ADAPTER,
    )
    adapted = []
    for path, name in names.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, LoraLinear)
        lora_A, lora_B = layer.lora_A[ADAPTER].float(), layer.lora_B[ADAPTER].float()
        frozen, A, B = weight_of(selected[path]), weight_of(lora_A), weight_of(lora_B)
        adapted.append(AdaptedWeight(name, shape_of(selected[path]), rank, frozen, A, B, layer.scaling[ADAPTER]))
    return sorted(adapted, key=lambda one: one.name)


def shape_of(layer: nn.Linear) -> tuple[int, int]:
    """(out, in), also where an engine has cut the weight up and left an empty tensor."""
    return layer.out_features, layer.in_features


def weight_of(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def backbone_items(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters and buffers under the names of a model without adapters; the pairs are left out."""
    for key, tensor in model.state_dict(keep_vars=True).items():
        if ".lora_" not in key:
            yield key.replace(".base_layer.", "."), tensor
