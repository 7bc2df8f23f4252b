"""Scores of one subject on many tasks: everything checked first, then the model loaded once, then task by task."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from lorasc_ds import models, robustness_report, run_directory
from lorasc_ds.data import Layout
from lorasc_ds.encoding import EncodedExample, Encoder
from lorasc_ds.errors import ConfigError
from lorasc_ds.evaluate_options import EvaluateOptions
from lorasc_ds.evaluation import Record, check_layout, evaluate
from lorasc_ds.generation import Generator
from lorasc_ds.processing import ImageTextProcessor, processor_of
from lorasc_ds.reports import shown
from lorasc_ds.sharding import Processes, detect, failing_together, speaking_once_per_node, start
from lorasc_ds.subject import Subject, load, subject_of
from lorasc_ds.task_config import TaskConfig, TextConfig
from lorasc_ds.tasks import Scores, Task, load_task
from lorasc_ds.tasks.limits import limited


@dataclass(frozen=True, slots=True)
class EncodedTask:
    """A task with its examples as tokens; the encoder knows what was cut."""

    config: TaskConfig
    encoder: Encoder
    splits: dict[str, Sequence[EncodedExample]]

    @property
    def task(self) -> Task:
        return self.encoder.task

    def remarks(self) -> list[str]:
        """What is to be known of the scores, a line each."""
        lines = list(self.task.notes)
        if self.encoder.left_out:
            lines.append(f"{self.encoder.left_out} rows are left out: cut to length, nothing in them is scored")
        lines += self.encoder.unreadable_lines()
        if self.encoder.truncated:
            lines.append(f"{self.encoder.truncated} sequences were too long and are cut")
        if self.encoder.shots_left_out:
            lines.append(f"{self.encoder.shots_left_out} demonstrations are left out of prompts that were too long")
        return lines


@dataclass(frozen=True, slots=True)
class Scorer:
    """The loaded subject, and how it is scored.

    Args:
        engine: what a forward pass goes through.
        model: the module in it, which generates.
        records: of every example, as JSON, on the main process; None where they are not wanted.
    """

    options: EvaluateOptions
    engine: nn.Module
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    processes: Processes
    layout: Layout
    synced: bool
    records: list[str] | None

    def score(self, one: EncodedTask) -> dict[str, Any]:
        """The metrics of a task by split, with what is to be known of them."""
        began = time.perf_counter()
        task = one.task
        generator = None
        if task.generation is not None:
            generator = Generator(
                self.model,
                self.tokenizer,
                task.generation,
                layout=self.layout,
                synced=self.synced,
                seed=self.options.seed,
            )
        scores = evaluate(
            self.engine,
            task,
            one.splits,
            batch_size=self.options.batch_size,
            layout=self.layout,
            processes=self.processes,
            generator=generator,
            record=None if self.records is None else lambda *of: self.keep(task, *of),
        )
        return {
            "metrics": scores,
            "headline": task.headline,
            "examples": {split: len(examples) for split, examples in one.splits.items()},
            "remarks": one.remarks(),
            "settings": one.config.model_dump(mode="json"),
            "seconds": time.perf_counter() - began,
        }

    def keep(self, task: Task, split: str, example: EncodedExample, record: Record) -> None:
        """Remember what was found of an example."""
        assert self.records is not None
        source = example.source
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
        tokenizer, shape = models.load_tokenizer(subject.model), models.load_shape(subject.model)
        processor = processor_of(subject.model, shape)
        tasks = [encoded(config, options, tokenizer, shape, processor) for config in options.tasks]
        layout = Layout(
            tasks[0].encoder.pad_id if tasks else 0,
            share_prefixes=options.share_prefixes and models.takes_attention_bias(shape),
            pixels=processor,
        )
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
        model, engine = load(subject, launch, accelerator)
        if layout.share_prefixes and any(one.task.kind == "candidates" for one in tasks):
            check_layout(engine, layout, processes.device)
        records: list[str] | None = [] if options.records else None
        synced = launch.stage == 3
        scorer = Scorer(options, engine, model, tokenizer, processes, layout, synced, records)
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
        scorer.tokenizer,
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


def encoded(
    config: TaskConfig,
    options: EvaluateOptions,
    tokenizer: PreTrainedTokenizerBase,
    shape: PreTrainedModel,
    processor: ImageTextProcessor | None,
) -> EncodedTask:
    """Read a task and tokenise the splits that are scored."""
    task = load_task(config, options.seed, options.splits)
    chosen = [split for split in options.splits if split in task.splits]
    if not chosen and options.splits == ("test",):  # files of one's own have no split of that name
        chosen = task.evaluation_splits
    if not chosen:
        known = ", ".join(task.evaluation_splits) or "dev or test"
        raise ConfigError(f"--splits {','.join(options.splits)}: task {task.name} has no such split; give {known}")
    splits = {split: limited(task.splits[split], options.limit) for split in chosen}
    encoder = Encoder(
        tokenizer,
        replace(task, splits=splits),
        max_length=options.max_lengths[config.name],
        model_limit=models.longest_sequence(shape),
        vocabulary_size=models.vocabulary_size(shape),
        block_size=config.block_size if isinstance(config, TextConfig) else None,
        processor=processor,
    )
    return EncodedTask(config, encoder, encoder.encode())


def told(one: EncodedTask, result: dict[str, Any], main: bool) -> dict[str, Any]:
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
