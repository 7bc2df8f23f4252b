"""ZeRO-3: every weight is cut into one flat slice per rank. Two ways to edit it, of the same bits.

`local`: each rank edits its own slice, with no communication. DeepSpeed documents no such access, so
`local_edits_work` tries it on the live model. `gather`: rank 0 edits the gathered weights, one after the other; the
reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, cast

import torch
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.runtime.zero.partition_parameters import Init, ZeroParamStatus
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from lorasc_ds.sharding.backend import Slice
from lorasc_ds.sharding.engines import keep_scalars_whole
from lorasc_ds.sharding.optimizer_state import OptimizerVerbs, moment_names
from lorasc_ds.sharding.replicated import bit_sum

FEW = 1 << 20  # elements


@contextmanager
def cutting_no_scalars() -> Iterator[None]:
    """Inside, modules are made with `keep_scalars_whole`, before DeepSpeed cuts their parameters up."""
    cut_up = Init._post_init_method

    def keep_and_cut_up(self: Init, module: nn.Module) -> None:
        keep_scalars_whole(module)
        cut_up(self, module)

    Init._post_init_method = keep_and_cut_up
    try:
        yield
    finally:
        Init._post_init_method = cut_up


class Zero3Backend(OptimizerVerbs):
    """What both ways share. `optimizer` is DeepSpeed's wrapper."""

    merge_path = ""

    def settle(self, parameters: Sequence[nn.Parameter]) -> None:
        """Leave nothing gathered, as a forward pass does: an edit of a slice alone would not be seen, and be lost."""
        if any(cast(Any, one).ds_status != ZeroParamStatus.NOT_AVAILABLE for one in parameters):
            self.optimizer.empty_partition_cache()
        for one in parameters:
            if cast(Any, one).ds_status != ZeroParamStatus.NOT_AVAILABLE:
                raise RuntimeError(
                    f"{cast(Any, one).ds_summary()} stays gathered between steps: this DeepSpeed is not the 0.19 that"
                    " edits are made for"
                )

    def publish(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make edits visible to the next gather."""
        for one in parameters:
            cast(Any, one).ds_secondary_tensor = None  # a copy within the node (hpZ) would be served for ever
        if self.processes.device.type == "cuda":
            torch.cuda.synchronize()  # gathers run on a stream of their own, which does not wait for this one

    def full(self, tensor: Tensor) -> Tensor:
        if not hasattr(tensor, "ds_id"):  # a buffer
            return tensor.detach()
        with GatheredParameters([tensor]):
            return tensor.detach().to("cpu", copy=True) if self.processes.main else torch.empty(0, dtype=tensor.dtype)

    def read(self, parameter: nn.Parameter) -> Tensor:
        if parameter.dtype != torch.float32 and parameter.requires_grad:
            return cast(Tensor, safe_get_full_fp32_param(parameter))
        # A copy in float32 is the master's after every step and every `write`.
        with GatheredParameters([parameter]):
            return parameter.detach().to(torch.float32, copy=True)

    def own_part(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """What this rank keeps of a whole float32 tensor that is laid out as `parameter`, padded with zeros."""
        size = cast(Any, parameter).ds_tensor.numel()
        mine = value.flatten()[self.processes.rank * size : (self.processes.rank + 1) * size]
        return nn.functional.pad(mine.to(self.processes.device, torch.float32), (0, size - len(mine)))

    def write_master(self, parameter: nn.Parameter, value: Tensor) -> None:
        if parameter.requires_grad:
            safe_set_local_fp32_param(parameter, self.own_part(parameter, value))

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        names = moment_names(self.optimizer)
        return {name: cast(Tensor, safe_get_full_optimizer_state(parameter, name)) for name in names}

    def write_moments(self, parameter: nn.Parameter, moments: Mapping[str, Tensor]) -> None:
        for name, value in moments.items():
            safe_set_local_optimizer_state(parameter, self.own_part(parameter, value), name)

    def bit_sums(self, weights: Sequence[nn.Parameter]) -> list[int]:
        sums = torch.stack([bit_sum(self.own(weight).flat) for weight in weights])
        return self.processes.sum(sums.to(self.processes.device)).tolist()

    def own(self, parameter: nn.Parameter) -> Slice:
        """The elements of a parameter that this rank keeps, without the padding."""
        partitioned = cast(Any, parameter)
        shard: Tensor = partitioned.ds_tensor.data
        start = min(self.processes.rank * shard.numel(), partitioned.ds_numel)
        return Slice(shard[: partitioned.ds_numel - start], start)

    def differing_replicas(self, weights: Sequence[nn.Parameter]) -> list[int]:
        return []  # every element has one owner


class GatherBackend(Zero3Backend):
    """Rank 0 edits gathered weights, which are then cut up again; the other ranks edit empty slices.

    As many are gathered at once as are no larger together than the largest, or than `FEW`: small ones cost their
    collectives, and of large ones there is memory for two, since the next is under way while one is edited.
    """

    def edit(self, weights: Sequence[nn.Parameter]) -> Iterator[list[Slice]]:
        self.settle(weights)
        turns = list(groups(weights, [cast(Any, weight).ds_numel for weight in weights]))
        on_its_way = gathering(turns[0])
        for group, following in zip_longest(turns, turns[1:]):
            on_its_way.wait()
            if following is not None:
                on_its_way = gathering(following)
            with GatheredParameters(list(group), modifier_rank=0):  # they are whole; here they are cut up again
                flats = [weight.detach().view(-1) for weight in group]
                yield [Slice(flat if self.processes.main else flat[:0], 0) for flat in flats]
        self.publish(weights)

    def write(self, parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
        with GatheredParameters(list(parameters), modifier_rank=0):
            torch._foreach_copy_([parameter.detach() for parameter in parameters], list(values))  # pyright: ignore[reportPrivateImportUsage]
        for parameter, value in zip(parameters, values, strict=True):
            self.write_master(parameter, value)
        self.publish(parameters)

    def holds(self, parameter: nn.Parameter, value: Tensor) -> bool:
        with GatheredParameters([parameter]):
            computes = torch.equal(parameter.detach(), value.to(parameter.device, parameter.dtype))
        if not parameter.requires_grad:
            return computes
        master = cast(Tensor, safe_get_full_fp32_param(parameter))
        return computes and torch.equal(master, value.to(master.device))


def gathering(weights: Sequence[nn.Parameter]) -> Any:
    """Begin to make weights whole, as DeepSpeed does ahead of a layer; done after `wait()`."""
    return cast(Any, weights[0]).all_gather_coalesced(weights)


def groups(weights: Sequence[nn.Parameter], sizes: Sequence[int]) -> Iterator[Sequence[nn.Parameter]]:
    """The weights in order, as many together as fit into the largest of them, or into `FEW` elements."""
    room, first, together = max(FEW, *sizes), 0, 0
    for position, size in enumerate(sizes):
        if together + size > room:
            yield weights[first:position]
            first, together = position, 0
        together += size
    yield weights[first:]


class LocalBackend(Zero3Backend):
    """Each rank edits its own slices: rank i of a weight holds [i·n, (i+1)·n), padded at the end."""

    def edit(self, weights: Sequence[nn.Parameter]) -> Iterator[list[Slice]]:
        self.settle(weights)
        yield [self.own(weight) for weight in weights]
        self.publish(weights)

    def write(self, parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
        self.settle(parameters)
        for parameter, value in zip(parameters, values, strict=True):
            part = self.own(parameter)
            part.flat.copy_(value.flatten()[part.start : part.start + part.flat.numel()])
            self.write_master(parameter, value)
        self.publish(parameters)

    def holds(self, parameter: nn.Parameter, value: Tensor) -> bool:
        part = self.own(parameter)
        mine = value.flatten()[part.start : part.start + part.flat.numel()].to(part.flat.device)
        right = torch.equal(part.flat, mine.to(part.flat.dtype))
        if parameter.requires_grad:
            master = cast(Tensor, safe_get_local_fp32_param(parameter))[: part.flat.numel()]
            right &= torch.equal(master.to(mine.device), mine)
        if cast(Any, parameter).ds_status == ZeroParamStatus.AVAILABLE:  # kept whole
            right &= torch.equal(parameter.detach(), value.to(parameter.device, parameter.dtype))
        return right


def marks(like: Tensor, start: int) -> Tensor:
    """The positions from `start` on, modulo 251: exact in bfloat16, and prime to all usual sizes."""
    cycle = torch.arange(251, dtype=like.dtype, device=like.device)
    return cycle.repeat(len(like) // 251 + 2)[start % 251 :][: len(like)]


def local_edits_work(backend: LocalBackend, weights: Sequence[nn.Parameter]) -> bool:
    """Whether own slices lie where `LocalBackend` believes: written, gathered, compared, restored.

    One weight of each shape is tried. Collective; all ranks get the same answer.
    """
    right = True
    for weight in {cast(Any, weight).ds_shape: weight for weight in weights}.values():
        kept = []
        for (part,) in backend.edit([weight]):
            kept.append(part.flat.clone())
            part.flat.copy_(marks(part.flat, part.start))
        whole = backend.full(weight).flatten()  # on the main process
        right &= torch.equal(whole, marks(whole, 0))
        for (part,) in backend.edit([weight]):
            part.flat.copy_(kept.pop())
    return not backend.processes.problems(None if right else "slices lie elsewhere")
