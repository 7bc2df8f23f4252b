"""Boundaries in one process: C1, C3 and C12."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig

from lorasc_ds.benchmark import peers
from lorasc_ds.benchmark.memory import PeakBytes, live_bytes
from lorasc_ds.benchmark.ours import NOISE_SCALE, Boundary, Steps, compile_afresh, make_trainer, prepared, write_model
from lorasc_ds.benchmark.results import Result, Target, duration, ratio
from lorasc_ds.benchmark.setting import Setting
from lorasc_ds.benchmark.timing import seconds_of
from lorasc_ds.quickstart.make_base import make_tokenizer
from lorasc_ds.trainer import Trainer

LEAST = {(64, 64): 50.0, (64, 1024): 8.0, (4, 4096): 1.5}  # of the issue, by number and side of the weights
VOCABULARY = 40  # the digits'


def llama_of(weights: int, side: int) -> LlamaConfig:
    """A Llama whose q and v are `weights` matrices of `side` x `side`, and that has little else."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=side,
        intermediate_size=64,
        num_hidden_layers=weights // 2,
        num_attention_heads=max(1, side // 64),
        max_position_embeddings=128,
    )


def digits_run(setting: Setting, architecture: LlamaConfig, *, dtype: str = "float32", method: str = "lora") -> Trainer:
    """A run on the digits."""
    folder = setting.fresh("run")
    model = write_model(folder, architecture)
    make_tokenizer().save_pretrained(model)
    return make_trainer(prepared(model, digits_settings(dtype, method)), folder, setting.device)


def digits_settings(dtype: str = "float32", method: str = "lora") -> dict[str, dict[str, Any]]:
    """Of a run with noise and averaging, an expert an epoch."""
    return {
        "model": {"dtype": dtype},
        "adapter": {"method": method},
        "task": {"name": "digits", "train_examples": 16, "dev_examples": 2, "test_examples": 2},
        "cascade": {"strategy": "lorasc", "experts": 50, "noise_intensity": 0.1, "slow_retention": 0.6},
        "training": {"batch_size": 4},
    }


def beside_peft(setting: Setting) -> Iterator[Result]:
    """C1: the weight edit with noise, the new pairs and the empty optimizer; the whole boundary is timed beside it."""
    for weights, side in setting.options.boundaries:
        architecture = llama_of(weights, side)
        trainer = digits_run(setting, architecture)
        with closing(trainer.batches):
            cycle = peers.Cycle(peers.random_model(architecture, torch.float32, setting.device), NOISE_SCALE)
            sides = {"ours": Boundary(trainer), "ours, one pass": Boundary(trainer, one_pass=True)}
            seconds = setting.in_turns({**sides, "PEFT cycle": cycle})
            whole = [seconds_of(partial(turn_over, trainer), setting.device) for _ in range(3)]
        title = f"boundary with noise, {weights} weights of {side} x {side}: PEFT cycle / ours"
        yield ratio("C1", f"{title} in one pass", seconds, ("PEFT cycle", "ours, one pass"))
        yield setting.judged(
            ratio(
                "C1",
                title,
                seconds,
                ("PEFT cycle", "ours"),
                Target(">=", LEAST[weights, side]) if (weights, side) in LEAST else None,
                details={"whole_boundary_seconds": whole},
                ours=f"; with probes, read-back and ledger {duration(statistics.median(whole))}",
            )
        )


def turn_over(trainer: Trainer) -> None:
    """A whole boundary: the open expert closes, and the next opens."""
    plan, closed = trainer.preparation.plan, len(trainer.cascade.ledger.experts)
    trainer.cascade.close_expert(plan.expert(closed + 1))
    trainer.cascade.open_expert(plan.expert(closed + 2))


def large_merge(setting: Setting) -> Iterator[Result]:
    """C3: two merges of each side, no noise; the most bytes held by tensors made inside, in weights."""
    side = 64 if setting.quick else 4096
    architecture = llama_of(2, side)
    trainer = digits_run(setting, architecture)
    with closing(trainer.batches):
        boundary = Boundary(trainer)
        base = peers.with_peft(peers.random_model(architecture, torch.float32, setting.device))
        layers: list[Any] = [m for name, m in base.named_modules() if name.endswith(peers.TARGETS)]

        def ours() -> None:
            trainer.live.merge(boundary.pairs)

        def theirs() -> None:
            for layer in layers:
                layer.merge()
                layer.merged_adapters.clear()  # merged for good, to be merged again

        seconds = setting.in_turns({"ours": ours, "PEFT merge": theirs})
        peaks = {}
        for name, work in (("ours", ours), ("PEFT merge", theirs)):
            with PeakBytes() as bytes_:
                work()
            peaks[name] = bytes_.peak / (4 * side * side)
    title = f"merge of 2 weights of {side} x {side}: PEFT / ours"
    yield setting.judged(
        ratio("C3", title, seconds, ("PEFT merge", "ours"), Target(">=", 2.0), details={"peak_in_weights": peaks})
    )
    yield setting.judged(
        Result(
            "C3",
            "most memory held besides by a merge, in weights",
            peaks["ours"],
            "weights",
            target=Target("<=", 0.5),  # less than one temporary as large as a weight
            ours=f"{peaks['ours']:.3g}",
            peer=f"PEFT merge: {peaks['PEFT merge']:.3g}",
        )
    )


def growth(setting: Setting) -> Iterator[Result]:
    """C12: compiled decoder layers trained and scored over five boundaries."""
    from torch._dynamo.utils import counters

    trainer = digits_run(setting, llama_of(4, 64))
    with closing(trainer.batches):
        compile_afresh(trainer.module, setting.compiler)
        step = Steps(trainer)

        def turn() -> None:
            step()
            turn_over(trainer)

        for _ in range(2):  # the first boundary makes what stays
            turn()
        graphs, held = counters["stats"]["unique_graphs"], held_bytes(setting.device)
        for _ in range(5):
            turn()
        made, grown = counters["stats"]["unique_graphs"] - graphs, held_bytes(setting.device) - held
    records = 5 * sum(4 * p.numel() for p in trainer.live.pair_parameters)
    details = {"graphs_before": graphs, "bytes_before": held, "bytes_of_five_experts": records}
    yield Result("C12", "recompilations over 5 boundaries", made, "", target=Target("==", 0), details=details)
    yield Result("C12", "live bytes more after 5 boundaries", grown, "bytes", target=Target("==", 0), details=details)


def held_bytes(device: torch.device) -> int:
    """Of all live tensors."""
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else live_bytes()
