"""Attention over sequences that stand one after the other in a single row, each by itself: nothing is padded."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

SEQUENCES = "lorasc_sequences"  # what `set_attn_implementation` calls it


class Sequences(NamedTuple):
    """What stands in the row.

    Args:
        lengths: of the sequences, in tokens.
        bounds: int32 of (sequences + 1,): where each begins, and the end of the last. On the device of the row, so that
            no layer has to wait for it.
        longest: of the lengths; a compiled layer reads no more of them.
    """

    lengths: tuple[int, ...]
    bounds: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: tuple[int, ...]) -> Sequences:
        return cls(lengths, torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths))


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sequences: Sequences | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers' `AttentionInterface` has them; without `sequences` it is that of SDPA.

    Args:
        query, key, value: (1, heads, tokens, size of a head).

    Returns:
        (1, tokens, heads, size of a head).
    """
    if sequences is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if takes_one_launch(query, dropout):
        return in_one_launch(query, key, value, sequences, scaling), None
    return one_by_one(module, query, key, value, sequences, dropout, scaling), None


def takes_one_launch(query: Tensor, dropout: float) -> bool:
    """Whether torch's flash attention has a kernel for this."""
    return query.is_cuda and query.dtype != torch.float32 and not dropout


@torch.compiler.disable()  # else the lengths of every batch would be compiled into the layer
def one_by_one(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """SDPA over a sequence after the other; see `attend`."""
    parts = zip(*(one.split(sequences.lengths, dim=2) for one in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, q, k, v, None, dropout, scaling, is_causal=True)[0] for q, k, v in parts]
    return torch.cat(outputs, dim=1)


def in_one_launch(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scaling: float | None) -> Tensor:
    """Torch's flash attention over sequences of any lengths; see `attend`."""
    q, k, v = (one[0].transpose(0, 1) for one in (query, key, value))
    output = varlen_attn(
        q,
        k,
        v,
        sequences.bounds,
        sequences.bounds,
        sequences.longest,
        sequences.longest,
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(output, Tensor)
    return output[None]


AttentionInterface.register(SEQUENCES, attend)
AttentionMaskInterface.register(SEQUENCES, sdpa_mask)
