"""Training steps in one process: S1 to S3."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from lorasc_ds.benchmark import peers
from lorasc_ds.benchmark.boundaries import VOCABULARY, digits_run
from lorasc_ds.benchmark.ours import Steps, compile_afresh, make_trainer, prepared, write_model, write_rows
from lorasc_ds.benchmark.results import Result, Spread, Target, duration, ratio
from lorasc_ds.benchmark.setting import Setting

METHODS = ("lora", "lora+", "dora", "lora-fa")
BATCH = 8  # HF Trainer's default
MAX_LENGTH = 256  # the paper's, on Alpaca
ALPACA_LENGTHS = Path(__file__).parent / "alpaca_lengths.json"  # of 1024 rows, prompt and answer, in GPT-2's tokens


def llama(hidden_size: int, vocabulary: int, layers: int = 4) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=max(4, hidden_size // 64),
        max_position_embeddings=2048,
    )


def repeated(work: Callable[[], object], times: int) -> Callable[[], None]:
    def block() -> None:
        for _ in range(times):
            work()

    return block


def beside_peft(setting: Setting) -> Iterator[Result]:
    """S1: steps on the same batches of the digits, whose sequences are of one length and scored on one token."""
    block = 2 if setting.quick else 10
    for hidden_size in setting.options.hidden_sizes:
        architecture = llama(hidden_size, VOCABULARY)
        for method in METHODS:
            trainer = digits_run(setting, architecture, method=method)
            with closing(trainer.batches):
                model = peers.random_model(architecture, torch.float32, setting.device)
                loop = peers.PlainLoop(
                    peers.with_peft(model, method), Steps(trainer).sequences_in_turn().__next__, method
                )
                seconds = setting.in_turns(
                    {"ours": repeated(Steps(trainer), block), "PEFT loop": repeated(loop, block)}
                )
            yield setting.judged(
                ratio(
                    "S1",
                    f"{block} steps, {method}, hidden size {hidden_size}: ours / PEFT loop",
                    seconds,
                    ("ours", "PEFT loop"),
                    Target("<=", 1.0) if method == "lora" else None,
                )
            )


def compiled(setting: Setting) -> Iterator[Result]:
    """S3: the steps of S1 with and without compiled layers, both sides."""
    block = 2 if setting.quick else 10
    for hidden_size in setting.options.hidden_sizes:
        architecture = llama(hidden_size, VOCABULARY)
        with ExitStack() as stack:
            plain, faster = (digits_run(setting, architecture) for _ in range(2))
            for trainer in (plain, faster):
                stack.enter_context(closing(trainer.batches))
            compile_afresh(faster.module, setting.compiler)
            model = peers.with_peft(peers.random_model(architecture, torch.float32, setting.device))
            peers.regionally_compiled(model, setting.compiler)
            loop = peers.PlainLoop(model, Steps(faster).sequences_in_turn().__next__)
            steps = {"ours": Steps(plain), "ours, compiled": Steps(faster), "PEFT loop, compiled": loop}
            seconds = setting.in_turns({name: repeated(one, block) for name, one in steps.items()})
        title = f"{block} steps, hidden size {hidden_size}"
        as_written = f" (as written: {duration(statistics.median(seconds['ours']))})"
        gain = f"{title}: as written / compiled"
        yield setting.judged(ratio("S3", gain, seconds, ("ours", "ours, compiled"), ours=as_written))
        beside = ("ours, compiled", "PEFT loop, compiled")
        yield setting.judged(ratio("S3", f"{title}, compiled: ours / PEFT loop", seconds, beside, Target("<=", 1.0)))


def alpaca_lengths(count: int) -> list[tuple[int, int]]:
    """Tokens of prompt and answer of Alpaca's rows."""
    return [(asked, answered) for asked, answered in json.loads(ALPACA_LENGTHS.read_text())[:count]]


def alpaca_run(setting: Setting, architecture: LlamaConfig, rows: int, **training: Any) -> Any:
    """A run on rows of Alpaca's lengths, all tokens scored."""
    folder = setting.fresh("alpaca")
    file = write_rows(folder, alpaca_lengths(rows), architecture.vocab_size)
    settings = {
        "task": {"name": "instructions", "train_file": str(file), "dev_examples": 2, "mask_prompt": False},
        "training": {"batch_size": BATCH, "max_length": MAX_LENGTH} | training,
    }
    return make_trainer(prepared(write_model(folder, architecture), settings), folder, setting.device)


def beside_trainers(setting: Setting) -> Iterator[Result]:
    """S2: an epoch of Alpaca's lengths a turn; valid tokens a second, which all count alike."""
    rows = 2 * BATCH if setting.quick else 16 * BATCH
    architecture = llama(32 if setting.quick else 256, 1024)
    with ExitStack() as stack:
        variants: dict[str, Any] = {}
        for name, own in (
            ("ours", {}),  # packed
            ("ours, padded", {"packing": False}),
            ("ours, padded and grouped", {"packing": False, "group_by_length": True}),
        ):
            trainer = alpaca_run(setting, architecture, rows, **own)
            stack.enter_context(closing(trainer.batches))
            variants[name] = Epoch(Steps(trainer))
        preparation = trainer.preparation
        sequences = peers.rows_of([list(one.target.ids) for one in preparation.splits["train"]])
        steps = preparation.data.steps_per_epoch
        tokenizer = preparation.reading.saved[0]

        def block(make: Callable[..., Any], **best: Any) -> peers.TrainerBlock:
            model = peers.random_model(architecture, torch.float32, setting.device)
            with peers.quietly():
                return peers.TrainerBlock(make(model, tokenizer, sequences, setting.fresh("peer"), steps, **best))

        variants["HF Trainer"] = block(peers.hf_trainer)
        variants["HF Trainer, grouped"] = block(peers.hf_trainer, train_sampling_strategy="group_by_length")
        if peers.installed("trl"):
            variants["TRL SFTTrainer"] = block(peers.sft_trainer)
            variants["TRL SFTTrainer, not recomputing"] = block(peers.sft_trainer, gradient_checkpointing=False)
        seconds = setting.in_turns(variants)
        rates = {name: [variants[name].tokens / one for one in found] for name, found in seconds.items()}
    best = max((name for name in rates if name.startswith("ours")), key=lambda name: statistics.median(rates[name]))
    for peer in [name for name in rates if not name.startswith("ours")]:
        spread = Spread.of([one / other for one, other in zip(rates[best], rates[peer], strict=True)])
        yield setting.judged(
            Result(
                "S2",
                f"valid tokens a second on Alpaca's lengths: {best} / {peer}",
                spread.median,
                low=spread.low,
                high=spread.high,
                target=Target(">=", 1.8) if peer == "HF Trainer" else None,
                ours="; ".join(f"{name}: {statistics.median(rates[name]):,.0f}/s" for name in rates if "ours" in name),
                peer=f"{peer}: {statistics.median(rates[peer]):,.0f}/s",
                details={"tokens_per_second": rates, "tokens": {name: variants[name].tokens for name in variants}},
            )
        )
    if not peers.installed("trl"):
        yield Result("S2", "beside TRL's SFTTrainer", missing="pip install trl")


class Epoch:
    """The steps of an epoch of this project, at one call; `tokens` are those of its sequences."""

    def __init__(self, steps: Steps) -> None:
        self.steps, self.tokens = steps, 0

    def __call__(self) -> None:
        self.tokens = 0
        for _ in range(self.steps.trainer.preparation.data.steps_per_epoch):
            self.steps()
            self.tokens += self.steps.tokens
