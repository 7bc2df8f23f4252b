"""What real rows cost: padding of training sets (C9), and tokens read to score candidates (C10)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lorasc_ds.benchmark.ours import prepared, write_model, write_rows
from lorasc_ds.benchmark.results import Result, Target, ratio
from lorasc_ds.benchmark.setting import Setting
from lorasc_ds.benchmark.steps import BATCH, MAX_LENGTH, alpaca_lengths, llama
from lorasc_ds.data import TrainingSequences
from lorasc_ds.data_report import epoch_cost
from lorasc_ds.encoded import EncodedExample, ScoredTokens
from lorasc_ds.encoding import Encoder
from lorasc_ds.evaluation import evaluate
from lorasc_ds.layout import Layout, trees_of
from lorasc_ds.sharding import Processes
from lorasc_ds.task_config import ChoiceConfig
from lorasc_ds.tasks import Task, load_task
from lorasc_ds.text_reading import TextReading

CHOICES = {"rte": "superglue/RTE", "copa": "superglue/COPA", "record": "superglue/fewglue32/ReCoRD"}
TRAINING_SETS = {  # name -> settings of the task, on released files
    "alpaca": {"name": "alpaca", "train_file": "alpaca/random_9k.json"},
    "gsm8k": {"name": "gsm8k", "data_dir": "gsm8k"},
    "rte": {"name": "rte", "data_dir": "superglue/RTE"},
    "squad": {"name": "squad", "data_dir": "squad"},
}
PATHS = ("train_file", "data_dir")
WAYS: dict[str, dict[str, Any]] = {
    "padded": {"packing": False},
    "grouped": {"packing": False, "group_by_length": True},
    "packed": {},
}


def padding(setting: Setting) -> Iterator[Result]:
    """C9: tokens that the model computes over those of sequences, in batches of 8."""
    data = setting.options.data_dir
    for name in TRAINING_SETS if data is not None else ("alpaca",):
        found = {way: computed_over_valid(setting, name, own) for way, own in WAYS.items()}
        where = "released files, GPT-2's tokens" if data is not None else "lengths in the package"
        best = min(("grouped", "packed"), key=lambda way: found[way])
        yield setting.judged(
            Result(
                "C9",
                f"tokens computed / valid, {name} ({where}): ours, {best}",
                found[best],
                target=Target("<=", 1.02),
                ours="; ".join(f"{way}: {found[way]:.3f}" for way in ("grouped", "packed")),
                peer=f"padded: {found['padded']:.3f}",
                details=found,
            )
        )


def computed_over_valid(setting: Setting, name: str, own: dict[str, Any]) -> float:
    folder = setting.fresh("padding")
    training = {"batch_size": BATCH, "max_length": 2048} | own
    data = setting.options.data_dir
    if data is None:
        model = write_model(folder, llama(32, 1024))
        file = write_rows(folder, alpaca_lengths(64 if setting.quick else 1024), 1024)
        task = {"name": "instructions", "train_file": str(file), "dev_examples": 2}
        training |= {"max_length": MAX_LENGTH}
    else:
        tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "gpt2")
        model = write_model(folder, llama(32, len(tokenizer)))
        tokenizer.save_pretrained(model)
        task = {key: str(data / value) if key in PATHS else value for key, value in TRAINING_SETS[name].items()}
        training |= {"max_length": MAX_LENGTH} if name == "alpaca" else {}
    preparation = prepared(model, {"task": task, "training": training})
    assert isinstance(preparation.data, TrainingSequences)
    assert isinstance(preparation.reading, TextReading)
    cost = epoch_cost(preparation.data, preparation.data.order(0).tolist(), preparation.reading.layout)
    return cost.computed / cost.valid


def rows_of(name: str, data: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Task, Sequence[EncodedExample]]:
    """The test rows of a task, as tokens; of ReCoRD those with three candidates or more."""
    task = load_task(ChoiceConfig.model_validate({"name": name, "data_dir": str(data / CHOICES[name])}), 0, ("test",))
    encoder = Encoder(tokenizer, task, max_length=None, model_limit=4096, vocabulary_size=len(tokenizer))
    examples = encoder.encode()["test"]
    return task, [one for one in examples if name != "record" or len(one.candidates) > 2]


def made_up(prompt: int, answer: int, candidates: int, count: int, vocabulary: int = 500) -> list[EncodedExample]:
    """Questions of so many tokens, each with candidates of so many."""
    generator = torch.Generator().manual_seed(0)

    def drawn(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocabulary, (length,), generator=generator).tolist())

    found = []
    for number in range(count):
        start = drawn(prompt)
        answers = tuple(ScoredTokens(start + drawn(answer), answer) for _ in range(candidates))
        found.append(EncodedExample(str(number), answers, (0,)))
    return found


def tokens(examples: Sequence[EncodedExample]) -> tuple[int, int]:
    """What the model reads where beginnings are shared, and candidate by candidate."""
    shared = sum(tree.size for e in examples for tree in set(trees_of(e.candidates, True).values()))
    return shared, sum(len(candidate.ids) for e in examples for candidate in e.candidates)


def score(model: PreTrainedModel, task: Task, examples: Sequence[EncodedExample], shared: bool) -> None:
    """One evaluation; candidate by candidate each is a question of its own, so that nothing is shared."""
    if not shared:
        examples = [EncodedExample(e.id, (candidate,), (0,)) for e in examples for candidate in e.candidates]
    layout, processes = Layout(0, share_prefixes=shared), Processes(0, 1, model.device)
    evaluate(model, task, {"test": examples}, batch_size=8, layout=layout, processes=processes)


def prefixes(setting: Setting) -> Iterator[Result]:
    """C10: tokens read, and the time, of candidates one by one over those with a shared beginning."""
    data, count = setting.options.data_dir, 2 if setting.quick else 24
    cases: dict[str, tuple[Task, Sequence[EncodedExample]]] = {}
    if data is None:
        task = Task("made up", "candidates", "classification", {}, "accuracy")
        for shape in ((80, 25, 4), (700, 5, 4)):
            cases["{} + {} tokens, {} candidates".format(*shape)] = (
                task,
                made_up(*shape, count=1 if setting.quick else 8),
            )
    else:
        tokenizer = AutoTokenizer.from_pretrained(data / "models" / "stories260K")
        for name in CHOICES:
            task, examples = rows_of(name, data, tokenizer)
            cases[name] = task, examples[:count]
    torch.manual_seed(0)
    architecture = llama(32 if setting.quick else 256, 512)
    architecture.max_position_embeddings = 4096
    model = LlamaForCausalLM(architecture).eval().to(setting.device)  # type: ignore[arg-type]
    for name, (task, examples) in cases.items():
        shared, apart = tokens(examples)
        title = f"tokens read to score candidates, {name}: one by one / shared"
        yield Result("C10", title, apart / shared, target=Target(">=", 2.0), ours=str(shared), peer=str(apart))
        seconds = setting.in_turns(
            {
                "ours": lambda: score(model, task, examples, True),  # noqa: B023 (called within the turn)
                "one by one": lambda: score(model, task, examples, False),  # noqa: B023
            }
        )
        yield ratio("C10", f"time of it, {name}", seconds, ("one by one", "ours"))
