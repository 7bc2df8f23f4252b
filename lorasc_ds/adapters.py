"""LoRA pairs on a Hugging Face model, through PEFT: which weights are adapted and how they are called.

The only file that imports peft, and the only one that knows where a pair sits inside a model.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import gather_params_ctx
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lorasc_ds.errors import ConfigError
from lorasc_ds.kernels.lora import Down, Up, around

ADAPTER = "default"


class LeanLora(LoraLinear):
    """PEFT's layer, with a forward pass of two small products in the dtype of its input.

    PEFT's own keeps a float32 copy of the input for every pair, and makes the change before it adds it. It is a plain
    LoRA that is neither merged nor switched off here; all else of PEFT's layer is as it was.
    """

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        high = self.base_layer(x)
        low = self.lora_A[ADAPTER](self.lora_dropout[ADAPTER](x))
        return self.lora_B[ADAPTER](low, high, self.scaling[ADAPTER])


def make_pairs_lean(model: nn.Module) -> None:
    """Let PEFT's LoRA layers, which are plain ones with one adapter, be `LeanLora`s: the same pairs, in place."""
    for layer in model.modules():
        if type(layer) is LoraLinear:
            layer.__class__ = LeanLora
            layer.lora_A[ADAPTER] = around(Down, weight_of(layer.lora_A[ADAPTER]))
            layer.lora_B[ADAPTER] = around(Up, weight_of(layer.lora_B[ADAPTER]))


@dataclass(frozen=True, slots=True)
class AdaptedWeight:
    """A frozen weight with the trainable pair on it.

    Args:
        name: the key under which `save_pretrained` writes the weight, `.weight` included.
        shape: (out, in), also where an engine has cut the weight up and left an empty tensor.
        rank: r.
        weight: (out, in), frozen, in the storage dtype.
        A: (rank, in), float32; trainable, except for LoRA-FA.
        B: (out, rank), trainable, float32.
        scaling: s in `D = s·B·A`.
        magnitude: DoRA's row norms, (out,), trainable, float32; None for the other methods.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    weight: nn.Parameter
    A: nn.Parameter
    B: nn.Parameter
    scaling: float
    magnitude: nn.Parameter | None = None

    @property
    def pair(self) -> list[nn.Parameter]:
        """The trainable parameters of the pair: what an expert begins anew."""
        return [parameter for parameter in (self.A, self.B) if parameter.requires_grad]


def matches(path: str, target: str) -> bool:
    """PEFT's rule: the target is the module's path or a dotted end of it; besides, `*` is any part of a path."""
    return fnmatchcase(path, target) or fnmatchcase(path, f"*.{target}")


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


def names_of(model: PreTrainedModel, selected: Mapping[str, nn.Linear]) -> dict[str, str]:
    """The names of the weights of `select_modules`, by path."""
    return {path: saved_name(model, path, shape_of(module)) for path, module in selected.items()}


def attach(
    model: PreTrainedModel,
    *,
    rank: int,
    lora_alpha: float,
    use_rslora: bool,
    dropout: float,
    target_modules: Sequence[str],
    method: str = "lora",
) -> list[AdaptedWeight]:
    """Put a LoRA pair on every targeted layer, freeze everything else, and name the weights.

    The pairs are float32 whatever the model's dtype, `B` is 0; the cascade draws `A`.

    Args:
        method: `lora`, `lora+`, `dora` (a magnitude besides, the row norms of the weight) or `lora-fa` (`A` is frozen).

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
    names = names_of(model, selected)
    config = LoraConfig(
        r=rank,
        lora_alpha=lora_alpha,  # type: ignore[arg-type]  # annotated int, used as a number
        use_rslora=use_rslora,
        use_dora=method == "dora",
        lora_dropout=dropout,
        target_modules=list(selected),
    )
    inject_adapter_in_model(config, model, ADAPTER)
    if method != "dora":
        make_pairs_lean(model)
    for path in names:
        adapter = lora_of(model, path)
        adapter.lora_A[ADAPTER].float().requires_grad_(method != "lora-fa")
        adapter.lora_B[ADAPTER].float()
        if method == "dora" and weight_of(adapter.lora_magnitude_vector[ADAPTER]).dtype != torch.float32:
            with gather_params_ctx(weight_of(selected[path]), modifier_rank=None):  # PEFT rounded them to bfloat16
                norms = torch.linalg.vector_norm(selected[path].weight.detach().double(), dim=1).float()
            weight_of(adapter.lora_magnitude_vector[ADAPTER]).data = norms
    return sorted((adapted_weight(lora_of(model, path), name) for path, name in names.items()), key=lambda o: o.name)


def find(model: PreTrainedModel) -> list[AdaptedWeight]:
    """The adapted weights of a model that `peft.get_peft_model` or `attach` gave pairs to, in ledger order.

    Raises:
        ConfigError: there are none; or PEFT was asked for something that a merge cannot keep.
    """
    weights = []
    for path, layer in model.named_modules():
        if isinstance(layer, AuxiliaryTrainingWrapper):
            raise ConfigError(
                f"{path} is trained besides, through PEFT's modules_to_save or trainable_token_indices: the merged"
                " model could not be saved; leave it out"
            )
        if isinstance(layer, LoraLayer):
            if not isinstance(layer, LoraLinear) or type(layer.get_base_layer()) is not nn.Linear:
                raise ConfigError(
                    f"{path} is a LoRA on a {type(layer.get_base_layer()).__name__}: only torch.nn.Linear"
                )
            if list(layer.lora_A) != [ADAPTER] or layer.merged or layer.lora_bias[ADAPTER] or layer.fan_in_fan_out:
                raise ConfigError(
                    f"{path}: one adapter called {ADAPTER!r}, not merged, without a LoRA bias and without"
                    " fan_in_fan_out is needed"
                )
            base = layer.get_base_layer()
            assert isinstance(base, nn.Linear)
            weights.append(adapted_weight(layer, saved_name(model, path, shape_of(base))))
    if not weights:
        raise ConfigError("the model has no LoRA layers: give it some with peft.get_peft_model first")
    return sorted(weights, key=lambda one: one.name)


def base_model(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside what engines and PEFT put around it.

    Raises:
        ConfigError: there is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ConfigError(f"there is no Hugging Face model in this {type(model).__name__}")


def lora_of(model: nn.Module, path: str) -> LoraLinear:
    layer = model.get_submodule(path)
    assert isinstance(layer, LoraLinear)
    return layer


def adapted_weight(layer: LoraLinear, name: str) -> AdaptedWeight:
    base = layer.get_base_layer()
    assert isinstance(base, nn.Linear)
    A, B = (weight_of(part[ADAPTER]) for part in (layer.lora_A, layer.lora_B))
    dora = layer.lora_magnitude_vector
    magnitude = weight_of(dora[ADAPTER]) if ADAPTER in dora else None
    return AdaptedWeight(
        name, shape_of(base), layer.r[ADAPTER], weight_of(base), A, B, layer.scaling[ADAPTER], magnitude
    )


def other_matrices(model: PreTrainedModel, weights: Sequence[AdaptedWeight]) -> dict[str, nn.Parameter]:
    """The frozen matrices that are not adapted, by the name they are saved under, sorted; tied ones once."""
    adapted = {id(one.weight) for one in weights}
    found = {}
    for key, parameter in model.named_parameters():
        shape = matrix_shape(parameter)
        if len(shape) == 2 and ".lora_" not in key and id(parameter) not in adapted:
            path = key.replace(".base_layer.", ".").removesuffix(".weight")
            found[saved_name(model, path, shape)] = parameter
    return dict(sorted(found.items()))


def matrix_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Also where an engine has cut the parameter up and left an empty tensor."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def parameter_groups(
    weights: Sequence[AdaptedWeight], loraplus_lr_ratio: float, head: Sequence[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Groups for the optimizer, none of them empty, each with its `role` and its `lr_ratio`: its rate over the run's.

    Magnitudes and a task's head never share a group with pairs, since they keep their moments when those are emptied;
    and they are not decayed, which would shrink the model's weights themselves.

    Args:
        head: parameters of a task's head that are trained.
        loraplus_lr_ratio: the rate of `B` over that of `A`; 1 for all methods but LoRA+.
    """
    parts = {"pairs": [parameter for one in weights for parameter in one.pair]}
    if loraplus_lr_ratio != 1:
        parts = {"A": [one.A for one in weights], "B": [one.B for one in weights]}
    groups = [
        {"params": params, "role": role, "lr_ratio": loraplus_lr_ratio if role == "B" else 1.0}
        for role, params in parts.items()
    ]
    magnitudes = [one.magnitude for one in weights if one.magnitude is not None]
    if magnitudes:
        groups.append({"params": magnitudes, "role": "magnitude", "lr_ratio": 1.0, "weight_decay": 0.0})
    if head:
        groups.append({"params": list(head), "role": "head", "lr_ratio": 1.0, "weight_decay": 0.0})
    return groups


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


def backbone_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The frozen parameters that the pretrained model brought."""
    items = [tensor for _, tensor in backbone_items(model) if isinstance(tensor, nn.Parameter)]
    return [parameter for parameter in items if not parameter.requires_grad]


def with_adapter(model: PreTrainedModel, directory: Path) -> nn.Module:
    """A model with a saved adapter on it, as PEFT's users load it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT asks the old way
        return PeftModel.from_pretrained(model, directory)
