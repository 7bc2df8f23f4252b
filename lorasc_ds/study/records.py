"""What the runs of a study came to, read from their directories."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from lorasc_ds.algorithm.files import sha256_of_file
from lorasc_ds.run_directory import state_of
from lorasc_ds.study.plan import Run
from lorasc_ds.study.worker import Job, is_complete

OF_EXPERTS = ("expert", "bound", "effective_rank", "stable_rank", "numerical_rank")  # `inspection_rows.Row`
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
        facts: digests, time, memory, the signs that it warned of (`warning_signs.Sign`).
        environment: commit, versions, machine.
        experts: measure of the ledger -> its value after every expert that was looked at; None: not inspected.
        kept: score -> its outcomes, where the record was read from a `results.jsonl` and not from the run's directory.
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
    experts: Mapping[str, Sequence[float]] | None = None
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
            metrics = metrics_of_evaluation(self.job.evaluation / "records.jsonl").get(("/".join(task), split), {})
            return {example: of_one[metric] for example, of_one in metrics.items() if metric in of_one} or None
        found = examples_of_run(self.job.directory / "examples.json").get(split, {})
        return dict(zip(found["id"], found[metric], strict=True)) if metric in found else None


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
        dev, scores, facts = summary["eval"].get("dev"), scores_of(job, summary), facts_of(job, summary)
        return Record(run, job, "done", 0, "", dev, scores, facts, environment, experts_of(job))
    status = content_of(directory / "status.json")
    if ended.get("exit_code"):
        return Record(run, job, "failed", ended["exit_code"], ended["message"])
    if status.get("state") == "failed":  # and what was to write the other was killed
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
    return found


def experts_of(job: Job) -> dict[str, list[float]] | None:
    """What an inspection measured of the total update after every expert, means over the weights."""
    rows = content_of(job.inspection)["mean"] if job.inspect else None
    return None if rows is None else {key: [row[key] for row in rows] for key in OF_EXPERTS}


def flat(splits: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"{split}/{metric}": value for split, metrics in splits.items() for metric, value in metrics.items()}


def facts_of(job: Job, summary: Mapping[str, Any]) -> dict[str, Any]:
    ledger, timing = job.directory / "ledger" / "ledger.json", summary["timing"]
    return {
        "weights_sha256": summary["weights_sha256"],
        "ledger_sha256": sha256_of_file(ledger) if ledger.exists() else None,
        "steps": summary["steps"],
        "experts": summary["experts"],
        "device": summary["device"],
        "world_size": summary["world_size"],
        "warnings": [one["sign"] for one in summary["warnings"]],
        "seconds": content_of(job.directory.with_suffix(".json")).get("seconds", timing["train_seconds"]),
        "peak_memory_bytes": timing["peak_memory_bytes"],
    }


@cache
def examples_of_run(file: Path) -> dict[str, Any]:
    """Split -> ids and metrics, each a list, from `examples.json` of a run."""
    return content_of(file)


@cache
def metrics_of_evaluation(file: Path) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """Task and split -> example -> its metrics, from `records.jsonl` of an evaluation."""
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in map(json.loads, file.read_text().splitlines()) if file.exists() else ():
        found.setdefault((row["task"], row.get("split")), {})[row["id"]] = row["metrics"]
    return found
