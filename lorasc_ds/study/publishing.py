"""What is kept of a study beside its tables: every run on a line, by what it was computed, what it got right."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorasc_ds.algorithm.files import write_atomically
from lorasc_ds.errors import ConfigError
from lorasc_ds.robustness_report import Sheet
from lorasc_ds.study.plan import Run
from lorasc_ds.study.records import Outcomes, Record
from lorasc_ds.study.worker import Job

RESULTS = "results.jsonl"


@dataclass(frozen=True, slots=True)
class Published:
    """The content of a `results.jsonl` and of the files beside it.

    Args:
        lines: digest of a run -> its line, but for those that are not there yet.
        outcomes: digest -> score -> example -> its metric.
        environments: by what the runs were computed, by their ids.
    """

    file: Path
    lines: Mapping[str, Mapping[str, Any]]
    outcomes: Mapping[str, Mapping[str, Outcomes]]
    environments: Mapping[str, Mapping[str, Any]]

    def record(self, run: Run, job: Job) -> Record:
        """The record of a run as it was kept; missing where it was not, or not all that the job asks for."""
        line = self.lines.get(run.digest, {"state": "missing"})
        if line["state"] != "done":
            return Record(run, job, line["state"], line.get("exit_code"), line.get("message", ""))
        if (job.evaluate is not None and line.get("evaluation") != job.evaluation.name) or (
            job.inspect and "experts" not in line
        ):
            return Record(run, job, "missing")
        return Record(
            run,
            job,
            "done",
            0,
            "",
            dev=numbers(line.get("dev")),
            scores=numbers(line["scores"]),
            facts=line["facts"],
            environment=self.environments[line["environment"]] if "environment" in line else None,
            experts=line.get("experts"),
            kept=self.outcomes[run.digest],
        )


def load(file: Path, flag: str) -> Published:
    """
    Args:
        flag: that names the file, for the message.

    Raises:
        ConfigError: the file or one beside it cannot be read.
    """
    try:
        text = file.read_text()  # before the files beside it, of which `publish` leaves out nothing that stands in here
        environments, examples = beside(file.parent)
        lines, outcomes = {}, {}
        for line in map(json.loads, text.splitlines()):
            if line["state"] == "missing":
                continue
            digest, needed = line["digest"], {"scores", "facts"} if line["state"] == "done" else set()
            if not needed <= line.keys() or line.get("environment") not in (None, *environments):
                raise ValueError(f"the run {digest} is not whole")
            lines[digest] = line
            outcomes[digest] = {
                score: dict(zip(examples[ids], map(float, values), strict=True))
                for score, (ids, values) in line.get("outcomes", {}).items()
            }
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(
            f"{flag} {file}: cannot be read ({type(error).__name__}: {error}): a results.jsonl of launch/study.py is"
            " needed, with its environments.json and examples.json"
        ) from None
    return Published(file, lines, outcomes, environments)


def publish(folder: Path, title: str, records: Sequence[Record]) -> Published:
    """Write `results.jsonl`, a line for every run in the order of the plan, `environments.json` and `examples.json`.

    A line's `environment` is the id of what it was computed by. Its `outcomes` are those of every score that is a mean
    over examples: the id of their list, and a value for each, as text where all are 0 or 1. Killed at any point, this
    leaves what can be read: what the lines name is there before them, and what they named goes after them.
    """
    environments = {id_of(one): one for one, _ in environments_of(records)}
    examples: dict[str, Sequence[str]] = {}
    lines = [strict_json(line_of(one, examples)) for one in records]

    def write(environments: Mapping[str, Any], examples: Mapping[str, Any]) -> None:
        content = json.dumps({"study": title, "environments": environments}, indent=1)
        write_atomically(folder / "environments.json", f"{content}\n".encode())
        write_atomically(folder / "examples.json", f"{strict_json({'study': title, 'examples': examples})}\n".encode())

    if (folder / RESULTS).exists():
        before = beside(folder)
        write(before[0] | environments, before[1] | examples)
    else:
        write(environments, examples)
    write_atomically(folder / RESULTS, "".join(f"{line}\n" for line in lines).encode())
    write(environments, examples)
    return load(folder / RESULTS, "--output_dir")


def beside(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The environments and the lists of examples, by their ids."""
    environments = json.loads((folder / "environments.json").read_text())["environments"]
    return environments, json.loads((folder / "examples.json").read_text())["examples"]


def id_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def strict_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False)


def environments_of(records: Sequence[Record]) -> list[tuple[Mapping[str, Any], int]]:
    """The different ones, with the number of their runs."""
    every = [one.environment for one in {one.run.digest: one for one in records}.values() if one.environment]
    distinct = [one for at, one in enumerate(every) if one not in every[:at]]
    return [(one, every.count(one)) for one in distinct]


def line_of(record: Record, examples: dict[str, Sequence[str]]) -> dict[str, Any]:
    """Without what a run does not have.

    Args:
        examples: lists by their ids; grows.
    """
    line = {
        "task": record.run.task,
        **asdict(record.run.row),
        "choice": dict(record.run.choice),
        "seed": record.run.seed,
        "digest": record.run.digest,
        "state": record.state,
        "exit_code": record.exit_code or None,
        "message": record.message or None,
        "dev": texts_or_numbers(record.dev),
        "scores": texts_or_numbers(record.scores),
        "outcomes": outcomes_of(record, examples) or None,
        "experts": record.experts,
        "evaluation": None if record.job.evaluate is None else record.job.evaluation.name,
        "facts": record.facts,
        "environment": id_of(record.environment) if record.environment else None,
    }
    return {key: value for key, value in line.items() if value is not None}


def texts_or_numbers(scores: Mapping[str, float] | None) -> dict[str, float | str] | None:
    """JSON has no number for what is not finite."""
    return None if scores is None else {key: one if math.isfinite(one) else str(one) for key, one in scores.items()}


def numbers(scores: Mapping[str, float | str] | None) -> dict[str, float] | None:
    return None if scores is None else {key: float(one) for key, one in scores.items()}


def outcomes_of(record: Record, examples: dict[str, Sequence[str]]) -> dict[str, tuple[str, str | list[float | str]]]:
    found: dict[str, tuple[str, str | list[float | str]]] = {}
    for score in record.scores or ():
        outcomes = record.outcomes(score)
        if outcomes is not None:
            examples[ids := id_of([*outcomes])] = [*outcomes]
            whole = {*outcomes.values()} <= {0.0, 1.0}
            values = [*(texts_or_numbers(outcomes) or {}).values()]
            found[score] = ids, "".join(f"{one:.0f}" for one in outcomes.values()) if whole else values
    return found


def computed_by(records: Sequence[Record]) -> Sheet:
    """By what the runs were computed."""

    def row(one: Mapping[str, Any], runs: int) -> tuple[str, ...]:
        versions = ", ".join(f"{name} {version}" for name, version in (one["packages"] or {}).items())
        machine = f"{one['processor']}, threads: {one['threads']}"
        return str(runs), str(one["commit"]), machine, f"Python {one['python']}, {versions}"

    rows = tuple(row(*each) for each in environments_of(records))
    return Sheet("computed by", ("runs", "commit", "processor", "versions"), rows)
