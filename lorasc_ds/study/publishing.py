"""What is kept of a study beside its tables: every run on a line, by what it was computed, what it got right."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorasc_ds.algorithm.files import write_atomically
from lorasc_ds.errors import ConfigError
from lorasc_ds.robustness_report import Sheet
from lorasc_ds.study.plan import Run
from lorasc_ds.study.records import Outcomes, Record
from lorasc_ds.study.results import score_of
from lorasc_ds.study.study_config import StudyConfig
from lorasc_ds.study.worker import Job

DIGITS = 6  # of a score that is kept
FACTS = ("weights_sha256", "ledger_sha256", "steps", "experts", "device", "world_size", "seconds", "peak_memory_bytes")


@dataclass(frozen=True, slots=True)
class Published:
    """The content of a `results.jsonl` and of the files beside it.

    Args:
        lines: digest of a run -> its line.
        environments, examples: what the lines' numbers stand for.
    """

    lines: Mapping[str, Mapping[str, Any]]
    environments: Sequence[Mapping[str, Any]]
    examples: Sequence[Sequence[str]]

    def record(self, run: Run, job: Job) -> Record:
        """The record of a run as it was kept; missing where it was not."""
        line = self.lines.get(run.digest, {"state": "missing"})
        if line["state"] != "done":
            return Record(run, job, line["state"], line.get("exit_code"), line.get("message", ""))
        facts = {key: line[key] for key in FACTS if key in line}
        outcomes = {score: self.outcomes(*of_score) for score, of_score in line.get("outcomes", {}).items()}
        environment = self.environment(line)
        return Record(run, job, "done", 0, "", line["dev"], line["scores"], facts, environment, outcomes)

    def outcomes(self, examples: int, values: str | Sequence[float]) -> Outcomes:
        return dict(zip(self.examples[examples], map(float, values), strict=True))

    def environment(self, line: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return self.environments[line["environment"]] if "environment" in line else None


def load(file: Path, flag: str) -> Published:
    """
    Args:
        flag: that names the file, for the message.

    Raises:
        ConfigError: the file or one beside it cannot be read.
    """
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        environments = json.loads(file.with_name("environments.json").read_text())["environments"]
        examples = json.loads(file.with_name("examples.json").read_text())["examples"]
    except (OSError, ValueError, KeyError) as error:
        message = f"{flag} {file}: {error}; name a results.jsonl with its environments.json and examples.json"
        raise ConfigError(message) from None
    return Published({line["digest"]: line for line in lines}, environments, examples)


def publish(folder: Path, study: StudyConfig, records: Sequence[Record]) -> Published:
    """Write `results.jsonl`, a line for every run in the order of the plan, `environments.json` and `examples.json`.

    A line's `environment` is the position of what it was computed by. Its `outcomes` are those of every score that the
    study reports: the position of the examples' ids, and a value for each, as text where all are 0 or 1.
    """
    environments = [one for one, _ in environments_of(records)]
    examples: dict[tuple[str, ...], int] = {}
    lines = [json.dumps(line_of(one, study, environments, examples), ensure_ascii=False) for one in records]
    computed_by = json.dumps({"study": study.title, "environments": environments}, indent=1)
    write_atomically(folder / "environments.json", f"{computed_by}\n".encode())
    ids = json.dumps({"study": study.title, "examples": [*examples]}, ensure_ascii=False)
    write_atomically(folder / "examples.json", f"{ids}\n".encode())
    write_atomically(folder / "results.jsonl", "".join(f"{line}\n" for line in lines).encode())
    return load(folder / "results.jsonl", "--output_dir")


def environments_of(records: Sequence[Record]) -> list[tuple[Mapping[str, Any], int]]:
    """The different ones, with the number of their runs."""
    every = [one.environment for one in {one.run.digest: one for one in records}.values() if one.environment]
    distinct = [one for at, one in enumerate(every) if one not in every[:at]]
    return [(one, every.count(one)) for one in distinct]


def line_of(
    record: Record,
    study: StudyConfig,
    environments: Sequence[Mapping[str, Any]],
    examples: dict[tuple[str, ...], int],
) -> dict[str, Any]:
    """Without what a run does not have.

    Args:
        examples: ids -> their position; grows.
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
        "dev": rounded(record.dev),
        "scores": rounded(record.scores),
        "outcomes": outcomes_of(record, study, examples) or None,
        **(record.facts or {}),
        "environment": environments.index(record.environment) if record.environment else None,
    }
    return {key: value for key, value in line.items() if value is not None}


def rounded(scores: Mapping[str, float] | None) -> dict[str, float] | None:
    return None if scores is None else {name: float(f"{value:.{DIGITS}g}") for name, value in scores.items()}


def outcomes_of(
    record: Record, study: StudyConfig, examples: dict[tuple[str, ...], int]
) -> dict[str, tuple[int, str | list[float]]]:
    """Of the scores that the study reports and that are means over examples."""
    found: dict[str, tuple[int, str | list[float]]] = {}
    for score in (score_of(study, record.run.task, name) for name in study.scores):
        outcomes = record.outcomes(score) if record.state == "done" else None
        if outcomes is not None:
            position = examples.setdefault(tuple(outcomes), len(examples))
            values = [float(f"{value:.{DIGITS}g}") for value in outcomes.values()]
            found[score] = position, "".join(f"{one:.0f}" for one in values) if {*values} <= {0.0, 1.0} else values
    return found


def computed_by(records: Sequence[Record]) -> Sheet:
    """By what the runs were computed."""

    def row(one: Mapping[str, Any], runs: int) -> tuple[str, ...]:
        versions = ", ".join(f"{name} {version}" for name, version in (one["packages"] or {}).items())
        machine = f"{one['processor']}, threads: {one['threads']}"
        return str(runs), str(one["commit"]), machine, f"Python {one['python']}, {versions}"

    rows = tuple(row(*each) for each in environments_of(records))
    return Sheet("computed by", ("runs", "commit", "processor", "versions"), rows)
