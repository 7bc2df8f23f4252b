"""What is counted or compared, not timed against a peer's process: C4, C5 and C6."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from lorasc_ds.algorithm import experts, merge
from lorasc_ds.algorithm.experts import Pair
from lorasc_ds.algorithm.noise import Purpose, Stream
from lorasc_ds.benchmark import peers
from lorasc_ds.benchmark.boundaries import digits_run, llama_of
from lorasc_ds.benchmark.results import Result, Target, ratio
from lorasc_ds.benchmark.setting import Setting

FIDELITY = {0.003: (0.18, 0.99), 0.001: (0.47, 0.93)}  # std of D over std of W -> most error, least share kept


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def std_of_delta(pair: Pair, scaling: float) -> float:
    return experts.delta_statistics([pair], [scaling])[0].std


def noise_scale(setting: Setting) -> Iterator[Result]:
    """C4: std(D) from Gram matrices, and from the product itself."""
    side = 256 if setting.quick else 4096
    pair = Pair(drawn((8, side), 0), drawn((side, 8), 1))
    seconds = setting.in_turns(
        {"ours": lambda: std_of_delta(pair, 2.0), "product": lambda: float((2.0 * (pair.B @ pair.A)).std())}
    )
    exact = float((2.0 * (pair.B.double() @ pair.A.double())).std(correction=0))
    title = f"std of a {side} x {side} product of rank 8: by the product / ours"
    yield setting.judged(ratio("C4", title, seconds, ("product", "ours"), Target(">=", 400.0)))
    error = abs(std_of_delta(pair, 2.0) - exact) / exact
    yield Result("C4", "relative error of that std against float64", error, "", target=Target("<=", 1e-6))


def fidelity(setting: Setting) -> Iterator[Result]:
    """C5: of ten merges into bfloat16, how far W is from the exact sum, and how much of what was meant it moved."""
    side = 64 if setting.quick else 512
    architecture = llama_of(2, side)
    for share, (error, kept) in FIDELITY.items():
        trainer = digits_run(setting, architecture, dtype="bfloat16")
        with closing(trainer.batches):
            one = trainer.weights[0]
            base = one.weight.detach().double().cpu()
            model = peers.with_peft(peers.random_model(architecture, torch.bfloat16, setting.device))
            layer: Any = next(m for name, m in model.named_modules() if name.endswith("q_proj"))
            layer.base_layer.weight.data.copy_(base)
            meant = torch.zeros_like(base)
            for number in range(10):
                pair = Pair(drawn((one.rank, side), 2 * number), drawn((side, one.rank), 2 * number + 1))
                factor = share * float(base.std()) / std_of_delta(pair, one.scaling)
                pair = Pair(pair.A, factor * pair.B)
                zero = Pair(pair.A, torch.zeros_like(pair.B))
                pairs = {w.name: pair if w.name == one.name else zero for w in trainer.weights}
                trainer.live.merge({name: each.to(setting.device) for name, each in pairs.items()})
                merge_with_peft(layer, pair)
                meant += one.scaling * pair.B.double() @ pair.A.double()
            ours = one.weight.detach().double().cpu() - base
            theirs = layer.base_layer.weight.detach().double().cpu() - base
        for measure, measured, target in (
            ("relative error", relative_error, Target("<=", error)),
            ("share of the update that arrived", share_kept, Target(">=", kept)),
        ):
            title = f"{measure} after 10 merges of {100 * share:g} % into bfloat16"
            mine, other = measured(ours, meant), measured(theirs, meant)
            found = Result("C5", title, mine, "", target=target, ours=f"{mine:.3f}", peer=f"PEFT merge: {other:.3f}")
            yield setting.judged(found)


def merge_with_peft(layer: Any, pair: Pair) -> None:
    """PEFT's own merge of these pairs, for good."""
    layer.lora_A["default"].weight.data.copy_(pair.A)
    layer.lora_B["default"].weight.data.copy_(pair.B)
    layer.merge()
    layer.merged_adapters.clear()


def relative_error(moved: Tensor, meant: Tensor) -> float:
    """‖moved - meant‖ / ‖meant‖."""
    return float((moved - meant).norm() / meant.norm())


def share_kept(moved: Tensor, meant: Tensor) -> float:
    """The projection of what moved on what was meant, over the latter: 1 where nothing is lost on average."""
    return float((moved * meant).sum() / meant.square().sum())


def shards(setting: Setting) -> Iterator[Result]:
    """C6: noise and merge on one, two and three slices of a weight: how many results differ in a byte."""
    out, inputs = (37, 41) if setting.quick else (1021, 1019)
    digests = {count: merged_in_shards(out, inputs, count) for count in (1, 2, 3)}
    yield Result(
        "C6",
        f"different bytes of a {out} x {inputs} weight merged on 1, 2 and 3 shards",
        len(set(digests.values())) - 1,
        "",
        target=Target("==", 0),
        details={"sha256": digests},
    )


def merged_in_shards(out: int, inputs: int, count: int) -> str:
    """sha256 of a bfloat16 weight after noise and a merge on `count` slices, each on its own."""
    weight = drawn((out * inputs,), 0).bfloat16()
    pair = Pair(drawn((8, inputs), 1), drawn((out, 8), 2))
    size = -(-out * inputs // count)
    for start in range(0, out * inputs, size):
        part = weight[start : start + size]
        merge.edit_([merge.Edit(part, part.float(), start, pair, 2.0, Stream(7, 2, 0, Purpose.NOISE), 0.1)])
    return hashlib.sha256(weight.view(torch.uint8).numpy().tobytes()).hexdigest()
