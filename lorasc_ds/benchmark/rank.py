"""One of the processes of the rows under ZeRO: every engine lives in it at once, and they take turns.

`python -m lorasc_ds.benchmark.rank JOB`, by `ranks.py`; rank 0 writes `found.json`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from transformers import LlamaConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from lorasc_ds.benchmark import peers
from lorasc_ds.benchmark.boundaries import digits_settings, llama_of
from lorasc_ds.benchmark.ours import NOISE_SCALE, Boundary, Steps, make_trainer, prepared, write_model
from lorasc_ds.benchmark.timing import in_turns
from lorasc_ds.benchmark.traffic import Traffic
from lorasc_ds.quickstart.make_base import make_tokenizer
from lorasc_ds.sharding import Launch
from lorasc_ds.sharding.launch import quieten_deepspeed
from lorasc_ds.trainer import Trainer

BUCKETS = {"reduce_bucket_size": 5_000_000, "allgather_bucket_size": 5_000_000}
STAGES = {"ddp": None, "zero1": 1, "zero2": 2, "zero3": 3}


def zero(stage: int) -> dict[str, Any]:
    """The section `zero_optimization`; in stage 3 everything is cut up, also what is small."""
    return {"stage": stage} | (BUCKETS if stage < 3 else {"stage3_param_persistence_threshold": 0})


def launch_of(stage: int | None) -> Launch:
    engine = None if stage is None else {"zero_optimization": zero(stage), "zero_force_ds_cpu_optimizer": False}
    return Launch(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), engine)


@contextmanager
def alone() -> Iterator[None]:
    """Accelerate's state is one for a process; so that engines can live beside each other, it is forgotten."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


def run_under(engine: str, architecture: LlamaConfig, folder: Path, merge_path: str = "auto") -> Trainer:
    """A run of this project under an engine."""
    launch = launch_of(STAGES[engine])
    own = folder / f"{engine}-{merge_path}-{launch.rank}-{len(list(folder.iterdir()))}"
    own.mkdir()
    model = write_model(own, architecture)
    make_tokenizer().save_pretrained(model)
    settings = digits_settings() | {"cascade": digits_settings()["cascade"] | {"merge_path": merge_path}}
    with alone():
        device = torch.device("cpu") if not torch.cuda.is_available() else torch.device("cuda", launch.rank)
        return make_trainer(prepared(model, settings, launch), own, device, launch)


class NewEngine:
    """`deepspeed.initialize`, after the engine before has been destroyed."""

    def __init__(self, stage: int) -> None:
        self.engine: Any = None
        size = int(os.environ["WORLD_SIZE"])
        self.settings = {
            "zero_optimization": zero(stage),
            "train_micro_batch_size_per_gpu": 1,
            "train_batch_size": size,
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        }

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self.engine is not None:
            self.engine.destroy()
        parameters: Any = [p for p in model.parameters() if p.requires_grad]
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, model_parameters=parameters, config=self.settings
        )


def whole(model: nn.Module) -> Any:
    """Inside, ZeRO-3's weights are gathered, and what is written to them stays."""
    return deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0)


def new_engines(stage: int, architecture: LlamaConfig) -> Callable[[], None]:
    base = peers.random_model(architecture, torch.float32, torch.device("cpu"))
    return peers.Cycle(base, NOISE_SCALE, NewEngine(stage), whole if stage == 3 else None)


def bytes_of(trainer: Trainer) -> dict[str, int]:
    """Handed to collectives by a step, after two others, and by the edits of a boundary."""
    step = Steps(trainer)
    for _ in range(2):  # ZeRO-3 learns its order
        step()
    found = {}
    for name, work in (("step", step), ("boundary", Boundary(trainer))):
        with Traffic() as traffic:
            work()
        found[name] = traffic.total
    return found


def main(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    quieten_deepspeed()
    gc.freeze()  # as in measuring.py
    torch.manual_seed(0)
    folder = Path(job["folder"])
    own = folder / f"rank-{os.environ['RANK']}"
    own.mkdir()
    turns: dict[str, Any] = {"repetitions": job["repetitions"], "warm_up": job["warm_up"]}
    turns |= {"device": torch.device("cpu")}
    weights, side = (4, 16) if job["quick"] else (64, 64)
    architecture = llama_of(weights, side)
    found: dict[str, Any] = {"weights": weights, "side": side, "boundaries": {}, "bytes": {}}
    trainers = {engine: run_under(engine, architecture, own) for engine in STAGES}
    found["steps"] = in_turns({f"ours, {name}": Steps(trainer) for name, trainer in trainers.items()}, **turns)
    trainers["zero3, gather"] = run_under("zero3", architecture, own, "gather")
    for engine, trainer in trainers.items():
        found["bytes"][engine] = bytes_of(trainer)
    for engine, stage in STAGES.items():
        if stage is not None:
            variants = {"ours": Boundary(trainers[engine]), "new engine": new_engines(stage, architecture)}
            found["boundaries"][engine] = in_turns(variants, **turns)
            gc.collect()
    if os.environ["RANK"] == "0":
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
