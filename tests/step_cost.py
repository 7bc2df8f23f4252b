"""What an optimizer step costs beside the same step with plain PEFT: `python tests/step_cost.py [--hidden_size 512]`.

Both sides take turns in one process on the same batches; PEFT's side is its own layers and, where it has one, its own
optimizer. Printed are the medians, their ratio, and the ratio's quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from conftest import RECIPE
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorasc_ds.cli import parse_command_line
from lorasc_ds.data import Batch
from lorasc_ds.models import load_model
from lorasc_ds.preparation import attach_adapters, prepare
from lorasc_ds.quickstart.make_base import make_tokenizer
from lorasc_ds.stopping import Stopping
from lorasc_ds.trainer import Trainer

RATE = 1e-4
WARM_UP = 10


def save_llama(folder: Path, hidden_size: int) -> Path:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def plain_peft(model: Path, method: str) -> tuple[PeftModel, torch.optim.Optimizer]:
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], use_dora=method == "dora")
    module = get_peft_model(LlamaForCausalLM.from_pretrained(model), lora)
    module.train()
    assert isinstance(module, PeftModel)
    if method == "lora+":
        return module, create_loraplus_optimizer(module, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=16)
    if method == "lora-fa":
        return module, create_lorafa_optimizer(module, r=8, lora_alpha=16, lr=RATE)
    return module, torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=RATE)


def peft_step(module: PeftModel, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    ids = torch.cat([batch.input_ids, batch.token_target[:, None]], dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, -1] = batch.token_target
    loss = module(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in module.parameters() if p.grad is not None], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def main(hidden_size: int | None, steps: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        model = None if hidden_size is None else save_llama(Path(temporary) / "model", hidden_size)
        print(f"{'adapter':<8} {'ours, ms':>9} {'PEFT, ms':>9} {'ratio':>6}  quartiles")
        for method in ("lora", "lora+", "dora", "lora-fa"):
            settings = [f"--adapter.method={method}", "--task.test_examples=10"]
            settings += [] if model is None else [f"--model.name_or_path={model}"]
            invocation = parse_command_line(settings, RECIPE)
            assert not isinstance(invocation, str)
            preparation = prepare(invocation.config)
            module = load_model(invocation.config.model)
            weights = attach_adapters(invocation.config, module)
            accelerator, directory = Accelerator(mixed_precision="no"), Path(temporary)
            trainer = Trainer(preparation, module, weights, accelerator, directory, Stopping(directory))
            trainer.cascade.open_expert(preparation.plan.expert(1))
            peer = plain_peft(Path(module.config._name_or_path), method)
            ours, theirs = [], []
            for step in range(steps + WARM_UP):
                (micro,) = preparation.data.step(step).micro_batches
                began = time.perf_counter()
                trainer.training_step(step, RATE)
                between = time.perf_counter()
                peft_step(*peer, micro.batch)
                ours.append(between - began)
                theirs.append(time.perf_counter() - between)
            ours, theirs = ours[WARM_UP:], theirs[WARM_UP:]
            ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            milliseconds = [1e3 * statistics.median(seconds) for seconds in (ours, theirs)]
            print(f"{method:<8} {milliseconds[0]:9.2f} {milliseconds[1]:9.2f} {middle:6.3f}  {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden_size", type=int, help="of a Llama of 4 layers (default: the quickstart's model)")
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    main(arguments.hidden_size, arguments.steps)
