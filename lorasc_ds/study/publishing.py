"""What is kept of a study beside its tables: every run on a line, by what it was computed, and whether others agree."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorasc_ds.algorithm.files import write_atomically
from lorasc_ds.errors import ConfigError
from lorasc_ds.robustness_report import Sheet
from lorasc_ds.study.records import Record
from lorasc_ds.study.tables import is_plain

DIGITS = 6  # of a score that is kept
COMPUTING = ("torch", "transformers", "peft", "accelerate", "numpy", "tokenizers")
DIGESTS = ("ledger_sha256", "weights_sha256")
SHARE_TOLERANCE, TOLERANCE = 0.05, 0.2  # on another processor: of shares, absolute; of all other scores, relative


def publish(folder: Path, title: str, records: Sequence[Record]) -> None:
    """Write `results.jsonl`, a line for every run in the order of the plan, and `environments.json`.

    A line's `environment` is the position of what it was computed by.
    """
    environments = environments_of(records)
    content = {"study": title, "environments": [one for one, _ in environments]}
    write_atomically(folder / "environments.json", (json.dumps(content, indent=1) + "\n").encode())
    lines = (json.dumps(line_of(one, [each for each, _ in environments]), ensure_ascii=False) for one in records)
    write_atomically(folder / "results.jsonl", "".join(f"{line}\n" for line in lines).encode())


def environments_of(records: Sequence[Record]) -> list[tuple[Mapping[str, Any], int]]:
    """The different ones, with the number of their runs."""
    every = [one.environment for one in {one.run.digest: one for one in records}.values() if one.environment]
    distinct = [one for at, one in enumerate(every) if one not in every[:at]]
    return [(one, every.count(one)) for one in distinct]


def line_of(record: Record, environments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Without what a run does not have."""
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
        **(record.facts or {}),
        "environment": environments.index(record.environment) if record.environment else None,
    }
    return {key: value for key, value in line.items() if value is not None}


def rounded(scores: Mapping[str, float] | None) -> dict[str, float] | None:
    return None if scores is None else {name: float(f"{value:.{DIGITS}g}") for name, value in scores.items()}


def sheet(records: Sequence[Record]) -> Sheet:
    """By what the runs were computed."""

    def row(one: Mapping[str, Any], runs: int) -> tuple[str, ...]:
        versions = ", ".join(f"{name} {version}" for name, version in (one["packages"] or {}).items())
        machine = f"{one['processor']}, threads: {one['threads']}"
        return str(runs), str(one["commit"]), machine, f"Python {one['python']}, {versions}"

    rows = tuple(row(*each) for each in environments_of(records))
    return Sheet("computed by", ("runs", "commit", "processor", "versions"), rows)


def disagreements(file: Path, records: Sequence[Record]) -> Iterator[str]:
    """Where runs that are done differ from the same ones of a `results.jsonl`.

    Computed alike, on the same kind of processor with as many threads and the same versions, they have the same bits,
    by the digests of ledger and weights; else shares have to be within `SHARE_TOLERANCE` of those there, and other
    scores within `TOLERANCE` of the value.

    Raises:
        ConfigError: the file has none of the runs, or cannot be read.
    """
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        environments = json.loads(file.with_name("environments.json").read_text())["environments"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--against {file}: {error}; name a results.jsonl with its environments.json") from None
    theirs = {line["digest"]: line for line in lines if line["state"] == "done"}
    common = {one.run.digest: one for one in records if one.state == "done" and one.run.digest in theirs}
    if not common:
        raise ConfigError(f"--against {file}: it has none of the runs that are done here")
    for digest, one in common.items():
        line = theirs[digest]
        computed = {**environments[line["environment"]], "device": line["device"]}
        yield from (f"{one.run.title}: {text}" for text in differences(one, line, computed))


def kind_of(environment: Mapping[str, Any]) -> tuple[Any, ...]:
    """That of which the bits depend."""
    packages = environment["packages"] or {}
    return tuple(environment[key] for key in ("device", "processor", "threads")), tuple(map(packages.get, COMPUTING))


def differences(record: Record, line: Mapping[str, Any], computed: Mapping[str, Any]) -> Iterator[str]:
    """
    Args:
        computed: what the line was computed by.
    """
    facts = record.facts or {}
    if kind_of({**(record.environment or {}), "device": facts["device"]}) == kind_of(computed):
        yield from (f"another {key}, though computed alike" for key in DIGESTS if facts[key] != line.get(key))
        return
    for name, theirs in {**{f"dev/{metric}": value for metric, value in line["dev"].items()}, **line["scores"]}.items():
        ours, bound = record.score(name), TOLERANCE * abs(theirs) if is_plain(name) else SHARE_TOLERANCE
        if ours is None or not abs(ours - theirs) <= bound:
            yield f"{name} is {ours}, not {theirs:g} give or take {bound:.2g}"
