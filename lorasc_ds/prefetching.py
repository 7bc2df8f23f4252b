"""Batches ahead of their use: made by worker processes, in order; and on their way to the device."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lorasc_ds.errors import RunError

T = TypeVar("T")
AHEAD = 2  # batches of every worker
TO_THE_RUN = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
)  # launchers send them to all


def on_its_way(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, for which the host does not wait: a GPU fetches it out of pinned memory."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Made(Dataset[T | RunError], Generic[T]):
    """What `make` makes of a number; an error that a user can mend is handed over, for a traceback is no line."""

    def __init__(self, make: Callable[[int], T]) -> None:
        self.make = make

    def __getitem__(self, number: int) -> T | RunError:
        try:
            return self.make(number)
        except RunError as error:
            return error


def prefetched(make: Callable[[int], T], numbers: Sequence[int], workers: int) -> Generator[T, None, None]:
    """What `make` makes of every number, in their order.

    Args:
        workers: processes, forked from this one; 0: this process makes them when they are asked for.

    Raises:
        RunError: that `make` raised.
    """
    if not workers or len(numbers) < 2:
        yield from map(make, numbers)
        return
    loader = DataLoader(
        Made(make),
        batch_size=None,
        sampler=numbers,
        num_workers=min(workers, len(numbers)),
        prefetch_factor=AHEAD,
        multiprocessing_context="fork",  # they share what is in memory, and need no import
        collate_fn=as_it_is,
        worker_init_fn=outlive_signals,
    )
    for one in loader:
        if isinstance(one, RunError):
            raise one
        yield cast(T, one)


def as_it_is(one: T) -> T:
    return one


def outlive_signals(worker: int) -> None:
    """In a worker: a signal to all processes of a run is for those that train; only the own parent's ends a worker."""
    signal.pthread_sigmask(signal.SIG_BLOCK, TO_THE_RUN)
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def explaining_dead_workers(workers: int) -> Iterator[None]:
    """
    Raises:
        RunError: a worker died, which torch tells wherever this process is, or as the end of a connection.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        raise RunError(
            f"training.data_workers {workers}: one of the processes that decode images died"
            f" ({' '.join(f'{type(error).__name__}: {error}'.split())[:200]}): memory or /dev/shm may be too small;"
            " lower it (launch/evaluate.py: --data_workers), or give more"
        ) from error


class Ahead(Generic[T]):
    """What `make` makes of 0, 1, 2, ..., made ahead as long as one after the other is asked for.

    Args:
        end: there are no more than this.
    """

    def __init__(self, make: Callable[[int], T], end: int, workers: int) -> None:
        self.make = make
        self.end = end
        self.workers = workers
        self.next = -1
        self.made: Generator[T, None, None] | None = None

    def __call__(self, number: int) -> T:
        if not self.workers:
            return self.make(number)
        if self.made is None or number != self.next:
            self.made = prefetched(self.make, range(number, self.end), self.workers)
        self.next = number + 1
        return next(self.made)

    def close(self) -> None:
        """End the workers; those that are left to the collector of cycles keep it waiting for ten seconds."""
        if self.made is not None:
            self.made.close()
            self.made = None
