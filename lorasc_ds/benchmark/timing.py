"""Variants measured in turns, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

import torch


def wait_for(device: torch.device) -> None:
    """Until all that was given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Seconds(float):
    """What a variant returns that has measured itself, since not all that it does is to count."""


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    began = time.perf_counter()
    own = work()
    wait_for(device)
    return own if isinstance(own, Seconds) else time.perf_counter() - began


def order_of(names: list[str], turn: int) -> list[str]:
    """Every variant is the first in its turn."""
    first = turn % len(names)
    return names[first:] + names[:first]


def in_turns(
    variants: Mapping[str, Callable[[], object]], *, repetitions: int, warm_up: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every variant in every turn, after the turns that do not count. No garbage is collected inside.

    Args:
        variants: by name; each is called once a turn.
    """
    found: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(-warm_up, repetitions):
        for name in order_of(list(variants), turn):
            gc.collect()
            gc.disable()
            try:
                seconds = seconds_of(variants[name], device)
            finally:
                gc.enable()
            if turn >= 0:
                found[name].append(seconds)
    return found


def apart_in_turns(
    makers: Mapping[str, Callable[[], Callable[[], object]]], *, turns: int, calls: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every call that counts; as `in_turns`, of variants that do not fit beside each other.

    Args:
        makers: make the variants, by name. In every turn each is made, called twice, timed and dropped.
        calls: of a variant in a turn.
    """
    found: dict[str, list[float]] = {name: [] for name in makers}
    for turn in range(turns):
        for name in order_of(list(makers), turn):
            work = makers[name]()
            for _ in range(2):
                work()
            found[name] += [seconds_of(work, device) for _ in range(calls)]
            getattr(work, "close", lambda: None)()
            del work
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return found


def ceilings(device: torch.device, quick: bool) -> dict[str, float]:
    """What this machine can do in this run: TFLOP/s of a matrix product, GB/s read and written by a copy.

    The product is 4096 x 4096 x 11008 in bfloat16 on a GPU, 512 x 512 x 1376 in float32 on a CPU.
    """
    gpu = device.type == "cuda" and not quick
    m, k, n = (4096, 4096, 11008) if gpu else (512, 512, 1376)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    one, other = torch.randn(m, k, dtype=dtype, device=device), torch.randn(k, n, dtype=dtype, device=device)
    source = torch.empty(1 << (30 if gpu else 26), dtype=torch.uint8, device=device)
    sink = torch.empty_like(source)
    variants = {"matmul": lambda: torch.mm(one, other), "copy": lambda: sink.copy_(source)}
    best = {name: min(found) for name, found in in_turns(variants, repetitions=5, warm_up=2, device=device).items()}
    return {
        "matmul_tflops": 2 * m * k * n / best["matmul"] / 1e12,
        "copy_gigabytes_per_second": 2 * source.nbytes / best["copy"] / 1e9,
    }
