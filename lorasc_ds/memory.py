"""How much memory a process needs under each engine, from shapes alone: for any number of GPUs, with none at hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorasc_ds.activations import activation_bytes, evaluation_bytes
from lorasc_ds.preparation import Preparation

GIB = 2**30
DS_CONFIGS = Path(__file__).parents[1] / "ds_configs"
SHIPPED = ("zero1.json", "zero2.json", "zero3.json", "zero3_offload.json")
USUAL_GPU = 80 * GIB
FREE_SHARE = 0.1  # of a GPU, for fragmentation, the CUDA context and the libraries' workspaces

# Float32 copies of the pairs by ZeRO stage (0: no DeepSpeed): how many a process has whole, and of how many its share.
# They are the pair, its gradient, two moments and, in ZeRO, a master. ZeRO-3 cuts up the pair too and keeps small ones
# whole besides; offloaded, it has the gradient twice.
WHOLE_AND_SHARED = {0: (4, 0), 1: (2, 3), 2: (1, 4), 3: (1, 5)}
OFFLOADED_SHARED = 6


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the process that needs most, rank 0: on its GPU, except for `host`.

    Args:
        weights: frozen ones, as they are stored.
        pairs: with gradients, moments and masters.
        slow_pairs: the averages; every process has them whole.
        accumulators: the float32 sums behind bfloat16 weights.
        copy: of adapted float32 weights, during an evaluation inside an expert.
        activations: an estimate of a micro batch's, or of the logits of an evaluation where those are more.
        buffers: of ZeRO: two reduce buckets, and in ZeRO-3 the weights gathered for a forward or backward pass.
        gathered: the two weights that a boundary with `cascade.merge_path gather` holds whole.
        host: what stays in host memory.
    """

    weights: int
    pairs: int
    slow_pairs: int
    accumulators: int
    copy: int
    activations: int
    buffers: int
    gathered: int
    host: int

    @property
    def device(self) -> int:
        """The sum on the GPU. Not all of it is there at one moment, so the sum is on the safe side."""
        return sum(getattr(self, field.name) for field in fields(self)) - self.host


def engines(processes: int) -> dict[str, dict[str, Any]]:
    """The `zero_optimization` settings by engine, {} without DeepSpeed; those to be preferred, the fastest, first."""
    shipped = {name: json.loads((DS_CONFIGS / name).read_text())["zero_optimization"] for name in SHIPPED}
    return {"plain" if processes == 1 else "ddp": {}, **shipped}


def memory_plan(preparation: Preparation, zero: dict[str, Any]) -> Memory:
    """Bytes by what holds them, with as many processes as were prepared for.

    Args:
        zero: one of `engines`.
    """
    return sharded_plan(preparation, zero) if zero.get("stage") == 3 else replicated_plan(preparation, zero)


def replicated_plan(preparation: Preparation, zero: dict[str, Any]) -> Memory:
    """Every process has the weights whole: no DeepSpeed, ZeRO-1 and 2. ZeRO cuts the pairs up, laid end to end."""
    frozen, pairs, adapted = tensors_of(preparation)
    share = 4 * math.ceil(elements_of(pairs) / preparation.data.world_size)
    whole, shared = WHOLE_AND_SHARED[zero.get("stage", 0)]
    edited = edited_bytes(preparation, elements_of(adapted), on_host=False)
    return Memory(
        weights=bytes_of(frozen),
        pairs=whole * bytes_of(pairs) + shared * share,
        slow_pairs=bytes_of(part for one in preparation.weights for part in (one.A, one.B)),
        accumulators=edited.accumulators,
        copy=edited.copy,
        activations=max(activation_bytes(preparation), evaluation_bytes(preparation)),
        buffers=2 * 4 * zero.get("reduce_bucket_size", 0),
        gathered=0,
        host=edited.host,
    )


def sharded_plan(preparation: Preparation, zero: dict[str, Any]) -> Memory:
    """ZeRO-3: a process has a slice of ceil(n / processes) of every n elements.

    A gathered parameter is a copy, except where one process has its only slice on the device already. Parameters up
    to the persistence threshold are gathered once and kept.
    """
    processes = preparation.data.world_size
    frozen, pairs, adapted = tensors_of(preparation)
    offload = zero.get("offload_param")
    copies = processes > 1 or offload is not None
    threshold = zero["stage3_param_persistence_threshold"]
    kept_frozen, kept_pairs = ([p for p in some if copies and p.numel() <= threshold] for some in (frozen, pairs))
    passing = [p for p in (*frozen, *pairs) if copies and p.numel() > threshold]

    edits_whole = preparation.config.cascade.merge_path == "gather"  # on rank 0
    elements = elements_of(adapted, 1 if edits_whole else processes)
    edited = edited_bytes(preparation, elements, on_host=offload is not None and not edits_whole)

    whole, shared = WHOLE_AND_SHARED[3]
    pair_slices = bytes_of(pairs, processes)
    weights, trained, host = bytes_of(frozen, processes), shared * pair_slices, edited.host
    if offload is not None:
        host += pinned_bytes(frozen, processes) if offload["pin_memory"] else weights
        host += OFFLOADED_SHARED * pair_slices
        weights, trained = 0, 0
    return Memory(
        weights=weights + bytes_of(kept_frozen),
        pairs=trained + whole * bytes_of(kept_pairs),
        slow_pairs=bytes_of(part for one in preparation.weights for part in (one.A, one.B)),
        accumulators=edited.accumulators,
        copy=edited.copy,
        activations=max(activation_bytes(preparation), evaluation_bytes(preparation)),
        buffers=2 * 4 * zero["reduce_bucket_size"] + passing_bytes(passing, zero, processes),
        gathered=2 * max(bytes_of([weight]) for weight in adapted) if edits_whole and copies else 0,
        host=host,
    )


def passing_bytes(parameters: list[nn.Parameter], zero: dict[str, Any], processes: int) -> int:
    """Of the parameters that a forward or backward pass gathers and frees again, at most.

    `stage3_max_live_parameters` are gathered at a time, and `stage3_prefetch_bucket_size` of them are still in the
    flat buffer besides that the processes filled together; one process has no such buffer. Either number is passed by
    one parameter at most, and neither is more than all parameters.
    """
    if not parameters:
        return 0
    largest = max(parameters, key=nn.Parameter.numel)
    live, flat = (
        min(bytes_of(parameters), largest.element_size() * (zero[key] + largest.numel()))
        for key in ("stage3_max_live_parameters", "stage3_prefetch_bucket_size")
    )
    return live + (flat if processes > 1 else 0)


class Edited(NamedTuple):
    """Bytes that a process needs to edit weights at boundaries."""

    accumulators: int
    copy: int
    host: int


def edited_bytes(preparation: Preparation, elements: int, *, on_host: bool) -> Edited:
    """Float32 sums and copies, beside the edited weights unless `cascade.accumulator` is host, and a selection's copy.

    Args:
        elements: of the adapted weights, that the process edits.
        on_host: these weights are in host memory.
    """
    config = preparation.config
    float32 = config.model.dtype == "float32"
    inside = preparation.evaluation_steps - {expert.stop for expert in preparation.plan}
    accumulators = 0 if float32 else 4 * elements
    copy = 4 * elements if float32 and (inside or preparation.method.candidates) else 0
    selected = (4 if float32 else 2) * elements if config.training.select == "best_dev" else 0
    sums_on_host = on_host or config.cascade.accumulator == "host"
    return Edited(
        accumulators=0 if sums_on_host else accumulators,
        copy=0 if on_host else copy,
        host=(accumulators if sums_on_host else 0) + (copy if on_host else 0) + selected,
    )


def tensors_of(preparation: Preparation) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """The frozen parameters, the trained ones of the adapters, and those of the frozen ones that are adapted."""
    frozen = [p for p in preparation.shape.parameters() if not p.requires_grad]
    pairs = [pair for one in preparation.weights for pair in one.pair]
    pairs += [one.magnitude for one in preparation.weights if one.magnitude is not None]
    return frozen, pairs, [one.weight for one in preparation.weights]


def elements_of(tensors: Iterable[Tensor], processes: int = 1) -> int:
    """Of the largest slices, with each tensor cut up for so many processes."""
    return sum(math.ceil(tensor.numel() / processes) for tensor in tensors)


def bytes_of(tensors: Iterable[Tensor], processes: int = 1) -> int:
    return sum(math.ceil(tensor.numel() / processes) * tensor.element_size() for tensor in tensors)


def pinned_bytes(tensors: Iterable[Tensor], processes: int) -> int:
    """Of slices in page-locked memory: torch makes each of them a power of two."""
    return sum(1 << (bytes_of([tensor], processes) - 1).bit_length() for tensor in tensors)


def gpu_bytes(gib: float | None) -> int:
    """The memory of a GPU: as asked for; else of the one that is here; else of a usual one."""
    if gib is not None:
        return round(gib * GIB)
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else USUAL_GPU
