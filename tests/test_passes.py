"""The implementations of a boundary's pass, each against plain loops, bit for bit.

Triton's kernels run here in its interpreter: `TRITON_INTERPRET=1 pytest tests/test_passes.py`, where triton is installed.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from test_experts import random_pair
from torch import Tensor

from lorasc_ds.algorithm import compiled, merge
from lorasc_ds.algorithm.experts import Pair
from lorasc_ds.algorithm.merge import Edit
from lorasc_ds.algorithm.noise import Purpose, Stream

Pass = Callable[[Sequence[Edit], bool], Tensor]
SEED = 2**63 + 17
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


@pytest.fixture(scope="module", params=["eager", "compiled", "triton"])
def edit_(request: pytest.FixtureRequest) -> Pass:
    if request.param == "eager":
        return merge.edit_eagerly_
    if request.param == "compiled":
        library = compiled.library()
        if library is None:
            pytest.skip("there is no C compiler")
        return lambda edits, virtual: compiled.edit_(library, edits, virtual)
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1 and triton")
    from lorasc_ds.algorithm import triton_kernels

    return triton_kernels.edit_


class Weight:
    """A weight with its sums, and what is to become of both; `scale`: of all its numbers, tiny ones are denormal."""

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, position: int, *, c: float, merges: bool, scale: float
    ) -> None:
        out, in_ = shape
        pair = random_pair(out, in_, 5, seed=position)
        self.pair = Pair(pair.A * scale, pair.B) if merges else None
        self.c, self.position = float(np.float32(c * scale)), position
        sums = torch.randn(out * in_, generator=torch.Generator().manual_seed(position)) * scale
        self.storage = sums.to(dtype)
        self.accumulator = self.storage if dtype == torch.float32 else sums
        expected, self.squares = sums.view(shape).numpy().copy(), np.zeros(2)
        if self.pair is not None:
            delta = reference.delta(self.pair.A.numpy(), self.pair.B.numpy(), 0.37)
            before = torch.from_numpy(expected).to(dtype).float().numpy()
            expected = reference.add(expected, delta)
            missed = delta - (torch.from_numpy(expected).to(dtype).float().numpy() - before)
            self.squares += [(part.astype(np.float64) ** 2).sum() for part in (delta, missed)]
        if c > 0:
            expected = reference.add(expected, reference.noise(shape, self.c, position, 3, SEED))
        self.expected = torch.from_numpy(expected).flatten()

    def edits(self, cuts: Sequence[int]) -> list[Edit]:
        stream = Stream(SEED, 3, self.position, Purpose.NOISE)
        edges = itertools.pairwise([0, *cuts, len(self.storage)])
        return [Edit(self.storage[a:b], self.accumulator[a:b], a, self.pair, 0.37, stream, self.c) for a, b in edges]

    def check(self, virtual: bool, before: Tensor) -> None:
        bits = BITS[self.storage.dtype]
        assert torch.equal(self.storage.view(bits), self.expected.to(self.storage.dtype).view(bits))
        if self.storage is not self.accumulator:
            assert torch.equal(
                self.accumulator.view(torch.int32), (before if virtual else self.expected).view(torch.int32)
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("merges", "c"), [(True, 0.1), (True, 0.0), (False, 0.1)])
@pytest.mark.parametrize("scale", [1.0, 1e-38])
@pytest.mark.parametrize("virtual", [False, True])
def test_a_pass_over_slices_of_several_weights_agrees_with_plain_loops(
    edit_: Pass, dtype: torch.dtype, merges: bool, c: float, scale: float, virtual: bool
) -> None:
    """Slices begin anywhere; rows are shorter, and longer, than a tile of any implementation; c = 0 beside others."""
    shapes = [(37, 53), (16, 16), (3, 1037), (2, 36)]
    weights = [Weight(shape, dtype, n, c=c, merges=merges, scale=scale) for n, shape in enumerate(shapes)]
    before = [one.accumulator.clone() for one in weights]
    cuts = [[], [1, 7, 201], [2, 1037, 1040, 3110], []]
    edits = [edit for one, of_one in zip(weights, cuts, strict=True) for edit in one.edits(of_one)]
    squares = edit_(edits, virtual)
    for one, old in zip(weights, before, strict=True):
        one.check(virtual, old)
    total = sum(one.squares for one in weights)
    assert squares.tolist() == pytest.approx(total.tolist(), rel=1e-9, abs=0)


def test_ties_round_to_even(edit_: Pass) -> None:
    """Halfway between two bfloat16 numbers, up and down, of both signs; and just beside."""
    patterns = [high << 16 | low for high in (0x3F80, 0x3F81, 0xBF80, 0xBF81, 1, 2) for low in (0x7FFF, 0x8000, 0x8001)]
    accumulator = torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)
    expected = accumulator.to(torch.bfloat16)
    storage, nothing = torch.zeros_like(expected), Pair(torch.zeros(1, 3), torch.zeros(6, 1))
    edit_([Edit(storage, accumulator, pair=nothing)], False)
    assert torch.equal(storage.view(torch.int16), expected.view(torch.int16))


def large_edits(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, list[Edit]]:
    storage = torch.randn(2048 * 1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    pair, stream = random_pair(2048, 1024, 3), Stream(7, 2, 0, Purpose.NOISE)
    halves = storage[:1_000_003], storage[1_000_003:]
    starts = 0, 1_000_003
    return storage, [
        Edit(s, s.float(), start, pair, 0.01, stream, 0.1) for s, start in zip(halves, starts, strict=True)
    ]


def test_threads_change_no_bit_of_a_compiled_pass() -> None:
    library = compiled.library()
    if library is None:
        pytest.skip("there is no C compiler")
    before, ends = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            storage, edits = large_edits()
            squares = compiled.edit_(library, edits, False)
            ends.append((storage, edits[0].accumulator, edits[1].accumulator, squares))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for end in ends[1:] for one, other in zip(ends[0], end, strict=True))


def test_what_is_large_is_compiled_where_there_is_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def recorded(name: str, *arguments: object) -> Tensor:
        seen.append(name)
        return torch.zeros(2, dtype=torch.float64)

    monkeypatch.setattr(merge.compiled, "edit_", lambda *arguments: recorded("compiled", *arguments))
    monkeypatch.setattr(merge, "edit_eagerly_", lambda *arguments: recorded("eager", *arguments))
    monkeypatch.setattr(compiled, "library", lambda: SimpleNamespace())
    edits = large_edits()[1]
    small = Edit(edits[0].storage[:4096], edits[0].accumulator[:4096], stream=edits[0].stream, noise_scale=0.1)
    merge.edit_(edits)
    merge.edit_([small] * 64)  # many small ones, too
    merge.edit_([small] * 8)
    monkeypatch.setattr(compiled, "library", lambda: None)
    merge.edit_(edits)
    merge.edit_([small._replace(noise_scale=0.0)])
    assert seen == ["compiled", "compiled", "eager", "eager"]


def test_the_library_is_built_once_for_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if compiled.library() is None:
        pytest.skip("there is no C compiler")
    build = compiled.library.__wrapped__
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build() is not None
    (kept,) = (tmp_path / "lorasc_ds").iterdir()
    built = kept.stat().st_mtime_ns
    assert build() is not None
    assert kept.stat().st_mtime_ns == built
    monkeypatch.setattr(compiled, "FLAGS", ("-no-such-flag",))
    assert build() is None  # eager torch then does it
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS[:-1],))
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert build() is None


def test_one_pass_is_a_close_and_then_an_open() -> None:
    storage, edits = large_edits()
    for one in edits:
        merge.edit_([one._replace(noise_scale=0.0)])
        merge.edit_([one._replace(pair=None)])
    at_once, both = large_edits()
    merge.edit_(both)
    assert torch.equal(storage, at_once)
    assert torch.equal(edits[1].accumulator, both[1].accumulator)


def test_a_pass_through_host_memory_has_the_same_bits() -> None:
    storage, edits = large_edits()
    staged, others = large_edits()
    squares = merge.edit_(edits)
    assert merge.edit_through_host_(others).tolist() == pytest.approx(squares.tolist(), rel=1e-12)
    assert torch.equal(storage, staged)
    assert torch.equal(edits[1].accumulator, others[1].accumulator)
