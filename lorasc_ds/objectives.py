"""Log-probabilities of the scored tokens, and the two losses made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorasc_ds.adapters import base_model
from lorasc_ds.data import Batch
from lorasc_ds.image_data import ImageBatch


def attention_bias(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the attention scores, 0 where a token is seen: `dtype` of (rows, 1, length, length).

    Args:
        segments: as in `Batch`.
    """
    _, tree, branch = segments
    seen = tree[:, :, None] == tree[:, None, :]
    seen &= (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    seen &= torch.ones(seen.shape[1:], dtype=torch.bool, device=seen.device).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


@contextmanager
def head_reading(head: nn.Module | None, select: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the head is given what `select` makes of the hidden states; None: there is no head to be found."""
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, arguments: (select(arguments[0])[None], *arguments[1:]))
    try:
        yield
    finally:
        hook.remove()


def place_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits of every place of the batch: float32 of (places, vocabulary).

    The head computes no others. What the model does to logits afterwards, scaling or capping, it does to these.
    """
    if batch.segments is None:
        rows: dict[str, Any] = {"attention_mask": batch.attention_mask}
    elif batch.sequences is not None:  # a bias of nothing, so that transformers makes no mask
        nothing = torch.zeros(1, 1, 1, 1, device=batch.input_ids.device)
        rows = {"attention_mask": nothing, "position_ids": batch.segments[0], "sequences": batch.sequences}
    else:  # the first parameter is the embedding's, in the dtype that attention computes in
        bias = attention_bias(batch.segments, next(model.parameters()).dtype)
        rows = {"attention_mask": bias, "position_ids": batch.segments[0]}

    def select(states: Tensor) -> Tensor:
        return states.flatten(0, 1).index_select(0, batch.places)

    head = base_model(model).get_output_embeddings()
    with head_reading(head, select):
        logits = model(input_ids=batch.input_ids, use_cache=False, **rows, **batch.images).logits
    return (select(logits) if head is None else logits[0]).float()


def scored_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits that predict each scored token: float32 of (tokens, vocabulary)."""
    return place_logits(model, batch)[batch.token_place]


def token_log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """log p of each scored token given what stands before it: float32 of (tokens,)."""
    return place_logits(model, batch).log_softmax(dim=-1)[batch.token_place, batch.token_target]


def mean_log_probabilities(log_probabilities: Tensor, batch: Batch) -> list[Tensor]:
    """Per example, the mean log-probability of each candidate's answer: a list of (candidates,)."""
    count = sum(batch.candidates)
    zeros = log_probabilities.new_zeros(count)
    totals = zeros.index_add(0, batch.token_sequence, log_probabilities)
    lengths = zeros.index_add(0, batch.token_sequence, torch.ones_like(log_probabilities))
    return list((totals / lengths).split(batch.candidates))


def classification_losses(log_probabilities: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of each example over its candidates, their mean log-probabilities as logits: (examples,)."""
    scores = mean_log_probabilities(log_probabilities, batch)
    return torch.stack([-s.log_softmax(dim=0)[gold] for s, gold in zip(scores, batch.gold, strict=True)])


def class_losses(logits: Tensor, batch: ImageBatch) -> Tensor:
    """Cross-entropy of every image, 0 of one that could not be decoded: (images,)."""
    losses = functional.cross_entropy(logits, batch.labels, reduction="none")
    return losses.masked_fill(~batch.readable, 0.0)


def probe_logits(model: nn.Module, batch: Batch | ImageBatch) -> Tensor:
    """What a boundary must not change: the logits of a few scored tokens, or of the classes of a few images."""
    return model(batch.pixels) if isinstance(batch, ImageBatch) else scored_logits(model, batch)


def summed_loss(model: nn.Module, batch: Batch | ImageBatch, loss: str) -> Tensor:
    """The loss of a batch as a sum, over its scored tokens (`lm`) or its examples (`classification`)."""
    if isinstance(batch, ImageBatch):
        return class_losses(model(batch.pixels), batch).sum()
    log_probabilities = token_log_probabilities(model, batch)
    if loss == "lm":
        return -log_probabilities.sum()
    return classification_losses(log_probabilities, batch).sum()
