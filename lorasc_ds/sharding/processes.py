"""The processes of a run: who this one is, and the few numbers they exchange."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def bound_waiting(timeout: timedelta) -> None:
    """No collective of any group waits longer: engines form groups of their own, with torch's default."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


class Processes:
    """All methods are collective; with one process they do nothing.

    Args:
        device: where tensors must lie to be exchanged.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device

    @classmethod
    def of_this_run(cls, device: torch.device) -> Processes:
        """Those that a launcher started and that have met, or this one alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(0, 1, device)

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def any(self, mine: bool) -> bool:
        """Whether it is so in any process."""
        return bool(self.sum(torch.tensor(float(mine), device=self.device)))

    def broadcast(self, numbers: Sequence[float]) -> list[float]:
        """The main process's numbers, to the last bit."""
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.broadcast(values, src=0)
        return values.tolist()

    def share(self, value: Any) -> Any:
        """The main process's value, of any kind."""
        held = [value if self.main else None]
        if self.world_size > 1:
            dist.broadcast_object_list(held, src=0)
        return held[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, of any kind, by rank."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def differing(self, numbers: Tensor) -> list[int]:
        """The positions at which the processes hold different integers."""
        if self.world_size == 1:
            return []
        extremes = torch.stack([numbers, -numbers]).to(self.device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        return (extremes[0] != -extremes[1]).nonzero()[:, 0].tolist()

    def problems(self, problem: str | None) -> list[str]:
        """What is wrong on any process, with its rank; empty where all is well."""
        if self.world_size == 1:
            return [] if problem is None else [problem]
        if not self.any(problem is not None):
            return []  # the usual case costs one number
        gathered = enumerate(self.gather(problem))
        return [f"rank {rank}: {found}" for rank, found in gathered if found is not None]
