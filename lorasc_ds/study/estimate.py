"""What a study would take, from the plans of `--dry_run`: one for all runs that differ in nothing that costs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from statistics import fmean

from lorasc_ds import models
from lorasc_ds.dry_run import readable as readable_bytes
from lorasc_ds.duration import Scored, readable, run_seconds, scoring_seconds
from lorasc_ds.evaluate_options import EvaluateOptions
from lorasc_ds.evaluator import read
from lorasc_ds.image_reading import ImageReading
from lorasc_ds.memory import FREE_SHARE, memory_plan
from lorasc_ds.preparation import Preparation, prepare
from lorasc_ds.study.options import evaluation_of
from lorasc_ds.study.plan import Run
from lorasc_ds.study.records import Record
from lorasc_ds.study.study_config import StudyConfig
from lorasc_ds.subject import Subject

FREE = ("training.learning_rate", "training.seed", "cascade.slow_retention", "cascade.noise_intensity")  # of cost


def estimate(study: StudyConfig, records: Sequence[Record], gpu_memory: int, at_once: int) -> Iterator[str]:
    """Hours and memory of the runs that are not done, by what they cost; and what those that are done took.

    Args:
        gpu_memory: bytes that the GPU has.
        at_once: runs at a time on this machine.
    """
    by_digest = [*{one.run.digest: one for one in records}.values()]
    alike: dict[str, list[Record]] = {}
    for one in by_digest:
        alike.setdefault(cost_of(one.run), []).append(one)
    total, most = 0.0, 0
    taken, planned = 0.0, 0.0  # by the runs that are done: seconds here, and those of the estimate
    known, unknown = 0.0, 0.0  # of those to do: seconds here where like ones are done, else those of the estimate
    yield f"{'runs':>6}  {'to do':>6}  {'each':>8}  {'memory':>8}  like"
    scorings: dict[str, float] = {}
    for group in alike.values():
        preparation = prepare(group[0].run.config)
        each, memory = sum(run_seconds(preparation)), memory_plan(preparation, {}).device
        evaluation = evaluation_of(study, group[0].run)
        if evaluation is not None:
            asked = f"{preparation.model} {evaluation}"  # that of which the time depends
            if asked not in scorings:
                scorings[asked] = evaluation_seconds(preparation, evaluation)
            each += scorings[asked]
        todo = sum(one.state != "done" for one in group)
        seconds = [one.facts["seconds"] for one in group if one.facts and one.kept is None]
        taken, planned = taken + sum(seconds), planned + each * len(seconds)
        known, unknown = (known + todo * fmean(seconds), unknown) if seconds else (known, unknown + todo * each)
        total, most = total + todo * each, max(most, memory)
        yield (
            f"{len(group):>6}  {todo:>6}  {readable(each):>8}  {readable_bytes(memory):>8}  {group[0].run.title}"
            f"{f' ({fmean(seconds):.0f} s measured)' if seconds else ''}"
        )
    fits = "fits" if most <= (1 - FREE_SHARE) * gpu_memory else "too much"
    apart = [
        *(["tasks of lm-evaluation-harness"] if study.evaluate.get("harness_tasks") else []),
        *(["inspections of the ledger"] if study.inspect else []),
    ]
    without = f"; {' and '.join(apart)} not counted" if apart else ""
    yield f"time      about {readable(total)} on one H100, one run after the other, an estimate{without}"
    here = f"about {readable((known + unknown * taken / planned) / at_once)}" if taken else "not known"
    done = sum(one.state == "done" for one in by_digest)
    yield f"          {here} here, {at_once} at a time, by the {done} runs done"
    yield f"memory    up to {readable_bytes(most)} of {readable_bytes(gpu_memory)} in one process: {fits}"
    if study.deepspeed:
        yield f"          with nothing cut up; of {study.deepspeed}: launch/train.py --dry_run --gpus N"


def evaluation_seconds(preparation: Preparation, evaluation: EvaluateOptions) -> float:
    """Of all tasks that are scored once a run is trained; the data are read for it.

    Raises:
        ConfigError, DataError: what `launch/evaluate.py` would refuse.
    """
    if not evaluation.tasks:
        return 0.0
    model, reading = preparation.model, preparation.reading
    classes = (reading.outputs or None) if isinstance(reading, ImageReading) else None
    shape = models.load_shape(model)
    tasks = (read(config, evaluation, Subject("a run", model, classes=classes), shape) for config in evaluation.tasks)
    return sum(
        scoring_seconds(Scored(shape, model.dtype, of.task, of.reading, [*of.reading.splits], evaluation.batch_size))
        for of in tasks
    )


def cost_of(run: Run) -> str:
    """Equal for runs that take the same time and memory."""
    kept = sorted(flag for flag in run.flags if flag.removeprefix("--").split("=")[0] not in FREE)
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()
