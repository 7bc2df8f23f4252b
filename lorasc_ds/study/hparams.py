"""A study in TensorBoard's hparams view: a session for every run, those that differ in the seed alone as one group."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasc_ds.study.plan import Run, short, text_of
from lorasc_ds.study.records import Record
from lorasc_ds.study.results import Results, score_of

TIME = 0.0  # of all events, so that the same runs give the same bytes


def write(folder: Path, results: Results) -> None:
    """Write `tensorboard/`: what varies and what is measured, and a session in a folder of its own for every run.

    The metrics are the study's scores and what dev selects by, as the tables name them; runs that failed are left out.
    """
    from tensorboard.plugins.hparams.summary_v2 import Discrete, HParam, Metric, hparams_config_pb, hparams_pb
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb

    shutil.rmtree(folder, ignore_errors=True)
    cells = results.cells.values()
    done = {one.run.digest: one for cell in cells for one in cell.every if one.state == "done"}
    settings = {digest: settings_of(one.run) for digest, one in done.items()}
    domains = {key: alike([one[key] for one in settings.values() if key in one]) for key in keys(settings.values())}
    metrics = [Metric(name, display_name=name) for name in ("dev", *results.study.scores)]
    hparams = [HParam(key, Discrete(sorted({*values.values()}))) for key, values in domains.items()]
    events(folder, [hparams_config_pb(hparams=hparams, metrics=metrics, time_created_secs=TIME)])
    for digest, one in done.items():
        values = {key: domains[key][value] for key, value in settings[digest].items()}
        group = ", ".join(f"{key} {value}" for key, value in values.items())
        scores = {name: one.score(value) for name, value in scores_of(results, one).items()}
        measured = [scalar_pb(name, value) for name, value in scores.items() if value is not None]
        session = [hparams_pb(values, trial_id=group, start_time_secs=TIME), *measured]
        events(folder / one.run.name, session)


def settings_of(run: Run) -> dict[str, Any]:
    """What tells runs of a study apart, but for the seed."""
    axes = {"task": run.task, "adapter": run.row.adapter, "strategy": run.row.strategy}
    return axes | {short(key): value for key, value in (*((run.row.sweep,) if run.row.sweep else ()), *run.choice)}


def keys(settings: Iterable[Mapping[str, Any]]) -> list[str]:
    return [*dict.fromkeys(key for one in settings for key in one)]


def alike(values: Sequence[Any]) -> dict[Any, Any]:
    """Every value as all can be given: numbers as such, or else as text."""
    numbers = all(isinstance(value, int | float) for value in values)
    return {value: float(value) if numbers else text_of(value) for value in values}


def scores_of(results: Results, record: Record) -> dict[str, str]:
    study, task = results.study, record.run.task
    dev = study.tasks[task].select_by or study.select_by
    return {"dev": dev} | {name: score_of(study, task, name) for name in study.scores}


def events(folder: Path, summaries: Sequence[Any]) -> None:
    """A file of events of step 0."""
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[attr-defined]  # protobuf makes it at import
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder.mkdir(parents=True)
    with open(folder / "events.out.tfevents.study", "wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=TIME, file_version="brain.Event:2").SerializeToString())
        for summary in summaries:
            writer.write(Event(wall_time=TIME, step=0, summary=summary).SerializeToString())
