"""What a study says across its tasks, what is kept of it, and what TensorBoard reads, against hand-made results."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from study_cases import good, parse, written
from tensorboard import context
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

from lorasc_ds.errors import ConfigError
from lorasc_ds.robustness_report import as_markdown
from lorasc_ds.study import hparams, publishing
from lorasc_ds.study.agreement import disagreements
from lorasc_ds.study.estimate import estimate
from lorasc_ds.study.options import StudyOptions, parse_options
from lorasc_ds.study.overview import best_sheets, one_rate_sheets, stability_sheets
from lorasc_ds.study.plan import Row
from lorasc_ds.study.publishing import computed_by, environments_of, load, publish
from lorasc_ds.study.records import Record
from lorasc_ds.study.results import results_of
from lorasc_ds.study.study import carry_out, read, tables, to_do
from lorasc_ds.study.tables import score_text

Parsed = Callable[..., StudyOptions]
MACHINE = {"commit": "c", "python": "3", "processor": "a CPU", "threads": 1, "packages": {"torch": "2"}}


@pytest.fixture
def parsed(tmp_path: Path) -> Parsed:
    return partial(parse, tmp_path)


def uneven(task: str, row: str, choice: Any, seed: int) -> tuple[float, list[float]]:
    """Right of 10 at 1e-3 and 1e-2: LoRA 2 and 8, Slow 5 and 6 or 7 by seed. Dev is for LoRA on one, for Slow on two."""
    high = choice["training.learning_rate"] == 0.01
    dev = (
        0.1 * high
        + 0.5 * (row == ("LoRA" if task == "one" else "Slow"))
        - 0.05 * choice.get("cascade.slow_retention", 0)
    )
    right = (8 if high else 2) if row == "LoRA" else 6 + seed % 2 if high else 5
    return dev, [1.0] * right + [0.0] * (10 - right)


def test_stability_is_the_mean_over_the_rates_that_all_have_tried_and_the_worst(parsed: Parsed) -> None:
    options = parsed(
        change=(
            "cascade.strategy: lora}}",
            "cascade.strategy: lora}, grid: {training.learning_rate: [1e-3, 1e-2, 0.1]}}",
        )
    )
    written(options, uneven)
    new, _ = stability_sheets(results_of(options.study, read(options)))
    assert [row[:2] for row in new.rows] == [("LoRA", "50.0 ± 0.0 (worst 20.0)"), ("Slow", "56.7 ± 2.9 (worst 50.0)")]
    assert new.notes[0].endswith("the worst of them; 0.001, 0.01")


def test_stability_marks_what_differs_at_every_seed_and_example(parsed: Parsed) -> None:
    options = parsed()
    written(options, good)  # 90 to 92 of 100 against 30 and 31
    new, _ = stability_sheets(results_of(options.study, read(options)))
    assert new.rows[1][1] == "91.0 ± 1.0 (worst 91.0) ↑"


def test_stability_does_not_average_a_failed_run_away(parsed: Parsed) -> None:
    options = parsed()
    written(options, uneven)
    found = [
        replace(one, state="failed", scores=None, dev=None)
        if one.run.title == "one: LoRA, learning_rate 0.001, seed 1"
        else one
        for one in read(options)
    ]
    new, _ = stability_sheets(results_of(options.study, found))
    assert new.rows[0][1:] == ("failed 1/6", "50.0 ± 0.0 (worst 20.0)")
    assert "↑" not in new.rows[1][1]


def test_one_rate_for_all_tasks_is_that_with_the_best_mean_of_dev(parsed: Parsed) -> None:
    """Dev of one is for 1e-2 by 0.1, that of two for 1e-3 by 0.3 where it is LoRA's; of Slow as in `uneven`."""
    options = parsed()

    def opposed(task: str, row: str, choice: Any, seed: int) -> tuple[float, list[float]]:
        dev, outcomes = uneven(task, row, choice, seed)
        high = choice["training.learning_rate"] == 0.01
        return dev - 0.4 * (high and task == "two" and row == "LoRA"), outcomes

    written(options, opposed)
    (sheet,) = one_rate_sheets(results_of(options.study, read(options)))
    assert sheet.head == ("method", "learning rate", "new", "old")
    assert sheet.rows == (
        ("LoRA", "0.001†", "20.0 ± 0.0", "20.0 ± 0.0"),
        ("Slow", "0.01†", "63.3 ± 5.8 ↑", "63.3 ± 5.8 ↑"),
    )
    found = [replace(one, dev=None) if one.run.seed == 1 and "LoRA" in one.run.title else one for one in read(options)]
    assert one_rate_sheets(results_of(options.study, found)) == []
    assert one_rate_sheets(results_of((one := parsed("--tasks=one")).study, read(one))) == []


def test_the_best_method_of_a_task_is_dev_s_whatever_test_says(parsed: Parsed) -> None:
    options = parsed()
    written(options, uneven)
    (sheet,) = best_sheets(results_of(options.study, read(options)))
    assert sheet.head == ("task", "best by dev", "best but LoRA", "its new", "its old")
    one, two = sheet.rows
    assert one[:3] == ("one", "LoRA (60.0 ± 0.0)", "Slow (7.5 ± 0.0)")
    assert two[:3] == ("two", "Slow (57.5 ± 0.0)", "Slow (57.5 ± 0.0)")
    assert one[3].startswith("-16.7, p "), "63.3 against 80"


def test_the_best_method_is_told_of_a_single_task_too(parsed: Parsed) -> None:
    options = parsed("--tasks=two")
    written(options, uneven)
    (sheet,) = best_sheets(results_of(options.study, read(options)))
    assert [row[:2] for row in sheet.rows] == [("two", "Slow (57.5 ± 0.0)")]


def computed(options: StudyOptions, **changes: Any) -> list[Record]:
    return [replace(one, environment=MACHINE | changes) for one in read(options)]


def test_what_is_kept_says_by_what_it_was_computed_and_is_small(parsed: Parsed) -> None:
    options = parsed()
    written(options, good)
    found = computed(options)
    found[0] = replace(found[0], environment=MACHINE | {"commit": "d"}, scores={"new_domain/loss": 1 / 3})
    assert [runs for _, runs in environments_of(found)] == [1, len(found) - 1]
    publish(options.output_dir, "A study", found)
    lines = [json.loads(line) for line in (options.output_dir / "results.jsonl").read_text().splitlines()]
    kept = json.loads((options.output_dir / "environments.json").read_text())
    assert [kept["environments"][line["environment"]]["commit"] for line in lines[:2]] == ["d", "c"]
    assert lines[0]["scores"] == {"new_domain/loss": 1 / 3}
    assert (options.output_dir / "results.jsonl").stat().st_size < 1100 * len(found), "100 outcomes of 2 scores each"


def test_what_is_kept_is_read_back_as_it_was(parsed: Parsed) -> None:
    """Scores to the bit, also those that JSON has no number for, and of every example what it scored."""
    options = parsed()
    written(options, partial_credit)
    found = computed(options)
    strange = {**(found[0].scores or {}), "old_domain/perplexity": math.inf, "old_domain/loss": math.nan}
    ranks = {"expert": [1, 2], "effective_rank": [1.5, 2.5]}
    found[0] = replace(found[0], scores=strange, experts=ranks)
    published = publish(options.output_dir, "A study", found)
    for one in found:
        kept = published.record(one.run, one.job)
        assert replace(kept, kept=None, scores=None) == replace(one, scores=None)
        assert str(kept.scores) == str(one.scores), "nan is no number, not even itself"
        for score in ("new_domain/accuracy", "old_domain/accuracy", "new_domain/loss"):
            assert kept.outcomes(score) == one.outcomes(score)
    assert "NaN" not in (options.output_dir / "results.jsonl").read_text()
    again = published.record(found[0].run, replace(found[0].job, inspect=True))
    assert (again.state, again.experts) == ("done", ranks)


def test_who_is_killed_between_two_files_leaves_what_can_be_read(
    parsed: Parsed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results of task two, then of one and two from another commit, by a process that ends before the last file."""
    options, narrow = parsed(), parsed("--tasks=two")
    written(options, lambda task, *rest: (good(task, *rest)[0], good(task, *rest)[1][: 50 if task == "one" else 100]))
    before = publish(options.output_dir, "A study", computed(narrow))
    write = publishing.write_atomically

    def killed(file: Path, content: bytes) -> None:
        if file.name == publishing.RESULTS:
            raise KeyboardInterrupt
        write(file, content)

    monkeypatch.setattr(publishing, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(options.output_dir, "A study", computed(options, commit="d"))
    after = load(options.output_dir / "results.jsonl", "--known")
    assert (after.lines, after.outcomes) == (before.lines, before.outcomes)
    assert {one["commit"] for one in after.environments.values()} == {"c", "d"}
    monkeypatch.undo()
    whole = publish(options.output_dir, "A study", computed(options, commit="d"))
    again = [whole.record(one.run, one.job) for one in read(options)]
    assert [one.outcomes("new_domain/accuracy") for one in again] == [
        one.outcomes("new_domain/accuracy") for one in read(options)
    ]
    assert [one["commit"] for one in whole.environments.values()] == ["d"], "what nothing names is gone"


def test_a_known_run_without_what_is_asked_for_now_is_missing(parsed: Parsed) -> None:
    options = parsed()
    written(options, good)
    (first, *_) = found = read(options)
    published = publish(options.output_dir, "A study", found)
    assert published.record(first.run, first.job).state == "done"
    for job in (replace(first.job, inspect=True), replace(first.job, evaluate=("--tasks=digits",))):
        assert published.record(first.run, job).state == "missing"


def test_a_known_run_counts_where_the_same_failed_here(parsed: Parsed, tmp_path: Path) -> None:
    options = parsed()
    written(options, good)
    carry_out(replace(options, collect=True))
    broken = options.directory(options.runs[3])
    shutil.rmtree(broken)
    broken.with_suffix(".json").write_text('{"exit_code": -9, "message": "ended by SIGKILL", "seconds": 1.0}')
    known = load(options.output_dir / "results.jsonl", "--known")
    assert (read(options)[3].state, read(options, known)[3].state) == ("failed", "done")


def test_results_that_are_nowhere_else_are_not_written_over(parsed: Parsed) -> None:
    options = parsed()
    written(options, good)
    assert carry_out(options) == 0
    shutil.rmtree(options.output_dir / "runs")
    text = (options.output_dir / "results.jsonl").read_text()
    known = ("--known", str(options.output_dir / "results.jsonl"))
    for narrower in (parsed("--collect"), parsed("--tasks=one", "--collect", *known), parsed("--seeds=0,1", *known)):
        with pytest.raises(ConfigError, match=r"its results.jsonl holds \d+ finished runs that are nowhere else"):
            carry_out(narrower)
        assert (options.output_dir / "results.jsonl").read_text() == text
    assert carry_out(parsed("--collect", *known)) == 0
    assert (options.output_dir / "results.jsonl").read_text() == text


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("results.jsonl", ('"digest": ', '"digests": ')),
        ("results.jsonl", ('"scores": ', '"score": ')),
        ("results.jsonl", ('"environment": "', '"environment": "9')),
        ("results.jsonl", ('accuracy": ["', 'accuracy": ["7')),
        ("results.jsonl", ('", "1', '", "')),
        ("environments.json", ("{", "[{")),
        ("examples.json", ('"examples"', '"ids"')),
    ],
)
def test_damaged_results_are_told_in_one_line(parsed: Parsed, file: str, change: tuple[str, str]) -> None:
    options = parsed("--tasks=one", "--seeds=0,1")
    written(options, good)
    publish(options.output_dir, "A study", computed(options))
    path = options.output_dir / file
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(ConfigError, match=r"^--known .*results.jsonl: cannot be read \(.*\): a results.jsonl of "):
        load(options.output_dir / "results.jsonl", "--known")


def partial_credit(task: str, row: str, choice: Any, seed: int) -> tuple[float, list[float]]:
    """As of F1: answers that are right in part."""
    dev, outcomes = good(task, row, choice, seed)
    return dev, [one * (at % 7 + 1) / 7 for at, one in enumerate(outcomes)] if task == "one" else outcomes


def test_what_is_kept_gives_the_tables_and_figures_again_and_its_runs_need_not_be_carried_out(
    parsed: Parsed, tmp_path: Path
) -> None:
    options = parsed(change=("seeds:", "trade_off: [old, new]\nseeds:"))
    written(options, partial_credit)
    failed, missing = options.directory(options.runs[-1]), options.directory(options.runs[0])
    for directory in (failed, missing):
        shutil.rmtree(directory)
    failed.with_suffix(".json").write_text('{"exit_code": 3, "message": "error: loss is nan", "seconds": 1.0}')
    carry_out(replace(options, collect=True))
    live = results_of(options.study, read(options))
    assert as_markdown(tables(live)) in (options.output_dir / "tables.md").read_text()
    assert any(one.comparison.p_examples is not None for one in live.tested.values())
    known = options.output_dir / "results.jsonl"
    again = replace(options, known=known, collect=True, output_dir=tmp_path / "again")
    assert carry_out(again) == 1, "one failed"
    for file in sorted(options.output_dir.glob("*.*")):
        assert (again.output_dir / file.name).read_bytes() == file.read_bytes(), file.name
    assert len([*again.output_dir.glob("*.*")]) > 8
    assert [job.directory.name for job in to_do(again, read(again, load(known, "--known")))] == [missing.name], (
        "what diverged would again"
    )
    lines = (options.output_dir / "results.jsonl").read_text().splitlines()
    done = [line for line in map(json.loads, lines) if line["state"] == "done"]
    assert {type(line["outcomes"]["new_domain/accuracy"][1]) for line in done} == {list, str}


PUBLISHED = sorted((ROOT / "launch" / "studies" / "results").glob("*/results.jsonl"))


@pytest.mark.parametrize("file", PUBLISHED, ids=[file.parent.name for file in PUBLISHED])
def test_committed_tables_are_of_the_committed_results_and_none_is_missing(file: Path) -> None:
    options = parse_options([f"{file.parents[2] / file.parent.name}.yaml", "--known", str(file)])
    found = read(replace(options, output_dir=file.parent / "nothing is here"), load(file, "--known"))
    assert "missing" not in {one.state for one in found}
    assert (
        as_markdown([*tables(results_of(options.study, found)), computed_by(found)])
        == (file.parent / "tables.md").read_text()
    )


MARKED = r"<!-- (of|over the rates of|one rate of) (\S+): ([^>]+) -->\n((?:\|.*\n)+)"
TABLES_IN_README = re.findall(MARKED, (ROOT / "README.md").read_text())


@pytest.mark.parametrize(
    ("kind", "name", "scores", "table"), TABLES_IN_README, ids=[f"{kind} {name}" for kind, name, *_ in TABLES_IN_README]
)
def test_tables_of_the_readme_are_of_the_committed_results(kind: str, name: str, scores: str, table: str) -> None:
    """A row for every task; for every score a column for every method, as `tables.md` has them; or one of its tables."""
    file = ROOT / "launch" / "studies" / "results" / name / "results.jsonl"
    options = parse_options([f"{ROOT / 'launch' / 'studies' / name}.yaml", "--known", str(file)])
    results = results_of(
        options.study, read(replace(options, output_dir=file.parent / "nothing"), load(file, "--known"))
    )
    columns = [(score, row) for score in scores.split(", ") for row in results.rows]
    head = [f"{score}: {row.label}" if row == results.rows[0] else row.label for score, row in columns]
    over_rates = {(sheet.title, row[0]): row[1:] for sheet in stability_sheets(results) for row in sheet.rows}

    def text(at: int, task: str, score: str, row: Row) -> str:
        if kind == "of":
            return score_text(results, task, row, score)
        return over_rates[f"over learning rates, {score}", row.label][at]

    rows = [[task, *(text(at, task, *column) for column in columns)] for at, task in enumerate(options.study.tasks)]
    if kind == "one rate of":
        (sheet,) = one_rate_sheets(results)
        head, rows = [*sheet.head[1:]], [[*row] for row in sheet.rows]
    expected = [["", *head], ["---", *["---:"] * len(head)], *rows]
    assert table == "".join(f"| {' | '.join(row)} |\n".replace("|  |", "| |") for row in expected)


def test_the_readme_has_a_table_of_every_fair_benchmark_that_was_run() -> None:
    assert {file.parent.name for file in PUBLISHED if "fair" in file.parent.name} <= {
        name for _, name, *_ in TABLES_IN_README
    }


@pytest.mark.parametrize(
    ("there", "key", "value", "message"),
    [
        ({}, None, None, ""),
        ({"commit": "d"}, None, None, ""),
        ({}, "weights_sha256", "f00", "another weights_sha256, though computed alike"),
        ({}, "ledger_sha256", "f00", "another ledger_sha256, though computed alike"),
        ({}, "new_domain/accuracy", 0.31, "new_domain/accuracy is 0.3, not 0.31, though computed alike"),
        ({"threads": 2}, "weights_sha256", "f00", ""),
        ({"processor": "another"}, "new_domain/accuracy", 0.34, ""),
        ({"processor": "another"}, "new_domain/accuracy", 0.36, "new_domain/accuracy is 0.3, not 0.36 give or take 0.05"),
        ({"packages": {}}, "weights_sha256", "f00", ""),
        ({"packages": {"torch": "2", "scipy": "1"}}, "weights_sha256", "f00", "another weights_sha256, though computed alike"),
        ({"packages": {"torch": "3"}}, "new_domain/loss", 1.2, ""),
        ({"packages": {"torch": "3"}}, "new_domain/loss", 1.3, "new_domain/loss is 1.0, not 1.3 give or take 0.26"),
    ],
)  # fmt: skip
def test_runs_agree_in_their_bits_where_they_were_computed_alike_and_else_about(
    parsed: Parsed, there: dict[str, Any], key: str | None, value: Any, message: str
) -> None:
    options = parsed("--tasks=one", "--rows=LoRA", "--seeds=0")
    written(options, good)
    theirs = computed(options, **there)
    if key is not None:
        scores = {**(theirs[0].scores or {}), key: value}
        facts = {**(theirs[0].facts or {}), key: value}
        theirs[0] = replace(theirs[0], scores=scores) if "/" in key else replace(theirs[0], facts=facts)
    published = publish(options.output_dir, "A study", theirs)
    found = [*disagreements(published, computed(options))]
    assert found == ([f"{theirs[0].run.title}: {message}"] if message else [])


def test_nothing_to_compare_with_is_refused(parsed: Parsed, tmp_path: Path) -> None:
    options = parsed()
    written(options, good)
    with pytest.raises(ConfigError, match=r"--against .*none\.jsonl: cannot be read"):
        load(tmp_path / "none.jsonl", "--against")
    with pytest.raises(
        ConfigError,
        match=r"--against .*: it has none of the 36 runs that were carried out here: name results of the same",
    ):
        [*disagreements(publish(tmp_path, "A study", []), read(options))]


def test_results_of_the_study_itself_are_compared_before_they_are_written_over(parsed: Parsed) -> None:
    options = parsed("--tasks=one", "--rows=LoRA", "--seeds=0")
    file = options.output_dir / "results.jsonl"
    written(options, good)
    assert carry_out(options) == 0
    file.write_text(file.read_text().replace('"weights_sha256": 0', '"weights_sha256": 1', 1))
    assert carry_out(replace(options, against=file)) == 1


def test_a_difference_ends_the_command_with_1(
    parsed: Parsed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = parsed("--tasks=one", "--rows=LoRA", "--seeds=0", "--against", str(tmp_path / "there" / "results.jsonl"))
    written(options, good)
    (tmp_path / "there").mkdir()
    publish(tmp_path / "there", "A study", read(options))
    assert carry_out(options) == 0
    text = (tmp_path / "there" / "results.jsonl").read_text()
    (tmp_path / "there" / "results.jsonl").write_text(text.replace('"weights_sha256": 0', '"weights_sha256": 1', 1))
    assert carry_out(options) == 1
    assert "differs   one: LoRA, learning_rate 0.001, seed 0: another weights_sha256" in capsys.readouterr().out


def test_the_time_here_is_that_of_the_runs_that_are_done(parsed: Parsed) -> None:
    """Each took 60 s; 36 runs less 18, two at a time, with those of a kind that none is of."""
    options = parsed("--tasks=one", change=("grid: {training", "sweep: {training.epochs: [1, 2]}\ngrid: {training"))
    half = [one for one in options.runs if one.config.training.epochs == 1]
    written(replace(options, runs=tuple(half)), good)
    found = [replace(one, facts=one.facts and {**one.facts, "seconds": 60.0}) for one in read(options)]
    assert sum(one.state == "done" for one in found) == 18
    (line,) = (line for line in estimate(options.study, found, 2**40, at_once=2) if " here, 2 at a time" in line)
    hours, _, _ = line.strip().removeprefix("about ").partition(" here")
    seconds = {"s": 1.0, "min": 60.0, "h": 3600.0}
    number, unit = hours.split()
    assert 18 * 60 / 2 * 0.99 <= float(number) * seconds[unit] < 2 * 18 * 60 / 2 * 1.01, "longer, and up to twice"


def test_tensorboard_shows_every_choice_with_its_mean_over_seeds(parsed: Parsed, tmp_path: Path) -> None:
    """As its own hparams view reads the files."""
    options = parsed()
    written(options, good)
    hparams.write(tmp_path / "tb", results_of(options.study, read(options)))
    before = {file: file.read_bytes() for file in (tmp_path / "tb").rglob("events*")}
    hparams.write(tmp_path / "tb", results_of(options.study, read(options)))
    assert {file: file.read_bytes() for file in (tmp_path / "tb").rglob("events*")} == before, "the same bytes"

    runs = plugin_event_multiplexer.EventMultiplexer()
    runs.AddRunsFromDirectory(str(tmp_path / "tb"))
    runs.Reload()
    provider = data_provider.MultiplexerDataProvider(runs, str(tmp_path / "tb"))
    view = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    request = context.RequestContext(), view, "study"
    experiment = get_experiment.Handler(*request, api_pb2.GetExperimentRequest()).run()
    domains = {one.name: [*one.domain_discrete] for one in experiment.hparam_infos}
    assert domains["learning_rate"] == [0.001, 0.01]
    assert domains["task"] == ["one", "two"]
    assert {one.name.tag for one in experiment.metric_infos} == {"dev", "new", "old"}
    asked = api_pb2.ListSessionGroupsRequest(
        start_index=0,
        slice_size=100,
        aggregation_type=api_pb2.AGGREGATION_AVG,
        allowed_statuses=[api_pb2.STATUS_UNKNOWN],
    )
    groups = list_session_groups.Handler(*request, asked).run().session_groups
    assert len(groups) == 2 * (2 + 4)
    assert {len(one.sessions) for one in groups} == {3}
    (slow,) = (
        one
        for one in groups
        if one.name == "task two, adapter LoRA, strategy Slow, learning_rate 0.01, slow_retention 0.8"
    )
    assert {one.name.tag: pytest.approx(one.value) for one in slow.metric_values} == {
        "dev": 0.7,
        "new": 0.91,
        "old": 0.91,
    }
    assert slow.hparams["slow_retention"].number_value == 0.8
