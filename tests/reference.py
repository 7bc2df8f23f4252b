"""The design's arithmetic and Algorithm 1 once more, in plain numpy and plain loops, without the package.

Slow on purpose: every formula stands here as it is written down, so that the package has something
independent to agree with, bit for bit. Every adapter and every strategy is the one loop at the end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

F32, F64 = np.float32, np.float64
Matrix = NDArray[np.float32]  # also a vector: DoRA's magnitude


def philox_block(block: int, weight: int, expert: int, purpose: int, seed: int) -> list[int]:
    """The four words of Philox-4x32-10 for the elements 4·block to 4·block + 3, in Python integers."""
    mask = 0xFFFFFFFF
    c = [block & mask, (block >> 32) & mask, weight, 2 * expert + purpose]
    k = [seed & mask, (seed >> 32) & mask]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & mask, (p0 >> 32) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


def philox_word(element: int, weight: int, expert: int, purpose: int, seed: int) -> int:
    return philox_block(element // 4, weight, expert, purpose, seed)[element % 4]


@functools.cache  # the tests ask for the same ones again and again
def uniforms(count: int, weight: int, expert: int, purpose: int, seed: int) -> NDArray[np.float64]:
    words = [w for block in range((count + 3) // 4) for w in philox_block(block, weight, expert, purpose, seed)]
    return np.array([(word >> 8) * 2.0**-24 for word in words[:count]])


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


def spread(weight: Matrix, intensity: float) -> float:
    """NoisyTune's float32(λ·std(W0)), over all entries; sums in float64, by row, rows ascending."""
    total = square = 0.0
    for row in weight.astype(F64):
        total, square = total + row.sum(), square + (row * row).sum()
    mean = total / weight.size
    return float(F32(intensity * math.sqrt(max(0.0, square / weight.size - mean * mean))))


def row_norms(weight: Matrix) -> NDArray[np.float64]:
    """‖W‖ of every row in float64, columns ascending."""
    square = np.zeros(weight.shape[0], dtype=F64)
    for column in weight.T.astype(F64):
        square = square + column * column
    return np.sqrt(square)


def shipped(weight: Matrix, magnitude: Matrix) -> Matrix:
    """DoRA's m·W/‖W‖ in float64, rounded once."""
    return (magnitude.astype(F64)[:, None] * weight.astype(F64) / row_norms(weight)[:, None]).astype(F32)


def projection(A: Matrix, s: float) -> Matrix:
    """LoRA-FA's (A·Aᵀ + 1e-8·I)⁻¹/s², which makes of the gradient of B the one closest to that of W."""
    gram = A.astype(F64) @ A.astype(F64).T + 1e-8 * np.eye(A.shape[0])
    return (np.linalg.inv(gram) / (s * s)).astype(F32)


def prune_(moments: dict[str, torch.Tensor], method: str, fraction: float, weight: int, expert: int, seed: int) -> None:
    """ReLoRA: elements with the smallest first moments, or smallest random numbers, lose both; or all elements do."""
    first, second = (moments[key].detach().view(-1).numpy() for key in ("exp_avg", "exp_avg_sq"))
    keys = {
        "full": lambda: np.zeros(first.size),
        "magnitude": lambda: np.abs(first),
        "random": lambda: uniforms(first.size, weight, expert, 0, seed),
    }[method]()
    count = first.size if method == "full" else round(fraction * first.size)
    chosen = np.argsort(keys, kind="stable")[:count]  # stable: ties by lower index
    first[chosen] = second[chosen] = 0


def learning_rate_factor(strategy: str, step: int, first: int, last: int, steps: int, rewarmup: int | None) -> float:
    """Of `step` of the run's `steps`, in the expert that trains on the steps [first, last)."""

    def cosine(at: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * at / steps))

    if strategy == "relora":  # jagged: over the whole run, and every expert but the first climbs back to it
        w = math.ceil((last - first) / 10) if rewarmup is None else rewarmup
        w = min(w, last - first - 1)  # a short last expert
        return (step - first + 1) / w * cosine(first + w) if first > 0 and step < first + w else cosine(step)
    if strategy == "cola":
        return 1 - step / steps
    return 1 - (step - first) / (last - first)


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
        low = nn.functional.linear(self.dropout(x), self.A)
        flat = torch.addmm(high.flatten(0, 1), low.flatten(0, 1), self.B.T, alpha=self.s)  # one rounding, not three
        return flat.view_as(high)


class PlainDoRA(PlainLoRA):
    """W·x + bias + (m/n - 1)·W·x' + (m/n)·s·B·A·x' with x' = dropout(x), as PEFT's layer computes it.

    n = ‖W + s·B·A‖ by row, a constant to autograd; m begins as ‖W‖. Without dropout this is
    (m/n)·(W + s·B·A)·x + bias. With it, only the first W·x sees the whole x: the magnitude's part is dropped too.
    """

    def __init__(self, base: nn.Linear, rank: int, s: float, dropout: float) -> None:
        super().__init__(base, rank, s, dropout)
        self.m = nn.Parameter(torch.from_numpy(row_norms(base.weight.detach().numpy()).astype(F32)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        W, linear = self.base.weight, nn.functional.linear
        high, x = self.base(x), self.dropout(x)
        n = (W + self.s * (self.B @ self.A)).norm(dim=1).detach()
        low = linear(linear(x, self.A), self.B)
        return high + (self.m / n - 1) * linear(x, W) + self.m / n * low * self.s


class Closed(NamedTuple):
    """What a boundary leaves, by name. `slow` is the pair that was merged; `shipped` is `weights` but for DoRA."""

    weights: dict[str, Matrix]
    slow: dict[str, tuple[Matrix, Matrix]]
    magnitudes: dict[str, Matrix]
    shipped: dict[str, Matrix]


def algorithm_1(
    model: nn.Module,
    batch_of_step: Callable[[int], list[tuple[torch.Tensor, torch.Tensor, int]]],
    *,
    strategy: str = "lorasc",
    adapter: str = "lora",
    steps: int,
    experts: int = 1,
    restart_interval: int | None = None,
    rank: int,
    s: float,
    dropout: float = 0.0,
    slow_retention: float = 0.0,
    noise_intensity: float = 0.0,
    noise_on: str = "adapted",
    prune_method: str = "magnitude",
    prune_fraction: float = 0.0,
    rewarmup_steps: int | None = None,
    loraplus_lr_ratio: float = 16.0,
    lorafa_projection: bool = True,
    learning_rate: float,
    max_grad_norm: float | None,
    seed: int,
) -> list[Closed]:
    """A float32 run with adapters on the q and v projections, in plain loops; what every boundary leaves.

    `batch_of_step` gives the micro batches of a step: (input ids, target of the last position, dropout seed).
    `model` is trained in place. A strategy uses only its own settings, as the table of methods has it.
    """
    others = {name: p for name, p in sorted(model.named_parameters()) if p.ndim == 2}  # tied ones come once
    layers: dict[str, PlainLoRA] = {}
    for path, module in list(model.named_modules()):
        if path.endswith(("q_proj", "v_proj")):
            parent = model.get_submodule(path.rsplit(".", 1)[0])
            kind = PlainDoRA if adapter == "dora" else PlainLoRA
            layers[f"{path}.weight"] = kind(module, rank, s, dropout)
            setattr(parent, path.rsplit(".", 1)[1], layers[f"{path}.weight"])
    model.requires_grad_(False)
    names = sorted(layers)
    weights = {name: others.pop(name) for name in names}
    fixed_A = adapter == "lora-fa"
    magnitudes = {name: layers[name].m for name in names if adapter == "dora"}
    pairs = [p for name in names for p in ([layers[name].B] if fixed_A else [layers[name].A, layers[name].B])]
    ratio = {layers[name].B: loraplus_lr_ratio if adapter == "lora+" else 1.0 for name in names}
    pairs.sort(key=lambda p: ratio.get(p, 1.0))  # LoRA+: the As, then the Bs. Clipping adds up norms in this order
    trained = [*pairs, *magnitudes.values()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW([{"params": [p], "ratio": ratio.get(p, 1.0)} for p in trained], weight_decay=0.0)
    retention = slow_retention if strategy in ("slow", "lorasc") else 0.0
    if restart_interval is None:
        closing = [t * steps // experts for t in range(1, experts + 1)]
    else:
        closing = [*range(restart_interval, steps, restart_interval), steps]

    def add_noise_(weight: nn.Parameter, c: float, index: int) -> None:
        if c > 0:
            noisy = add(weight.detach().numpy(), noise(tuple(weight.shape), c, index, t, seed))
            weight.data.copy_(torch.from_numpy(noisy))

    def restart_optimizer() -> None:
        """Of the pairs; a magnitude keeps its moments and its step count."""
        if strategy != "relora":
            for parameter in pairs:
                optimizer.state.pop(parameter, None)
            return
        for position, name in enumerate(names):
            for number, parameter in enumerate((layers[name].A, layers[name].B)):
                if parameter in optimizer.state:  # not the fixed A of LoRA-FA
                    stream = 2**31 + 2 * position + number
                    prune_(optimizer.state[parameter], prune_method, prune_fraction, stream, t, seed)

    slow: dict[str, tuple[Matrix, Matrix]] = {}
    history = []
    for t, (first, last) in enumerate(zip([0, *closing[:-1]], closing, strict=True), start=1):
        if strategy == "noisytune":  # one expert, so once, before training
            noised = [*(weights[name] for name in names), *(others.values() if noise_on == "all" else [])]
            for index, weight in enumerate(noised):
                add_noise_(weight, spread(weight.detach().numpy(), noise_intensity), index)
        for position, name in enumerate(names):
            layer, weight = layers[name], weights[name]
            if strategy == "lorasc" and t > 1:
                add_noise_(weight, noise_scale(*slow[name], s, noise_intensity), position)
            A = fresh_A(rank, weight.shape[1], position, t, seed)
            layer.A.data.copy_(torch.from_numpy(A))
            layer.B.data.zero_()
            if t == 1:
                slow[name] = (A, np.zeros((weight.shape[0], rank), dtype=F32))
        if t > 1:
            restart_optimizer()
        for step in range(first, last):
            rate = learning_rate * learning_rate_factor(strategy, step, first, last, steps, rewarmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["ratio"]
            model.train()
            micro_batches = batch_of_step(step)
            examples = sum(len(targets) for _, targets, _ in micro_batches)
            for ids, targets, dropout_seed in micro_batches:
                torch.manual_seed(dropout_seed)
                states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
                log_p = model.get_output_embeddings()(states).float().log_softmax(-1)
                (-log_p.gather(1, targets[:, None])[:, 0].sum() / examples).backward()
            if adapter == "lora-fa" and lorafa_projection:
                for layer in layers.values():  # of the whole step's gradient, once
                    P = projection(layer.A.detach().numpy(), s)
                    layer.B.grad = layer.B.grad @ torch.from_numpy(P)
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(trained, max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        for name in names:
            layer, weight = layers[name], weights[name]
            slow[name] = tuple(
                average(old, new.detach().numpy(), retention)
                for old, new in zip(slow[name], (layer.A, layer.B), strict=True)
            )
            merged = add(weight.detach().numpy(), delta(*slow[name], s))
            weight.data.copy_(torch.from_numpy(merged))
            layer.B.data.zero_()
        now = {name: weight.detach().numpy().copy() for name, weight in weights.items()}
        m = {name: magnitude.detach().numpy().copy() for name, magnitude in magnitudes.items()}
        ships = {name: shipped(now[name], m[name]) if m else now[name] for name in names}
        history.append(Closed(now, dict(slow), m, ships))
    return history
