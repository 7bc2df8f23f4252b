"""Safetensors files written one tensor at a time."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from lorasc_ds.algorithm.tensor_files import DTYPES, write_tensors


def announced(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def a_tensor_of_each_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7,), (), (1, 3, 1), (0, 4)]
    tensors = {}
    for i, dtype in enumerate(DTYPES):
        for part in ("b", "a", "ä"):
            drawn = torch.randint(0, 2, shapes[(i + len(tensors)) % len(shapes)], generator=generator)
            tensors[f"{part}.{i}"] = drawn.to(torch.float32).to(dtype)
    return tensors


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_bytes_are_those_of_safetensors(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    tensors = a_tensor_of_each_dtype()
    write_tensors(tmp_path / "file.safetensors", announced(tensors), tensors.__getitem__, metadata)
    assert (tmp_path / "file.safetensors").read_bytes() == save(tensors, metadata)
    loaded = load_file(tmp_path / "file.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "file.safetensors", framework="pt") as file:
        assert file.metadata() == metadata


def test_strided_tensors_are_written_row_by_row(tmp_path: Path) -> None:
    tensors = {"t": torch.arange(6.0).view(2, 3).T, "s": torch.arange(8).bfloat16()[::2]}
    write_tensors(tmp_path / "file", announced(tensors), tensors.__getitem__)
    assert all(torch.equal(loaded, tensors[name]) for name, loaded in load_file(tmp_path / "file").items())


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    asked: list[str] = []

    def produce(name: str) -> torch.Tensor:
        assert all(before() is None for before in made), f"the tensor before {name} is still there"
        tensor = torch.full((4,), float(len(made)))
        made.append(weakref.ref(tensor))
        asked.append(name)
        return tensor

    write_tensors(tmp_path / "file", dict.fromkeys("cab", (torch.float32, (4,))), produce)
    assert asked == ["a", "b", "c"]
    assert load_file(tmp_path / "file")["b"].tolist() == [1.0] * 4


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.bfloat16)])
def test_another_tensor_than_announced_leaves_the_old_file(tmp_path: Path, wrong: torch.Tensor) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=r"b is .*, but torch.float32 \(3, 2\) was announced"):
        write_tensors(
            path,
            dict.fromkeys("ab", (torch.float32, (3, 2))),
            lambda name: wrong if name == "b" else torch.zeros(3, 2),
        )
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("file", b"old")]


def test_a_dtype_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot hold torch\.complex128"):
        write_tensors(tmp_path / "file", {"c": (torch.complex128, (1,))}, lambda name: torch.zeros(1))
    assert list(tmp_path.iterdir()) == []


def test_the_file_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_tensors(tmp_path / "file", {"a": (torch.float32, ())}, lambda name: torch.tensor(1.0))
    finally:
        os.umask(before)
    assert oct((tmp_path / "file").stat().st_mode & 0o777) == "0o644"
