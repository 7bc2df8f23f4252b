"""The design's arithmetic and Algorithm 1 once more, in plain numpy and plain loops, without the package.

Slow on purpose: every formula stands here as it is written down, so that the package has something
independent to agree with, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

F32, F64 = np.float32, np.float64
Matrix = NDArray[np.float32]


def philox_word(element: int, weight: int, expert: int, purpose: int, seed: int) -> int:
    """Word `element mod 4` of Philox-4x32-10 in Python integers."""
    mask = 0xFFFFFFFF
    block = element // 4
    c = [block & mask, (block >> 32) & mask, weight, 2 * expert + purpose]
    k = [seed & mask, (seed >> 32) & mask]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & mask, (p0 >> 32) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c[element % 4]


def uniforms(count: int, weight: int, expert: int, purpose: int, seed: int) -> NDArray[np.float64]:
    return np.array([(philox_word(e, weight, expert, purpose, seed) >> 8) * 2.0**-24 for e in range(count)])


def fresh_A(rank: int, in_features: int, weight: int, expert: int, seed: int) -> Matrix:
    u = uniforms(rank * in_features, weight, expert, 1, seed)
    return ((2 * u - 1) * F64(F32(1 / math.sqrt(in_features)))).astype(F32).reshape(rank, in_features)


def noise(shape: tuple[int, int], c: float, weight: int, expert: int, seed: int) -> Matrix:
    u = uniforms(shape[0] * shape[1], weight, expert, 0, seed)
    return ((u - 0.5) * F64(c)).astype(F32).reshape(shape)


def delta(A: Matrix, B: Matrix, s: float) -> Matrix:
    """float32(s·Σ_k B[i,k]·A[k,j]), the sum in float64 from +0.0 with k ascending."""
    total = np.zeros((B.shape[0], A.shape[1]), dtype=F64)
    for k in range(A.shape[0]):
        total = total + B[:, k : k + 1].astype(F64) * A[k].astype(F64)
    return (F64(s) * total).astype(F32)


def add(accumulator: Matrix, change: Matrix) -> Matrix:
    return (accumulator.astype(F64) + change.astype(F64)).astype(F32)


def noise_scale(A: Matrix, B: Matrix, s: float, intensity: float) -> float:
    """float32(λ·sqrt(E[x²] - mean²)) by the Gram formula, for a float32 pair."""
    A, B = A.astype(F64), B.astype(F64)
    count = B.shape[0] * A.shape[1]
    square = s * s * ((B.T @ B) * (A @ A.T)).sum() / count
    mean = s * (B.sum(0) @ A.sum(1)) / count
    return float(F32(intensity * math.sqrt(max(0.0, square - mean * mean))))


def average(slow: Matrix, fast: Matrix, retention: float) -> Matrix:
    a = F32(retention)
    b = F32(1 - F64(a))
    return (F64(a) * slow.astype(F64) + F64(b) * fast.astype(F64)).astype(F32)


class PlainLoRA(nn.Module):
    """W·x + s·B·A·dropout(x), written out."""

    def __init__(self, base: nn.Linear, rank: int, s: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.zeros(rank, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.s = s
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        high = self.base(x)  # before the branch: gradients meet at x in this order
        low = nn.functional.linear(nn.functional.linear(self.dropout(x), self.A), self.B)
        return high + low * self.s


def algorithm_1(
    model: nn.Module,
    batch_of_step: Callable[[int], list[tuple[torch.Tensor, torch.Tensor, int]]],
    *,
    steps: int,
    experts: int,
    rank: int,
    s: float,
    dropout: float,
    slow_retention: float,
    noise_intensity: float,
    learning_rate: float,
    max_grad_norm: float,
    seed: int,
) -> list[dict[str, Matrix]]:
    """A float32 cascade on the q and v projections, in plain loops; W by name after every boundary.

    `batch_of_step` gives the micro batches of a step: (input ids, target of the last position, dropout seed).
    """
    layers: dict[str, PlainLoRA] = {}
    for path, module in list(model.named_modules()):
        if path.endswith(("q_proj", "v_proj")):
            parent = model.get_submodule(path.rsplit(".", 1)[0])
            layers[f"{path}.weight"] = PlainLoRA(module, rank, s, dropout)
            setattr(parent, path.rsplit(".", 1)[1], layers[f"{path}.weight"])
    model.requires_grad_(False)
    names = sorted(layers)
    pairs = [parameter for name in names for parameter in (layers[name].A, layers[name].B)]
    for parameter in pairs:
        parameter.requires_grad_(True)
    weights = {name: layers[name].base.weight for name in names}
    slow: dict[str, tuple[Matrix, Matrix]] = {}
    history = []
    for t in range(1, experts + 1):
        for position, name in enumerate(names):
            layer, weight = layers[name], weights[name]
            if t > 1 and noise_intensity > 0:
                c = noise_scale(*slow[name], s, noise_intensity)
                noisy = add(weight.detach().numpy(), noise(tuple(weight.shape), c, position, t, seed))
                weight.data.copy_(torch.from_numpy(noisy))
            A = fresh_A(rank, weight.shape[1], position, t, seed)
            layer.A.data.copy_(torch.from_numpy(A))
            layer.B.data.zero_()
            if t == 1:
                slow[name] = (A, np.zeros((weight.shape[0], rank), dtype=F32))
        optimizer = torch.optim.AdamW(pairs, lr=learning_rate, weight_decay=0.0)  # a new one for every expert
        first, last = (t - 1) * steps // experts, t * steps // experts
        for step in range(first, last):
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - (step - first) / (last - first))
            model.train()
            micro_batches = batch_of_step(step)
            examples = sum(len(targets) for _, targets, _ in micro_batches)
            for ids, targets, dropout_seed in micro_batches:
                torch.manual_seed(dropout_seed)
                log_p = model(input_ids=ids, use_cache=False).logits[:, -1].float().log_softmax(-1)
                (-log_p.gather(1, targets[:, None])[:, 0].sum() / examples).backward()
            nn.utils.clip_grad_norm_(pairs, max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        for name in names:
            layer, weight = layers[name], weights[name]
            slow[name] = tuple(
                average(old, new.detach().numpy(), slow_retention)
                for old, new in zip(slow[name], (layer.A, layer.B), strict=True)
            )
            merged = add(weight.detach().numpy(), delta(*slow[name], s))
            weight.data.copy_(torch.from_numpy(merged))
            layer.B.data.zero_()
        history.append({name: weight.detach().numpy().copy() for name, weight in weights.items()})
    return history
