"""Safetensors files written one tensor at a time, so that a file may be larger than memory; and digests of tensors."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lorasc_ds.algorithm.files import replacing

# In safetensors' own order: the widest come first in a file, so that each begins at a multiple of its size.
DTYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64",
    torch.float32: "F32", torch.uint32: "U32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
ORDER = list(DTYPES)


def bytes_of(tensor: Tensor) -> memoryview:
    """The little-endian bytes of a tensor, row-major."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def digest(tensors: Iterable[Tensor]) -> str:
    """sha256 over the little-endian bytes of the tensors, one after the other, nothing between them."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(bytes_of(tensor))
    return total.hexdigest()


def write_tensors(
    path: Path,
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    produce: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, whole or not at all, holding one tensor at a time; the bytes are safetensors' own.

    Args:
        tensors: dtype and shape by name, known before any tensor is there.
        produce: gives the tensor of a name. Called once for each, the widest dtypes first, names as strings within
            one; a tensor is let go before the next is asked for.
        metadata: for the header; Hugging Face's loaders want {"format": "pt"}.

    Raises:
        ValueError: a tensor is not what `tensors` says, or its dtype has no name in the format; nothing is written.
        OSError: as in `files.replacing`.
    """
    unknown = {str(dtype) for dtype, _ in tensors.values()} - {str(dtype) for dtype in DTYPES}
    if unknown:
        raise ValueError(f"{path}: safetensors files cannot hold {', '.join(sorted(unknown))}")
    names = sorted(tensors, key=lambda name: (ORDER.index(tensors[name][0]), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        dtype, shape = tensors[name]
        stop = offset + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            # no name here for the tensor: it would live on while the next is produced
            write_tensor(file, name, tensors[name], produce(name))


def write_tensor(file: BinaryIO, name: str, expected: tuple[torch.dtype, Sequence[int]], tensor: Tensor) -> None:
    found = (tensor.dtype, tuple(tensor.shape))
    if found != (expected[0], tuple(expected[1])):
        raise ValueError(f"{name} is {found[0]} {found[1]}, but {expected[0]} {tuple(expected[1])} was announced")
    file.write(bytes_of(tensor))
