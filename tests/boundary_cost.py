"""What a boundary costs beside PEFT's cycle: `python tests/boundary_cost.py [--modules 64 --size 1024]`.

PEFT's cycle is `merge_and_unload`, noise drawn by torch and added to every weight, `get_peft_model` and a new AdamW; ours
is the edit of the weights with noise, the re-draw and the reset, as `LiveWeights` and the backend offer them, in two passes
over the weights and in one. Both take turns in one process. Printed are medians, and the ratio's quartiles.

Under `torchrun --nproc_per_node 2 tests/boundary_cost.py --stage 2` (or 3) the cycle ends with another
`deepspeed.initialize`. What else a boundary does is timed beside both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorasc_ds.adapters import adapted_weight
from lorasc_ds.algorithm import experts
from lorasc_ds.live_weights import LiveWeights
from lorasc_ds.sharding import Processes, reach
from lorasc_ds.sharding.launch import quieten_deepspeed

SIZES = ((64, 64), (64, 1024), (4, 4096))
LORA = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
RATE = 1e-4
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def llama(modules: int, size: int) -> LlamaForCausalLM:
    """With so many q and v projections, all of size x size; what else it holds is small."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=size,
            intermediate_size=64,
            num_hidden_layers=modules // 2,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    )


def trained(model: nn.Module, stage: int | None) -> tuple[Any, Any]:
    """Engine and optimizer of a model with pairs, after one step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    if stage is None:
        return model, optimizer
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 5_000_000,
            "allgather_bucket_size": 5_000_000,
            "stage3_param_persistence_threshold": 0,
        },
    }
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine, optimizer


def step(engine: Any, optimizer: Any, stage: int | None) -> None:
    ids = torch.arange(8)[None]
    loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
    if stage is None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    else:
        engine.backward(loss)
        engine.step()


class Peer:
    """PEFT's cycle."""

    def __init__(self, modules: int, size: int, stage: int | None) -> None:
        self.stage = stage
        self.model: Any = get_peft_model(llama(modules, size), LORA)
        self.engine, self.optimizer = trained(self.model, stage)

    def cycle(self) -> None:
        whole = nullcontext()
        if self.stage is not None:
            self.engine.destroy()
        if self.stage == 3:
            from deepspeed.runtime.zero import GatheredParameters

            whole = GatheredParameters(list(self.model.parameters()), modifier_rank=0)
        with whole:
            base = self.model.merge_and_unload()
            for name, weight in base.named_parameters():
                if name.endswith(("q_proj.weight", "v_proj.weight")):
                    weight.data.add_(torch.rand_like(weight).sub_(0.5).mul_(1e-3))
        self.model = get_peft_model(base, LORA)
        self.engine, self.optimizer = trained(self.model, self.stage)


class Ours:
    """The same model in one piece; `verbs` are the parts of a boundary, by name."""

    def __init__(self, modules: int, size: int, stage: int | None) -> None:
        model = get_peft_model(llama(modules, size), LORA)
        layers = [layer for layer in model.modules() if isinstance(layer, LoraLinear)]
        weights = [adapted_weight(layer, f"{number:03d}") for number, layer in enumerate(layers)]
        self.engine, self.optimizer = trained(model, stage)
        self.step = lambda: step(self.engine, self.optimizer, stage)
        self.step()
        processes = Processes.of_this_run(torch.device("cpu"))
        backend = reach(self.optimizer, processes, [one.weight for one in weights], "auto")
        live = self.live = LiveWeights(weights, backend, processes, seed=0)
        pairs = live.pairs()
        scale = {one.name: 1e-3 for one in weights}
        listed, scalings = list(pairs.values()), [one.scaling for one in weights]
        self.verbs: dict[str, Callable[[], object]] = {
            "merge": lambda: live.change(pairs),
            "clear B": live.clear_B,
            "noise": lambda: live.change(expert=2, noise_scale=scale),
            "merge and noise": lambda: live.change(pairs, 2, scale),
            "re-draw": lambda: live.restart_pairs(2),
            "reset": lambda: backend.empty_optimizer(live.pair_parameters),
            "read pairs": live.pairs,
            "average": lambda: experts.slow_updates(listed, listed, 0.6),
            "std": lambda: experts.delta_statistics(listed, scalings),
            "read back": lambda: (live.differing(pairs), backend.optimizer_is_empty(live.pair_parameters)),
            "sha256": live.weights_sha256,
        }

    def timed(self, clock: Callable[[], float]) -> dict[str, float]:
        """Seconds of every part, and of the two boundaries that they make."""
        seconds = {}
        for name, verb in self.verbs.items():
            began = clock()
            verb()
            seconds[name] = clock() - began
        rest = seconds["re-draw"] + seconds["reset"]
        return seconds | {
            "ours, two passes": seconds["merge"] + seconds["clear B"] + seconds["noise"] + rest,
            "ours, one pass": seconds["merge and noise"] + rest,
        }


def compare(modules: int, size: int, stage: int | None, rounds: int, clock: Callable[[], float]) -> None:
    ours, peer = Ours(modules, size, stage), Peer(modules, size, stage)
    seconds = defaultdict(list)
    for number in range(rounds + 2):
        ours.step()
        found = ours.timed(clock)
        began = clock()
        peer.cycle()
        found["PEFT's cycle"] = clock() - began
        if number >= 2:  # the first ones compile
            for name, one in found.items():
                seconds[name].append(one)
    if int(os.environ.get("RANK", "0")) != 0:
        return
    print(f"{modules} modules of {size} x {size}, {'no engine' if stage is None else f'ZeRO-{stage}'}")
    for name, values in seconds.items():
        ratio = ""
        if name.startswith("ours"):
            ratios = [theirs / one for one, theirs in zip(values, seconds["PEFT's cycle"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            ratio = f"   PEFT's cycle / this: {middle:6.1f}  ({low:.1f} to {high:.1f})"
        print(f"  {name:<18}{1e3 * statistics.median(values):9.2f} ms{ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modules", type=int, help="default: the three sizes of the targets, one after the other")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--stage", type=int, help="of ZeRO; started by torchrun")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process, on a busy machine")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.stage is not None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        quieten_deepspeed()
        deepspeed.init_distributed("gloo")
    for modules, size in SIZES if options.modules is None else [(options.modules, options.size)]:
        compare(modules, size, options.stage, options.rounds, CLOCKS[options.clock])


if __name__ == "__main__":
    main()
