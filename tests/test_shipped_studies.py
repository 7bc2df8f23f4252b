"""The studies in launch/studies: each is whole, and every row of the paper's is trained and scored."""

from __future__ import annotations

import importlib
import math
import os
import shutil
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
from recipe_cases import FOLDER, TinyModels, config_of, files_of, photographs

from lorasc_ds.study.options import StudyOptions, load_study, parse_options
from lorasc_ds.study.records import read as read_record
from lorasc_ds.study.study import job_of
from lorasc_ds.study.study_config import StudyConfig
from lorasc_ds.study.worker import perform
from lorasc_ds.tasks.mce import ALEXNET, SEVERITIES

STUDIES = FOLDER.parent / "studies"
PAPER_STUDIES = ["table1", "table2", "table3", "table4", "figure2", "rank_growth", "noise", "retention"]
ROBUSTNESS = importlib.import_module("lorasc_ds.tasks.robustness")  # the package has a function of this name
LONG = pytest.mark.skipif("LORASC_LONG" not in os.environ, reason="1250 experts take minutes: see .ci/long")


@pytest.mark.parametrize(
    "file",
    [path for path in sorted(STUDIES.glob("*.yaml")) if path.stem not in ("table1", "table4", "figure2")],
    ids=lambda path: path.stem,
)
def test_a_shipped_study_is_whole(file: Path) -> None:
    options = parse_options([str(file)])
    assert options.runs
    assert options.output_dir == STUDIES / "results" / file.stem
    assert all(getattr(run.config.task, "dev_examples", None) != 0 for run in options.runs), "dev chooses"
    assert len(options.study.seeds) >= (5 if file.stem.endswith("-mini") or "fair" in file.stem else 3)


@pytest.mark.parametrize("name", ["fair-benchmark", "fair-benchmark-vit"])
def test_the_fair_benchmark_tries_the_same_for_every_method_at_every_budget(name: str) -> None:
    options = parse_options([str(STUDIES / f"{name}.yaml")])
    tried: dict[tuple[str, str], set[object]] = {}
    for run in options.runs:
        tried.setdefault((run.task, run.row.label), set()).add((run.choice, run.seed))
    assert len({frozenset(points) for points in tried.values()}) == 1
    assert {key for run in options.runs for key, _ in run.choice} == {"training.learning_rate"}
    assert len({run.digest for run in options.runs}) == len(options.runs), "no budget is another"


@pytest.mark.parametrize(
    ("name", "rows", "runs"),
    [("table1", 13, 12 * 3 * (5 * (3 * (2 + 3 + 9) + 1))), ("table4", 6, 0), ("figure2", 27, 0)],
)
def test_the_large_studies_of_the_paper_are_whole(name: str, rows: int, runs: int) -> None:
    """One seed and one rate of a few thousand runs; the number of all of them is by hand."""
    file = STUDIES / f"{name}.yaml"
    options = parse_options([str(file), "--seeds=0", "--training.learning_rate=1e-4"])
    assert len({run.row.label for run in options.runs}) == rows
    assert not runs or 15 * len(options.runs) == runs


def robustness_sets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sets where Table 3's study looks for them from `folder`, as if ImageNet had two classes, the photographs'."""
    photographs(folder)
    held_out, data = folder / "val", folder / "data"
    wordnet_ids = sorted(path.name for path in held_out.iterdir())
    monkeypatch.setattr(ROBUSTNESS, "WORDNET_IDS", wordnet_ids)
    monkeypatch.setattr(ROBUSTNESS, "SUBSETS", dict.fromkeys(ROBUSTNESS.SUBSETS, (0, 1)))
    for corruption, severity in product(ALEXNET, SEVERITIES):
        (data / "imagenet-c" / corruption).mkdir(parents=True, exist_ok=True)
        (data / "imagenet-c" / corruption / str(severity)).symlink_to(held_out)
    for name in ("imagenet-r", "imagenet-a", "sketch", "imagenet-stylized"):
        (data / name).symlink_to(held_out)
    for number, wordnet_id in enumerate(wordnet_ids):  # as V2's classes are called
        shutil.copytree(held_out / wordnet_id, data / "imagenetv2" / str(number))


def by_task(file: Path, study: StudyConfig, model: Path, data: Path, folder: Path) -> list[StudyOptions]:
    """The study once for each of its tasks, at a rate and seed, with an epoch of one step on files in `folder`."""
    common = [str(file), "--output_dir=out", "--seeds=0", "--training.learning_rate=1e-4", "--training.warmup_steps=0"]
    common += ["--training.evaluate=end", "--training.select=last", "--training.data_workers=0"]
    found = []
    for at, (task, variant) in enumerate(study.tasks.items()):
        kind = variant.set.get("task.name", config_of(recipe=Path(study.recipe).name).task.name)
        (made := folder / f"made{at}").mkdir()
        step = 10 if kind in ("alpaca", "imagenet") else 2  # all training examples of `files_of`
        flags = [f"--tasks={task}", f"--model.name_or_path={model}", *files_of(kind, data, made)]
        flags += [f"--training.batch_size={step}", f"--training.micro_batch_size={step}"]
        flags += ["--task.templates=simple" if kind == "imagenet" else "--training.max_length=288"]
        found.append(parse_options([*common, *flags]))
    return found


@pytest.mark.parametrize(
    ("name", "most_experts"),
    [*((name, 125) for name in PAPER_STUDIES), pytest.param("table4", 1250, marks=LONG)],
)
def test_every_row_of_a_study_of_the_paper_is_trained_and_has_its_scores(
    name: str,
    most_experts: int,
    tiny_models: TinyModels,
    shared_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With all its experts, epochs and ranks, at one point of its grid; the next row on the study's next task."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lorasc_ds.inspection.files_of", lambda figures: {})  # sixty pictures take half a minute
    file = STUDIES / f"{name}.yaml"
    study = load_study(file)
    model = tiny_models(config_of(recipe=Path(study.recipe).name).model.name_or_path)
    studies = by_task(file, study, model, shared_data, tmp_path)
    scored: dict[str, Any] = {}
    if name == "table2":
        scored = {"data_dir": str(shared_data), "limit": 1, "sandbox": "none"}
    if name == "table3":
        scored = {"data_dir": "data", "limit": 1}
        robustness_sets(tmp_path, monkeypatch)
    monkeypatch.setattr("sys.argv", [])  # which a run changes
    rows = dict.fromkeys(run.row for run in studies[0].runs)
    for row, options in zip(rows, cycle(studies), strict=False):
        run = next(run for run in options.runs if run.row == row)
        cascade, epochs = run.config.cascade, round(run.config.training.epochs)
        by_default = {"lora": 1, "cola": 2}.get(cascade.strategy, epochs)
        experts = by_default if cascade.experts is None else cascade.experts
        if (experts > 125) != (most_experts > 125):
            continue
        job = job_of(replace(options, study=study.model_copy(update={"evaluate": study.evaluate | scored})), run)
        if experts > epochs:
            job = replace(job, train=(*job.train, f"--training.max_steps={experts}"))
        assert perform(job) == 0, run.title
        record = read_record(run, job)
        assert record.state == "done"
        assert record.facts is not None
        assert (record.facts["steps"], record.facts["experts"]) == (max(experts, epochs), experts)
        variant = study.tasks[run.task]
        names = [*(variant.scores or study.scores).values(), variant.select_by or study.select_by]
        values = {score: record.score(score) for score in names}
        assert all(value is not None and math.isfinite(value) for value in values.values()), (run.title, values)
