"""Boundaries at the shape of Llama-2-7B: G5 to G7. With `--quick` the same code runs on a small shape."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch
from torch import nn

from lorasc_ds.benchmark import peers
from lorasc_ds.benchmark.boundaries import turn_over
from lorasc_ds.benchmark.gpu_steps import packed_run, shape_of
from lorasc_ds.benchmark.ours import NOISE_SCALE, Boundary, Steps
from lorasc_ds.benchmark.results import Result, Spread, Target, duration, ratio
from lorasc_ds.benchmark.setting import Setting
from lorasc_ds.benchmark.timing import seconds_of


def kernels(setting: Setting) -> Iterator[Result]:
    """G5: the merge and the noise of all adapted weights, over a copy of them, and beside PEFT's merge with torch's
    noise."""
    shape = shape_of(setting)
    trainer = packed_run(setting, shape.lengths[0])
    with closing(trainer.batches):
        boundary, live = Boundary(trainer), trainer.live
        peer = peers.with_peft(peers.random_model(shape.llama, torch.bfloat16, setting.device))
        layers: list[Any] = [module for name, module in peer.named_modules() if name.endswith(peers.TARGETS)]

        def ours() -> None:
            live.merge(boundary.pairs)
            live.add_noise(2, boundary.scales)

        def in_one_pass() -> None:
            live.change(boundary.pairs, 2, boundary.scales)
            live.clear_B()

        def theirs() -> None:
            for layer in layers:
                layer.merge()
                layer.merged_adapters.clear()
                weight = layer.base_layer.weight.data
                weight += (torch.rand_like(weight) - 0.5) * NOISE_SCALE

        seconds = setting.in_turns({"ours": ours, "in one pass": in_one_pass, "PEFT merge and noise": theirs})
        copied = 10 * sum(one.shape[0] * one.shape[1] for one in trainer.weights)
    for name, passes, least in (("ours", 2, 7.0), ("in one pass", 1, 4.0)):
        spread = Spread.of([1e3 * one for one in seconds[name]])
        floor = passes * copied / setting.ceilings["copy_gigabytes_per_second"] / 1e6
        title = f"merge and noise of {len(trainer.weights)} weights, passes: {passes}"
        details = {"floor_milliseconds": floor}
        told = f"floor of the copies: {floor:.3g} ms"
        target = Target("<=", least)
        yield setting.judged(
            Result("G5", title, spread.median, "ms", spread.low, spread.high, target, "", told, details)
        )
    over = ("PEFT merge and noise", "ours")
    yield setting.judged(ratio("G5", "PEFT's merge and torch's noise / ours", seconds, over, Target(">=", 4.0)))


def whole(setting: Setting) -> Iterator[Result]:
    """G6 and G7, on compiled layers: averaging, std, merge, noise, new pairs, empty optimizer; then the next step."""
    from torch._dynamo.utils import counters

    shape = shape_of(setting)
    trainer = packed_run(setting, shape.lengths[-1], compiled=True)
    with closing(trainer.batches):
        boundary, cascade, step = Boundary(trainer), trainer.cascade, Steps(trainer)

        def ours() -> None:
            cascade.slow_after(trainer.live.pairs(), 0.6)
            cascade.stds_of_slow()
            boundary()

        step()
        turn_over(trainer)
        step()
        graphs = counters["stats"]["unique_graphs"]
        usual, first, turned = [], [], []
        for _ in range(setting.options.repetitions):
            usual += [seconds_of(step, setting.device) for _ in range(3)]
            turned.append(seconds_of(lambda: turn_over(trainer), setting.device))
            first.append(seconds_of(step, setting.device))
        made = counters["stats"]["unique_graphs"] - graphs
        base: nn.Module = peers.random_model(shape.llama, torch.bfloat16, setting.device)
        cycle = peers.Cycle(base, NOISE_SCALE)
        seconds = setting.in_turns({"ours": ours, "PEFT cycle": cycle})
    spread = Spread.of([1e3 * one for one in seconds["ours"]])
    told = f"with probes, read-back and ledger {duration(statistics.median(turned))}"
    title = "whole boundary: averaging, std, merge, noise, pairs, optimizer"
    yield setting.judged(Result("G6", title, spread.median, "ms", spread.low, spread.high, Target("<=", 12.0), told))
    yield setting.judged(ratio("G6", "PEFT cycle / ours", seconds, ("PEFT cycle", "ours"), Target(">=", 30.0)))
    yield Result("G6", "recompilations over the boundaries", made, "", target=Target("==", 0))
    after = Spread.of([one / statistics.median(usual) for one in first])
    title = "first step after a boundary / median step"
    yield setting.judged(Result("G7", title, after.median, "x", after.low, after.high, Target("<=", 1.05)))
