"""What the runs of a study came to, read from their directories."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from lorasc_ds.algorithm.files import sha256_of_file
from lorasc_ds.run_directory import state_of
from lorasc_ds.study.plan import Run
from lorasc_ds.study.worker import Job, is_complete

DIVERGED = 3  # exit code
State = Literal["done", "failed", "missing"]
Outcomes = Mapping[str, float]  # example -> its metric
ENVIRONMENT = ("commit", "python", "processor", "threads", "packages")  # what a run is computed by


@dataclass(frozen=True, slots=True)
class Record:
    """A run and what came of it.

    Args:
        message: why it failed.
        dev: metric -> value on dev: all that selection may see.
        scores: SPLIT/METRIC -> value of what is reported, dev left out.
        facts: digests, time, memory.
        environment: commit, versions, machine.
        kept: score -> its outcomes, where the record was read from a `results.jsonl`.
    """

    run: Run
    job: Job
    state: State
    exit_code: int | None = None
    message: str = ""
    dev: Mapping[str, float] | None = None
    scores: Mapping[str, float] | None = None
    facts: Mapping[str, Any] | None = None
    environment: Mapping[str, Any] | None = None
    kept: Mapping[str, Outcomes] | None = None

    def score(self, name: str) -> float | None:
        """Of `A` or `A - B`, where each is `SPLIT/METRIC`; dev may be reported, too."""
        every = {**{f"dev/{metric}": value for metric, value in (self.dev or {}).items()}, **(self.scores or {})}
        values = [every.get(part.strip()) for part in name.split(" - ")]
        known = [value for value in values if value is not None]
        return None if len(known) < len(values) else known[0] - sum(known[1:])

    def outcomes(self, name: str) -> Outcomes | None:
        """The metric of every example by its id; None where it is not one of examples."""
        if self.kept is not None:
            return self.kept.get(name)
        *task, split, metric = name.split("/")
        if task:
            return of_evaluation(self.job.evaluation / "records.jsonl", "/".join(task), split, metric)
        return of_run(self.job.directory / "examples.json", split, metric)


def read(run: Run, job: Job) -> Record:
    """The record of a run, whatever became of it."""
    directory, ended = job.directory, content_of(job.directory.with_suffix(".json"))
    whole = state_of(directory) == "done" and (directory / "summary.json").exists()
    whole = (
        whole and (job.evaluate is None or is_complete(job.evaluation)) and (not job.inspect or job.inspection.exists())
    )
    if whole:
        summary = json.loads((directory / "summary.json").read_text())
        found = content_of(directory / "environment.json")
        environment = {key: found.get(key) for key in ENVIRONMENT}
        dev, scores, facts = summary["eval"]["dev"], scores_of(job, summary), facts_of(job, summary)
        return Record(run, job, "done", 0, "", dev, scores, facts, environment)
    status = content_of(directory / "status.json")
    if ended.get("exit_code"):
        return Record(run, job, "failed", ended["exit_code"], ended["message"])
    if status.get("state") == "failed":  # a job of Slurm's
        return Record(run, job, "failed", status["exit_code"], status["message"])
    return Record(run, job, "missing")


def content_of(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def scores_of(job: Job, summary: Mapping[str, Any]) -> dict[str, float]:
    """Every score but those on dev, as `StudyConfig.scores` names them."""
    splits = {split: metrics for split, metrics in summary["eval"].items() if split != "dev"}
    found = flat(splits)
    if job.evaluate is not None:
        result = content_of(job.evaluation / "summary.json")
        for task, one in result["tasks"].items():
            found |= flat({f"{task}/{split}": metrics for split, metrics in one["metrics"].items()})
        found |= flat(result["harness"])
    if job.inspect:
        last = content_of(job.inspection)["mean"][-1]
        found |= {f"ledger/{key}": value for key, value in last.items() if isinstance(value, int | float)}
    return found | training_loss(job.directory)


def flat(splits: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"{split}/{metric}": value for split, metrics in splits.items() for metric, value in metrics.items()}


def training_loss(directory: Path) -> dict[str, float]:
    """`train/loss`, the mean of the recorded losses of the last epoch, where there are any."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    steps = [one for one in map(json.loads, lines) if one["event"] == "step"]
    last = [one["loss"] for one in steps if one["epoch"] > steps[-1]["epoch"] - 1]
    return {"train/loss": fmean(last)} if last else {}


def facts_of(job: Job, summary: Mapping[str, Any]) -> dict[str, Any]:
    ledger, timing = job.directory / "ledger" / "ledger.json", summary["timing"]
    return {
        "weights_sha256": summary["weights_sha256"],
        "ledger_sha256": sha256_of_file(ledger) if ledger.exists() else None,
        "steps": summary["steps"],
        "experts": summary["experts"],
        "device": summary["device"],
        "world_size": summary["world_size"],
        "seconds": content_of(job.directory.with_suffix(".json")).get("seconds", timing["train_seconds"]),
        "peak_memory_bytes": timing["peak_memory_bytes"],
    }


@cache
def of_run(file: Path, split: str, metric: str) -> Outcomes | None:
    """From `examples.json` of a run."""
    found = content_of(file).get(split, {})
    return dict(zip(found["id"], found[metric], strict=True)) if metric in found else None


@cache
def of_evaluation(file: Path, task: str, split: str, metric: str) -> Outcomes | None:
    """From `records.jsonl` of an evaluation."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    mine = [row for row in rows if (row["task"], row.get("split")) == (task, split) and metric in row["metrics"]]
    return {row["id"]: row["metrics"][metric] for row in mine} or None
