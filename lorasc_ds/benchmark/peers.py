"""What this project is compared with, built from its own public API: PEFT in a plain loop, in HF Trainer, in TRL."""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PretrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)
from transformers import Trainer as HFTrainer

from lorasc_ds.benchmark.timing import Seconds, wait_for
from lorasc_ds.encoded import ScoredTokens

LEARNING_RATE = 1e-4
RANK, ALPHA = 8, 16
TARGETS = ("q_proj", "v_proj")
IGNORED = -100


def lora_config(method: str = "lora") -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), use_dora=method == "dora")


def random_model(architecture: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(architecture, dtype=dtype)


def with_peft(model: nn.Module, method: str = "lora") -> PeftModel:
    with quietly():
        peft_model = get_peft_model(cast(PreTrainedModel, model), lora_config(method))
    peft_model.train()
    return cast(PeftModel, peft_model)


def adamw(model: nn.Module, method: str = "lora") -> torch.optim.Optimizer:
    """PEFT's own optimizer where the method has one, else torch's AdamW at its defaults."""
    if method == "lora+":
        return create_loraplus_optimizer(
            cast(PeftModel, model), torch.optim.AdamW, lr=LEARNING_RATE, loraplus_lr_ratio=16
        )
    if method == "lora-fa":
        return create_lorafa_optimizer(cast(PeftModel, model), r=RANK, lora_alpha=ALPHA, lr=LEARNING_RATE)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


def padded(sequences: Sequence[ScoredTokens], device: torch.device) -> dict[str, Tensor]:
    """Ids, mask and labels as a padding collator makes them; (sequences, longest)."""
    lengths = torch.tensor([[len(one.ids)] for one in sequences])
    longest = int(lengths.max())
    ids = torch.tensor([[*one.ids, *[0] * (longest - len(one.ids))] for one in sequences])
    places = torch.arange(longest)
    scored = (places < lengths) & (places >= lengths - torch.tensor([[one.scored] for one in sequences]))
    found = {"input_ids": ids, "labels": ids.masked_fill(~scored, IGNORED)}
    if bool((lengths < longest).any()):
        found["attention_mask"] = (places < lengths).long()
    return {name: one.to(device) for name, one in found.items()}


class PlainLoop:
    """PEFT in the shortest loop there is: forward, backward, clipping, AdamW; the loss is looked at.

    Args:
        sequences: gives those of the next step.
    """

    def __init__(self, model: PeftModel, sequences: Callable[[], list[ScoredTokens]], method: str = "lora") -> None:
        self.model, self.optimizer, self.sequences = model, adamw(model, method), sequences
        self.device = next(model.parameters()).device

    def __call__(self) -> float:
        loss = self.model(**padded(self.sequences(), self.device), use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Cycle:
    """A boundary as PEFT does it: merge and unload, noise drawn by torch, a new PEFT model, a new optimizer.

    Args:
        initialize: gives the model and optimizer to an engine; the one before is to be ended by it.
        whole: inside, all weights are whole and may be written (ZeRO-3).
    """

    def __init__(
        self,
        base: PreTrainedModel,
        noise_scale: float,
        initialize: Callable[[nn.Module, torch.optim.Optimizer], Any] = lambda model, optimizer: None,
        whole: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        self.noise_scale, self.initialize, self.whole = noise_scale, initialize, whole
        self.begin(base)

    def begin(self, base: nn.Module) -> None:
        self.model = with_peft(base)
        self.optimizer = adamw(self.model)
        self.engine = self.initialize(self.model, self.optimizer)

    def merged(self) -> nn.Module:
        base = cast(nn.Module, self.model.merge_and_unload())  # type: ignore[operator]
        for name, module in base.named_modules():
            if isinstance(module, nn.Linear) and name.endswith(TARGETS):
                weight = module.weight.data
                weight += (torch.rand_like(weight) - 0.5) * self.noise_scale
        return base

    def __call__(self) -> None:
        if self.whole is None:
            base = self.merged()
        else:
            with self.whole(self.model):
                base = self.merged()
        self.begin(base)


@contextmanager
def quietly() -> Iterator[None]:
    """Without what peers say of their own defaults and of each other's versions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def rows_of(sequences: Sequence[Sequence[int]]) -> Dataset:
    return Dataset.from_dict({"input_ids": list(sequences), "labels": list(sequences)})


class CountingCollator:
    """A collator that counts what it is given: `tokens`, padding left out."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate, self.tokens = collate, 0

    def __call__(self, features: list[Any]) -> Any:
        self.tokens += sum(len(one["input_ids"]) for one in features)
        return self.collate(features)


COMMON: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}


class Clock(TrainerCallback):
    """Of a training, from its first batch to its end: seconds, without what `train()` sets up before."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.began, self.seconds = device, 0.0, Seconds(0.0)

    def now(self) -> float:
        wait_for(self.device)
        return time.perf_counter()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = self.now()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = Seconds(self.now() - self.began)


class TrainerBlock:
    """So many steps of a trainer of Hugging Face's kind at one call; `tokens` are those of its sequences."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.tokens = trainer, 0
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.data_collator = CountingCollator(trainer.data_collator)
        self.clock = Clock(trainer.args.device)
        self.trainer.add_callback(self.clock)

    def __call__(self) -> Seconds:
        before = self.trainer.data_collator.tokens
        with quietly():
            self.trainer.train()
        self.tokens = self.trainer.data_collator.tokens - before
        return self.clock.seconds


def hf_trainer(model: PreTrainedModel, tokenizer: Any, rows: Dataset, folder: Path, steps: int, **best: Any) -> Any:
    """HF Trainer with PEFT at its defaults: batches of 8, padded to the longest; `best` are other settings."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    settings: dict[str, Any] = COMMON | {"output_dir": str(folder), "max_steps": steps, "use_cpu": on_cpu} | best
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    return HFTrainer(
        model=with_peft(model), args=TrainingArguments(**settings), train_dataset=rows, data_collator=collator
    )


def sft_trainer(model: PreTrainedModel, tokenizer: Any, rows: Dataset, folder: Path, steps: int, **best: Any) -> Any:
    """TRL's SFTTrainer with a PEFT configuration, at its defaults."""
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

    on_cpu = next(model.parameters()).device.type == "cpu"
    settings: dict[str, Any] = COMMON | {"output_dir": str(folder), "max_steps": steps, "use_cpu": on_cpu} | best
    settings["bf16"] = False  # the model has its dtype
    arguments = SFTConfig(**settings)
    return SFTTrainer(
        model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora_config()
    )


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def with_liger(model: PreTrainedModel) -> PreTrainedModel:
    """Liger's kernels on a Llama, by its own public function."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama  # pyright: ignore[reportMissingImports]

    apply_liger_kernel_to_llama(model=model)
    return model


def regionally_compiled(model: nn.Module, backend: str) -> nn.Module:
    """Every layer of a stack compiled by itself, as users do; for any batch."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for layer in module:
                layer.compile(backend=backend, dynamic=True)
    return model
