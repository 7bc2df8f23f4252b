"""The cascade in others' training loops: this package's, a hand-written one and the Trainer's, on the same batches.

`test_plugin.py` calls it for one process. Started as `plugin_cases.py FOLDER MODEL` by each of two processes, it loops
over the cases of `cases()` in them, and rank 0 writes `FOLDER/CASE.json`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import reference
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from conftest import base_weights
from engine_cases import BUCKETS, RECIPE, SETTINGS, WHOLE, clean_state, make_trainer
from engine_cases import Case as EngineCase
from engine_measures import LEARNING_RATE, RANK, whole
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, training_args

from lorasc_ds import Cascade, CascadeCallback
from lorasc_ds.adapters import make_pairs_lean
from lorasc_ds.algorithm.ledger import Ledger, digest
from lorasc_ds.cascade import Boundaries
from lorasc_ds.cli import parse_command_line
from lorasc_ds.errors import ConfigError
from lorasc_ds.live_weights import LiveWeights
from lorasc_ds.preparation import Preparation, prepare
from lorasc_ds.sharding.launch import quieten_deepspeed

STEPS, EXPERTS, STOPPED = 9, 3, 4  # a checkpoint after step 4 is inside the second expert
LORASC = {"strategy": "lorasc", "slow_retention": 0.6, "noise_intensity": 1.0}
WORLD_SIZE = 2
WHOLE_STEPS = {"task.train_examples": 36}  # three in an epoch


@dataclass(frozen=True)
class Case:
    """`loop` is whose: `own` (this package's), `hand` or `trainer`; `zero` as in `engine_cases.Case`.

    `pairs` is their dtype under a bfloat16 engine: DeepSpeed casts them, but under ZeRO-3 they stay as PEFT makes them,
    float32 unless it is told otherwise, as TRL does. `expect` is what else is done: `resume` from a checkpoint, or
    `refusal` by ConfigError.
    """

    name: str
    loop: str
    zero: dict[str, Any] | None = None
    method: str = "lora"
    bf16: bool = False
    pairs: str = "bfloat16"
    expect: str = ""
    engine: dict[str, Any] = field(default_factory=dict)


def cases() -> Iterator[Case]:
    zeros = {"ddp": None, "zero2": {"stage": 2}, "zero3": {"stage": 3, **WHOLE}}
    for name, zero in zeros.items():
        for loop in ("own", "hand"):
            yield Case(f"{loop}-{name}", loop, zero)
        yield Case(f"trainer-{name}", "trainer", zero, expect="resume" if zero else "")
    for name in ("zero2", "zero3"):
        yield Case(f"trainer-{name}-bf16", "trainer", zeros[name], bf16=True, expect="resume")
        yield Case(f"trainer-{name}-bf16-fa", "trainer", zeros[name], "lora-fa", bf16=True, expect="resume")
    yield Case("trainer-zero3-bf16-float32", "trainer", zeros["zero3"], bf16=True, pairs="float32")
    yield Case("trainer-zero1-bf16", "trainer", {"stage": 1}, bf16=True)
    for loop in ("own", "hand"):
        yield Case(f"{loop}-zero3-dora", loop, zeros["zero3"], "dora")
    master = {"data_types": {"grad_accum_dtype": "fp32"}}
    yield Case("refused-bf16-optimizer", "trainer", {"stage": 1}, bf16=True, expect="refusal", engine=master)
    yield Case("refused-mixed-group", "trainer", zeros["zero2"], "dora", expect="refusal")
    for name in ("zero2", "zero3"):
        yield Case(f"refused-raw-optimizer-{name}", "raw", zeros[name], expect="refusal")


def preparation_of(model: Path, settings: dict[str, Any], rank: int = 0, world_size: int = 1) -> Preparation:
    arguments = [f"--{key}={value}" for key, value in (settings | {"model.name_or_path": model}).items()]
    invocation = parse_command_line(arguments, RECIPE)
    assert not isinstance(invocation, str)
    return prepare(invocation.config, rank, world_size)


def batches(preparation: Preparation) -> Iterator[dict[str, Tensor]]:
    """This process's part of every step, as a Hugging Face model takes it: one token of each row is scored.

    The targets are `shift_labels` besides, so that the model reads as many tokens as this package's trainer lets it.
    """
    for step in range(STEPS):
        (micro,) = preparation.data.step(step).micro_batches
        batch = micro.batch
        assert batch.attention_mask is None
        assert batch.scored_tokens == len(batch.input_ids)
        labels = torch.full_like(batch.input_ids, -100)
        labels[batch.token_row, batch.token_position] = batch.token_target
        yield {"input_ids": batch.input_ids, "labels": labels, "shift_labels": labels}


def rows(preparations: list[Preparation]) -> list[dict[str, Tensor]]:
    """The same as a data set that the Trainer, asked not to shuffle, deals out to the processes alike."""
    steps = zip(*(batches(preparation) for preparation in preparations), strict=True)
    return [
        dict(zip(part, row, strict=True)) for step in steps for part in step for row in zip(*part.values(), strict=True)
    ]


def peft_config(method: str = "lora", rank: int = RANK, **more: Any) -> LoraConfig:
    options = {"r": rank, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "use_dora": method == "dora"}
    return LoraConfig(**options | more)


def adapted(model: Path, method: str = "lora", rank: int = RANK, **options: Any) -> PeftModel:
    """As a user makes it; for LoRA-FA the user freezes A."""
    torch.manual_seed(0)
    module = get_peft_model(AutoModelForCausalLM.from_pretrained(model), peft_config(method, rank), **options)
    if method != "dora":
        make_pairs_lean(module)  # PEFT's own round three times where these round once
    if method == "lora-fa":
        for name, parameter in module.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
    return module


def groups_of(module: torch.nn.Module) -> list[dict[str, Any]]:
    """Pairs, and DoRA's magnitudes in a group of their own, which ZeRO needs."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    magnitudes = [parameter for name, parameter in trained.items() if "magnitude" in name]
    pairs = [parameter for name, parameter in trained.items() if "magnitude" not in name]
    return [{"params": params} for params in (pairs, magnitudes) if params]


def hand_loop(
    accelerator: Accelerator,
    module: torch.nn.Module,
    data: list[dict[str, Tensor]],
    directory: Path,
    *,
    rate: float = LEARNING_RATE,
    max_grad_norm: float | None = None,
    **settings: Any,
) -> tuple[Cascade, list[float]]:
    """A loop as people write it, with the three calls beside it. Returns the losses too."""
    optimizer = torch.optim.AdamW(groups_of(module), lr=rate, weight_decay=0.0)
    model, optimizer = accelerator.prepare(module, optimizer)
    cascade = Cascade(
        model, optimizer, steps=STEPS, probe=data[0], directory=directory, **({"experts": EXPERTS} | LORASC | settings)
    )
    losses = []
    model.train()
    for step, batch in enumerate(data):
        cascade.open(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * cascade.learning_rate_factor(step)
        loss = model(**batch, use_cache=False).loss
        accelerator.backward(loss)
        if max_grad_norm is not None:
            accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
        cascade.close(step)
    return cascade, losses


class InOrder(Trainer):
    """Does not shuffle."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def arguments(directory: Path, **more: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "weight_decay": 0.0,
        "optim": "adamw_torch",
        "report_to": [],
        "logging_steps": 1,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": 0,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(directory), **settings | more)


def trainer_run(
    module: torch.nn.Module, args: TrainingArguments, data: Any, resume: Path | None = None, **settings: Any
) -> tuple[Trainer, Cascade]:
    callback = CascadeCallback(**({"experts": EXPERTS} | LORASC | settings))
    trainer = InOrder(model=module, args=args, train_dataset=data, callbacks=[callback])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert callback.cascade is not None
    return trainer, callback.cascade


def replayed(cascade: Cascade, model: Path) -> str:
    """Digest of the ledger replayed on one process from the pretrained weights."""
    ledger = Ledger.load(cascade.ledger.directory)
    assert len(ledger.experts) == cascade.plan.experts
    base = base_weights(model, list(ledger.weights), getattr(torch, ledger.base.dtype))
    return digest(weight for _, weight in ledger.replay(base.__getitem__))


def master(parameter: Any) -> Tensor | None:
    """The float32 master by DeepSpeed's documented call; None where there is none."""
    if not hasattr(parameter, "_hp_mapping") and not hasattr(parameter, "ds_id"):
        return None
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def off_from_fresh(live: LiveWeights, expert: int) -> float:
    """How far master and copy of the pairs are from fresh ones: B zero; A as drawn, the copy rounded to its dtype."""
    off = 0.0
    for position, one in enumerate(live.weights):
        A = torch.from_numpy(reference.fresh_A(one.rank, one.shape[1], position, expert, live.seed))
        for parameter, wanted in ((one.A, A), (one.B, torch.zeros(one.shape[0], one.rank))):
            held = whole(parameter)
            off = max(off, float((held - wanted.to(held.dtype)).abs().max()))
            if parameter.requires_grad:
                found = master(parameter)
                assert found is not None or held.dtype == torch.float32
                off = max(off, 0.0 if found is None else float((found - wanted).abs().max()))
    return off


@contextmanager
def boundaries_watched() -> Iterator[dict[str, list[Any]]]:
    """Digests after every opening and closing; after every opening, `off_from_fresh` and the largest moment."""
    seen: dict[str, list[Any]] = {"digests": [], "off": [], "dtypes": [], "moments": []}
    opening, closing = Boundaries.open_expert, Boundaries.close_expert

    def after(boundary: Callable[..., Any], opens: bool) -> Callable[..., Any]:
        def watched(self: Boundaries, expert: Any) -> Any:
            report = boundary(self, expert)
            seen["digests"].append(self.live.weights_sha256())
            if opens:
                seen["off"].append(off_from_fresh(self.live, expert.index))
                seen["dtypes"].append(str(self.weights[0].B.dtype))
                moments = [self.live.backend.moments(parameter) for parameter in self.live.pair_parameters]
                largest = max((float(value.abs().max()) for held in moments for value in held.values()), default=None)
                seen["moments"].append(largest)
            return report

        return watched

    Boundaries.open_expert, Boundaries.close_expert = after(opening, True), after(closing, False)
    try:
        yield seen
    finally:
        Boundaries.open_expert, Boundaries.close_expert = opening, closing


def engine_settings(case: Case) -> dict[str, Any] | None:
    if case.zero is None:
        return None
    return case.engine | {
        "zero_optimization": BUCKETS | case.zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 12,
        "gradient_clipping": 0.0,  # else Accelerate says 1
        "bf16": {"enabled": case.bf16},
    }


def run_case(case: Case, model: Path, folder: Path, rank: int, preparations: list[Preparation]) -> dict[str, Any]:
    if case.loop == "own":
        settings = WHOLE_STEPS | {"adapter.method": case.method}
        trainer = make_trainer(EngineCase(case.name, WORLD_SIZE, case.zero, settings), model, folder, rank)
        with boundaries_watched() as seen:
            losses = []
            for expert in trainer.preparation.plan:
                trainer.cascade.open_expert(expert)
                for step in range(expert.start, expert.stop):
                    losses.append(
                        trainer.training_step(step, trainer.preparation.learning_rate(expert, step)).read().loss
                    )
                trainer.cascade.close_expert(expert)
        return seen | {"losses": losses, "live": trainer.weights_sha256()}
    if case.loop in ("hand", "raw"):
        engine = engine_settings(case)
        accelerator = Accelerator(
            cpu=engine is None,
            deepspeed_plugin=None if engine is None else DeepSpeedPlugin(hf_ds_config=engine),
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
        )
        assert accelerator.num_processes == dist.get_world_size() == WORLD_SIZE
        module = adapted(model, case.method)
        data = list(batches(preparations[rank]))
        if case.loop == "raw":
            optimizer = torch.optim.AdamW(groups_of(module))
            prepared, _ = accelerator.prepare(module, optimizer)
            Cascade(prepared, optimizer, steps=STEPS, experts=EXPERTS, probe=data[0], directory=folder)
        with boundaries_watched() as seen:
            cascade, losses = hand_loop(accelerator, module, data, folder)
        return seen | {"losses": losses, "live": cascade.weights_sha256(), "replayed": replayed(cascade, model)}
    save = {"save_strategy": "steps", "save_steps": STOPPED} if case.expect == "resume" else {}

    def train(resume: Path | None) -> tuple[Trainer, Cascade]:
        if case.zero is not None:  # the Trainer names no backend for DeepSpeed, so that without a GPU there is none
            os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
            PartialState(backend="gloo")
        args = arguments(
            folder,
            per_device_train_batch_size=6,
            max_grad_norm=0.0,
            bf16=case.bf16,
            use_cpu=case.zero is None,
            ddp_backend="gloo",
            deepspeed=engine_settings(case),
            accelerator_config={"use_configured_state": case.zero is not None},
            **save,
        )
        assert args.world_size == dist.get_world_size() == WORLD_SIZE
        module = adapted(model, case.method, autocast_adapter_dtype=case.pairs == "float32")
        return trainer_run(module, args, rows(preparations), resume)

    with boundaries_watched() as seen:
        trainer, cascade = train(None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = seen | {"losses": losses, "live": cascade.weights_sha256(), "replayed": replayed(cascade, model)}
    merged = base_weights(folder / "merged", list(cascade.ledger.weights), cascade.live.weights[0].weight.dtype)
    found |= {"merged": digest(merged.values()), "dtype": cascade.ledger.base.dtype}
    if case.expect == "resume":
        trainer.accelerator.free_memory()
        del trainer, cascade
        with clean_state():
            pass
        with boundaries_watched() as again:
            _, resumed = train(folder / f"checkpoint-{STOPPED}")
        found |= {"resumed": resumed.weights_sha256(), "again": again["digests"]}
    return found


def main(*arguments: str) -> None:
    """`FOLDER MODEL`, and what the names of the cases are to contain."""
    folder, model, words = Path(arguments[0]), Path(arguments[1]), arguments[2:]
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    quieten_deepspeed()  # compiles nothing
    training_args.is_torch_bf16_gpu_available = lambda: True  # it asks for a GPU, which DeepSpeed does not need
    preparations = [preparation_of(model, SETTINGS | WHOLE_STEPS, one, WORLD_SIZE) for one in range(WORLD_SIZE)]
    for case in cases():
        if words and not any(word in case.name for word in words):
            continue
        began = time.perf_counter()
        (folder / case.name).mkdir(exist_ok=True)
        with clean_state():
            try:
                found = run_case(case, model, folder / case.name, rank, preparations)
            except ConfigError as error:
                found = {"refused": str(error)} if case.expect == "refusal" else {"error": traceback.format_exc()}
            except Exception:  # written down for test_plugin_engines.py to show; the next cases can still run
                found = {"error": traceback.format_exc()}
        if rank == 0:
            found["seconds"] = time.perf_counter() - began
            (folder / f"{case.name}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
