"""Scores of one subject on many tasks: everything checked first, then the model loaded once, then task by task."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from lorasc_ds import models, robustness_report, run_directory
from lorasc_ds.classifier import ImageClassifier, make_rows, with_head
from lorasc_ds.encoding import EncodedExample, Encoder
from lorasc_ds.errors import ConfigError
from lorasc_ds.evaluate_options import EvaluateOptions
from lorasc_ds.evaluation import check_layout, evaluate
from lorasc_ds.generation import Generator
from lorasc_ds.image_reading import ImageReading, image_reading, workers_of
from lorasc_ds.layout import Layout
from lorasc_ds.preparation import Reading
from lorasc_ds.processing import processor_of
from lorasc_ds.reports import shown
from lorasc_ds.scoring import Record
from lorasc_ds.sharding import Processes, detect, failing_together, speaking_once_per_node, start
from lorasc_ds.subject import Subject, load, subject_of
from lorasc_ds.task_config import TaskConfig, TextConfig
from lorasc_ds.tasks import Example, Scores, Task, load_task
from lorasc_ds.tasks.base import Classes
from lorasc_ds.tasks.limits import limited
from lorasc_ds.text_reading import TextReading


@dataclass(frozen=True, slots=True)
class ReadTask:
    """A task with its examples as the model reads them."""

    config: TaskConfig
    task: Task
    reading: Reading

    def remarks(self) -> list[str]:
        """What is to be known of the scores, a line each."""
        return [*self.task.notes, *self.reading.losses()]


@dataclass(frozen=True, slots=True)
class Scorer:
    """The loaded subject, and how it is scored.

    Args:
        engine: what a forward pass goes through.
        network: the module in it.
        model: the Hugging Face model in that, which generates.
        records: of every example, as JSON, on the main process; None where they are not wanted.
    """

    options: EvaluateOptions
    subject: Subject
    engine: nn.Module
    network: nn.Module
    model: PreTrainedModel
    processes: Processes
    synced: bool
    records: list[str] | None

    def score(self, one: ReadTask) -> dict[str, Any]:
        """The metrics of a task by split, with what is to be known of them."""
        began = time.perf_counter()
        task, reading = one.task, one.reading
        if isinstance(reading, ImageReading):
            self.turn_to(reading)
        scores = evaluate(
            self.engine,
            task,
            reading.splits,
            batch_size=self.options.batch_size,
            layout=reading.layout,
            processes=self.processes,
            generator=self.generator(task, reading) if isinstance(reading, TextReading) else None,
            record=None if self.records is None else lambda *of: self.keep(task, *of),
        )
        return {
            "metrics": scores,
            "headline": task.headline,
            "examples": {split: len(examples) for split, examples in reading.splits.items()},
            "remarks": one.remarks(),
            "settings": one.config.model_dump(mode="json"),
            "seconds": time.perf_counter() - began,
        }

    def turn_to(self, reading: ImageReading) -> None:
        """Make the network tell the classes of a task apart, by the head that a run trained where it did."""
        network = self.network
        assert isinstance(network, ImageClassifier)
        network.turn_to(reading.classes, reading.prompts)
        if self.subject.head and network.kind == "prototypes":
            with_head(network, self.subject.head)
        else:
            make_rows(network, self.engine)

    def generator(self, task: Task, reading: TextReading) -> Generator | None:
        if task.generation is None:
            return None
        return Generator(
            self.model,
            reading.tokenizer,
            task.generation,
            layout=reading.layout,
            synced=self.synced,
            seed=self.options.seed,
        )

    def keep(self, task: Task, split: str, example: EncodedExample | Example, record: Record) -> None:
        """Remember what was found of an example."""
        assert self.records is not None
        source = example.source if isinstance(example, EncodedExample) else None
        content = {"task": task.name, "split": split, "id": example.id}
        content |= {"prediction": record.prediction, "metrics": record.metrics}
        content |= {"gold": list(example.gold) if source is None else list(source.references)}
        content |= {"scores": record.scores} if record.scores else {}
        content |= {"loss": record.loss / record.count} if record.count else {}
        self.records.append(json.dumps(content, ensure_ascii=False) + "\n")


def evaluate_all(options: EvaluateOptions) -> None:
    """Score what is asked for; print tables and write `summary.json`.

    Raises:
        RunError, LedgerError: in one line; what was finished before is in the folder, which says `complete: false`.
    """
    if not sys.stderr.isatty():
        disable_progress_bar()
    with speaking_once_per_node(lambda: False):
        launch = detect(options.deepspeed)
        subject = subject_of(options)
        shape = models.load_shape(subject.model)
        tasks = [read(config, options, subject, shape) for config in options.tasks]
    accelerator = start(
        launch, micro_batch_size=1, accumulation=1, max_grad_norm=None, timeout_seconds=options.ddp_timeout
    )
    processes = Processes(launch.rank, launch.world_size, accelerator.device)
    with (
        failing_together(launch.rank, launch.world_size, lambda message, code: None),
        results_in(options.output_dir) if processes.main else nullcontext() as folder,
    ):
        if processes.main:
            print(f"subject   {subject.description}, {subject.model.dtype}, {launch.world_size} processes", flush=True)
        model, network, engine = load(subject, launch, accelerator, tasks[0].reading if tasks else None)
        candidates = next((one.reading.layout for one in tasks if one.task.kind == "candidates"), None)
        if isinstance(candidates, Layout):
            check_layout(engine, candidates, processes.device)
        records: list[str] | None = [] if options.records else None
        synced = launch.stage == 3
        scorer = Scorer(options, subject, engine, network, model, processes, synced, records)
        theirs = harness_scores(scorer) if options.harness.tasks else {}
        summary = {**described(subject, options, launch.world_size, launch.stage), "harness": theirs, "tasks": {}}
        for one in tasks:
            summary["tasks"][one.config.name] = told(one, scorer.score(one), processes.main)
            if folder is not None:  # a later task may fail
                write(folder, summary, records)
        if folder is not None:
            write(folder, summary | {"complete": True}, records)
            print(table(summary["tasks"], theirs))
            robustness_report.tell(folder, summary)
            print(f"written   {options.output_dir}")
    accelerator.end_training()


def harness_scores(scorer: Scorer) -> Scores:
    """The metrics of the tasks of lm-evaluation-harness that are asked for."""
    from lorasc_ds import harness  # an extra, and slow to import

    options, records = scorer.options, scorer.records

    def keep(task: str, record: dict[str, Any]) -> None:
        assert records is not None
        records.append(json.dumps({"task": task} | record, ensure_ascii=False) + "\n")

    return harness.score(
        scorer.model,
        models.load_tokenizer(scorer.subject.model),
        options.harness.tasks,
        processes=scorer.processes,
        batch_size=options.batch_size,
        include_path=options.harness.include_path,
        shots=options.harness.shots,
        limit=options.limit,
        sharded=scorer.synced,
        say=lambda line: print(f"          {line}", flush=True),
        record=None if records is None else keep,
    )


def read(config: TaskConfig, options: EvaluateOptions, subject: Subject, shape: PreTrainedModel) -> ReadTask:
    """Read a task, of the splits that are scored."""
    task = load_task(config, options.seed, options.splits)
    chosen = [split for split in options.splits if split in task.splits]
    if not chosen and options.splits == ("test",):  # files of one's own have no split of that name
        chosen = task.evaluation_splits
    if not chosen:
        known = ", ".join(task.splits) or "dev or test"
        raise ConfigError(f"--splits {','.join(options.splits)}: task {task.name} has no such split; give {known}")
    if "train" in chosen and getattr(config, "streaming", False):
        raise ConfigError(f"--splits train: {config.name}.streaming is true; give --{config.name}.streaming false")
    task = replace(task, splits={split: limited(task.splits[split], options.limit) for split in chosen})
    if task.classes is not None:
        workers = workers_of(options.data_workers)
        scored = replace(task.classes, train_head=False)
        if subject.head:
            check_head(subject, scored)
        reading: Reading = image_reading(subject.model, task, scored, shape, options.seed, workers, subject.classes)
        return ReadTask(config, task, reading)
    encoder = Encoder(
        models.load_tokenizer(subject.model),
        task,
        max_length=options.max_lengths[config.name],
        model_limit=models.longest_sequence(shape),
        vocabulary_size=models.vocabulary_size(shape),
        block_size=config.block_size if isinstance(config, TextConfig) else None,
        processor=processor_of(subject.model, shape),
    )
    shares = options.share_prefixes and encoder.pixels is None and models.takes_attention_bias(shape)
    layout = Layout(encoder.pad_id, shares, pixels=encoder.pixels)
    return ReadTask(config, task, TextReading(encoder, encoder.encode(), layout))


def check_head(subject: Subject, classes: Classes) -> None:
    """
    Raises:
        ConfigError: the run trained its head for other classes.
    """
    trained = len(subject.head["weight"])
    if trained != len(classes.names):
        raise ConfigError(
            f"--tasks: the head of {subject.description} was trained for {trained} classes, and a task has"
            f" {len(classes.names)}: leave it out"
        )


def told(one: ReadTask, result: dict[str, Any], main: bool) -> dict[str, Any]:
    """The result of a task, after a line on each of its remarks."""
    if main:
        print(f"task      {one.config.name}: {result['seconds']:.1f} s", flush=True)
        print("".join(f"          {line}\n" for line in result["remarks"]), end="", flush=True)
    return result


def described(subject: Subject, options: EvaluateOptions, world_size: int, stage: int | None) -> dict[str, Any]:
    """What was scored, and how."""
    return {
        "subject": options.subject,
        "description": subject.description,
        "model": subject.model.model_dump(mode="json"),
        "expert": None if subject.run is None else subject.run.expert,
        "batch_size": options.batch_size,
        "limit": options.limit,
        "seed": options.seed,
        "world_size": world_size,
        "zero_stage": stage,
        "environment": run_directory.environment(),
        "complete": False,
    }


@contextmanager
def results_in(directory: Path) -> Iterator[Path]:
    """A new folder for the results; gone again where an error comes before the first of them.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        directory.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {directory}: {error.strerror}; give a folder that can be made") from error
    try:
        yield directory
    finally:
        if not any(directory.iterdir()):
            directory.rmdir()


def write(folder: Path, summary: dict[str, Any], records: list[str] | None) -> None:
    run_directory.write_json(folder / "summary.json", summary)
    if records is not None:
        (folder / "records.jsonl").write_text("".join(records), encoding="utf-8")


def table(tasks: dict[str, dict[str, Any]], theirs: Scores) -> str:
    """Every task, split and metric; the groups are in `summary.json` alone."""
    rows = [
        (name, split, str(result["examples"][split]), metric, shown(metric, value))
        for name, result in tasks.items()
        for split, metrics in result["metrics"].items()
        for metric, value in metrics.items()
        if "/" not in metric
    ]
    rows += [(name, "-", "-", m, shown(m, value)) for name, metrics in theirs.items() for m, value in metrics.items()]
    head = ("task", "split", "examples", "metric", "value")
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return "\n".join(
        f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:<{widths[3]}}  {e:>{widths[4]}}"
        for a, b, c, d, e in (head, *rows)
    )
