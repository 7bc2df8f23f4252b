"""A boundary on a CPU in one pass over all slices: `boundary.c`, built by the machine's C compiler and kept.

Where there is no compiler, or it does not understand, there is no library, and `merge.py` computes the same bits
with torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from lorasc_ds.algorithm.merge import Edit

SOURCE = Path(__file__).with_name("boundary.c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")
CHUNK = 1 << 15  # as in boundary.c: the unit of work and of the sums of squares, so that threads change no bit
SLICE = np.dtype(
    [
        *((name, "u8") for name in ("accumulator", "storage", "A", "B")),
        ("scaling", "f8"),
        *((name, "i8") for name in ("start", "length", "rank", "in_features")),
        *((name, "u4") for name in ("seed_low", "seed_high", "weight", "purpose")),
        ("noise_scale", "f4"),
        ("bfloat16", "i4"),
        ("keeps", "i4"),
        ("padding", "i4"),
    ]
)


def pays(elements: int, slices: int) -> bool:
    """Whether torch would take more than about 6 ms: 25 ns an element with noise, and 0.2 ms a slice."""
    return elements + 8192 * slices >= 1 << 18


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled pass, built on this kind of machine when it is first needed (0.5 s); None where it cannot be."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(built(compiler)))
    except (OSError, subprocess.CalledProcessError):
        return None


def built(compiler: str) -> Path:
    """The library's file, kept in the user's cache by what it is made of and for.

    Raises:
        OSError, subprocess.CalledProcessError: it cannot be written or built.
    """
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorasc_ds"
    kept.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = hashlib.sha256("\0".join([SOURCE.read_text(), compiler, *FLAGS, processor()]).encode()).hexdigest()
    path = kept / f"boundary-{key[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=kept) as folder:
            new = Path(folder) / path.name
            subprocess.run([compiler, *FLAGS, "-o", str(new), str(SOURCE)], check=True, capture_output=True)
            new.replace(path)  # processes that build at once all put the same file there
    return path


def processor() -> str:
    """What `-march=native` depends on: nodes of different kinds may share a home directory."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = re.search(r"^(flags|Features).*$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return f"{platform.machine()} {platform.processor()} {flags.group() if flags else ''}"


def edit_(library: ctypes.CDLL, edits: Sequence[Edit], virtual: bool) -> Tensor:
    """`merge.edit_` of slices on the CPU that are not empty, shared among torch's number of threads."""
    factors = factors_of(edits)
    table = np.array(rows(edits, virtual, factors.data_ptr()), dtype=SLICE)
    chunks = int((-(-table["length"] // CHUNK)).sum())
    squares = np.empty((chunks, 2))
    threads = min(torch.get_num_threads(), max(1, int(table["length"].sum()) >> 19))
    edges = [chunks * number // threads for number in range(threads + 1)]

    def edit(thread: int) -> None:
        first, last = (ctypes.c_int64(edge) for edge in edges[thread : thread + 2])
        library.edit(ctypes.c_void_p(table.ctypes.data), first, last, ctypes.c_void_p(squares.ctypes.data))

    if threads == 1:
        edit(0)
    else:
        with ThreadPoolExecutor(threads) as pool:  # a call of C leaves the interpreter to the others
            list(pool.map(edit, range(threads)))
    return torch.from_numpy(squares.sum(axis=0))


def factors_of(edits: Sequence[Edit]) -> Tensor:
    """`A` and `B` of all experts end to end, in float64."""
    factors = [factor.view(-1) for one in edits if one.pair is not None for factor in one.pair]
    return torch.cat(factors).detach().double() if factors else torch.empty(0, dtype=torch.float64)


def rows(edits: Sequence[Edit], virtual: bool, factors: int) -> list[tuple[float, ...]]:
    """The table of `Slice` in boundary.c; `factors`: address of `factors_of`."""
    table = []
    for one in edits:
        same = one.storage.data_ptr() == one.accumulator.data_ptr()
        A = B = rank = width = seed = weight = purpose = 0
        if one.pair is not None:
            rank, width = one.pair.A.shape
            A, B = factors, factors + 8 * rank * width
            factors = B + 8 * one.pair.B.numel()
        if one.stream is not None:
            seed, weight, purpose = one.stream.seed, one.stream.weight, 2 * one.stream.expert + one.stream.purpose
        table.append(
            (
                one.accumulator.data_ptr(),
                0 if same and not virtual else one.storage.data_ptr(),
                A,
                B,
                one.scaling,
                one.start,
                one.accumulator.numel(),
                rank,
                width,
                seed & 0xFFFFFFFF,
                seed >> 32,
                weight,
                purpose,
                one.noise_scale,
                one.storage.dtype == torch.bfloat16,
                virtual,
                0,
            )
        )
    return table
