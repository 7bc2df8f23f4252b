"""This project's side of a comparison, through its own rooms: Preparation, Trainer, LiveWeights, backend."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from lorasc_ds.algorithm.experts import Pair
from lorasc_ds.cli import build_config
from lorasc_ds.encoded import ScoredTokens
from lorasc_ds.layer_compilation import compile_layers
from lorasc_ds.models import DTYPES, auto_class
from lorasc_ds.preparation import Preparation, attach_adapters, prepare
from lorasc_ds.sharding import Launch, sharded_loading
from lorasc_ds.stopping import Stopping
from lorasc_ds.trainer import Trainer, start_engine

ALONE = Launch(0, 1, None)
STEPS = 100_000  # more than any measurement takes
NOISE_SCALE = 1e-4
SPECIAL = ["<s>", "</s>", "<unk>"]


def word_tokenizer(words: int) -> PreTrainedTokenizerFast:
    """A token for each of the words `w0`, `w1`, ..., so that texts of known lengths can be written."""
    vocabulary = {word: at for at, word in enumerate([*SPECIAL, *(f"w{n}" for n in range(words - len(SPECIAL)))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        model_max_length=1 << 20,
    )


def text_of(length: int, seed: int, words: int) -> str:
    """`length` words, drawn."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(words - len(SPECIAL), (length,), generator=generator)
    return " ".join(f"w{number}" for number in drawn.tolist())


def write_rows(folder: Path, lengths: Sequence[tuple[int, int]], words: int) -> Path:
    """Instructions and outputs of so many words each, as Alpaca's fields."""
    file = folder / "rows.jsonl"
    rows = [
        {"instruction": text_of(asked, 2 * at, words), "output": text_of(answered, 2 * at + 1, words)}
        for at, (asked, answered) in enumerate(lengths)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_model(folder: Path, architecture: PretrainedConfig, words: int | None = None) -> Path:
    """What a run asks a model's folder for before its weights: configuration and tokenizer."""
    architecture.save_pretrained(folder)
    word_tokenizer(words or architecture.vocab_size).save_pretrained(folder)
    return folder


def prepared(model: Path, sections: Mapping[str, Mapping[str, Any]], launch: Launch = ALONE) -> Preparation:
    """A checked run on a model's folder; `sections` are those of a recipe."""
    training = {"max_steps": STEPS, "epochs": 1.0} | dict(sections.get("training", {}))
    content = {name: dict(section) for name, section in sections.items()} | {"training": training}
    content["model"] = {"name_or_path": str(model)} | content.get("model", {})
    return prepare(build_config(content, {}, {}), launch.rank, launch.world_size)


def make_trainer(preparation: Preparation, folder: Path, device: torch.device, launch: Launch = ALONE) -> Trainer:
    """A run on random weights, its first expert open."""
    config = preparation.config
    accelerator = start_engine(launch, preparation)
    torch.manual_seed(config.training.seed)
    with sharded_loading(launch, accelerator, config.model.dtype), torch.device(device):
        kind = auto_class(config.model, preparation.shape.config)
        module = kind.from_config(preparation.shape.config, dtype=DTYPES[config.model.dtype])
    weights = attach_adapters(config, module)
    trainer = Trainer(preparation, module, weights, accelerator, folder, Stopping(folder))
    trainer.cascade.open_expert(preparation.plan.expert(1))
    return trainer


def compile_afresh(module: PreTrainedModel, backend: str) -> None:
    """As `training.compile` does. Graphs of models that are gone would count towards the compiler's limit."""
    torch._dynamo.reset()
    compile_layers(module, backend)


class Steps:
    """Optimizer steps of a run, one a call; `tokens` are those of the sequences of the last, padding not counted."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.number = 0
        self.lengths = {one.id: len(one.target.ids) for one in trainer.preparation.splits["train"]}
        self.tokens = 0

    def sequences_in_turn(self) -> Iterator[list[ScoredTokens]]:
        """The global batches of the same steps, for a peer."""
        data = self.trainer.preparation.data
        for number in itertools.count():
            yield [one.target for one in data.take(data.positions(number))]

    def __call__(self) -> None:
        learning_rate = self.trainer.preparation.config.training.learning_rate
        self.trainer.training_step(self.number, learning_rate)
        data = self.trainer.preparation.data
        self.tokens = sum(self.lengths[one.id] for one in data.take(data.positions(self.number)))
        self.number += 1


class Boundary:
    """What a boundary edits: W <- W + D, W <- W + N, fresh pairs, an empty optimizer.

    Its probes, digests, read-back and ledger are not in it; `Trainer.cascade` has them.

    Args:
        one_pass: as where nothing reads the weights between two experts (`cascade.check_boundaries` false).
    """

    def __init__(self, trainer: Trainer, one_pass: bool = False) -> None:
        self.live, self.backend = trainer.live, trainer.backend
        self.one_pass = one_pass
        self.expert = 1
        self.pairs = random_pairs(trainer)
        self.scales = {one.name: NOISE_SCALE for one in trainer.weights}
        self.backend.begin_optimizer()

    def __call__(self) -> None:
        self.expert += 1
        if self.one_pass:
            self.live.change(self.pairs, self.expert, self.scales)
            self.live.clear_B()
        else:
            self.live.merge(self.pairs)
            self.live.add_noise(self.expert, self.scales)
        self.live.restart_pairs(self.expert)
        self.backend.empty_optimizer(self.live.pair_parameters)


def random_pairs(trainer: Trainer, scale: float = 1e-3) -> dict[str, Pair]:
    """Slow pairs as training might leave them, by name, where the run computes."""
    device = trainer.processes.device
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return scale * torch.randn(shape, generator=generator, device=device)

    return {one.name: Pair(drawn(one.rank, one.shape[1]), drawn(one.shape[0], one.rank)) for one in trainer.weights}
