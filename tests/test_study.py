"""Studies without runs: what is expanded, chosen, tested and tabulated, against hand-made results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT
from PIL import Image
from study_cases import YAML, good, parse, written

from lorasc_ds.errors import ConfigError, DataError
from lorasc_ds.robustness_report import Sheet
from lorasc_ds.study import records
from lorasc_ds.study.options import StudyOptions
from lorasc_ds.study.paper import TABLES
from lorasc_ds.study.plan import Row
from lorasc_ds.study.results import corrected, results_of
from lorasc_ds.study.selection import choose
from lorasc_ds.study.statistics import compare, holm, p_of
from lorasc_ds.study.study import carry_out, check_data, job_of, read, tell, to_do
from lorasc_ds.study.tables import latex, sheets

STUDIES = sorted((ROOT / "launch" / "studies").glob("*.yaml"))
Parsed = Callable[..., StudyOptions]


@pytest.fixture
def parsed(tmp_path: Path) -> Parsed:
    return partial(parse, tmp_path)


def test_a_study_is_every_combination_and_every_run_the_command_that_it_says(parsed: Parsed) -> None:
    options = parsed()
    assert len(options.runs) == 2 * (2 + 4) * 3
    assert len({run.digest for run in options.runs}) == len(options.runs)
    last = options.runs[-1]
    assert last.title == "two: Slow, learning_rate 0.01, slow_retention 0.8, seed 2"
    config = last.config
    assert (config.task.name, config.cascade.strategy, config.cascade.slow_retention) == ("digits", "slow", 0.8)
    assert (config.training.learning_rate, config.training.seed, config.training.epochs) == (0.01, 2, 1)
    assert "--task.domain=rotated" in last.flags


def test_the_command_line_narrows_a_study_and_a_key_given_there_is_chosen_no_more(parsed: Parsed) -> None:
    options = parsed("--tasks=two", "--rows=Slow", "--seeds=7", "--training.learning_rate=0.5")
    assert [(run.seed, run.config.training.learning_rate) for run in options.runs] == [(7, 0.5)] * 2
    assert [dict(run.choice) for run in options.runs] == [{"cascade.slow_retention": a} for a in (0.5, 0.8)]


def test_flags_of_sbatch_are_read_as_by_a_shell(parsed: Parsed) -> None:
    assert parsed("--slurm=--comment='two words' --time=60").slurm == ("--comment=two words", "--time=60")
    assert parsed("--slurm").slurm == ()
    with pytest.raises(ConfigError, match=r"^--slurm --comment='two: No closing quotation: write .*quote closed$"):
        parsed("--slurm=--comment='two")


def test_runs_that_come_to_the_same_are_one(parsed: Parsed) -> None:
    options = parsed(change=("grid: {training", "sweep: {training.epochs: [1, 2], adapter.rank: [8]}\ngrid: {training"))
    labels = {run.row.label for run in options.runs}
    assert labels == {f"{row}, {point}" for row in ("LoRA", "Slow") for point in ("epochs 1", "epochs 2", "rank 8")}
    assert (
        len({run.digest for run in options.runs}) == len(options.runs) * 2 // 3
    )  # rank 8 and epochs 1 are the recipe's
    assert len(to_do(options, read(options))) == len({run.digest for run in options.runs})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seeds: [0, 1, 2]", "seeds: [0, 0]"), "seeds [0, 0] names one twice"),
        (("seeds: [0, 1, 2]", ""), "seeds: Field required"),
        (("  one: {}", "  one, two: {}"), "the name 'one, two' has a comma"),
        (("{training.epochs: 1}", "{training.epoch: 1}"), "set: unknown key training.epoch; did you mean training.epoch"),
        (("cascade.slow_retention: [0.5, 0.8]", "cascade.slow_retention: [1.5]"), "one, Slow: cascade.slow_retention is 1.5"),
        (("title: A", "select_by: test/accuracy\ntitle: A"), "select_by is 'test/accuracy': a metric of dev"),
        (("  one: {}", "  one: {sett: {}}"), "unknown key tasks.one.sett"),
        (("title: A", "paper: table9\ntitle: A"), "paper is 'table9': one of table1"),
        (("scores: {new: new_domain/accuracy, old: old_domain/accuracy}}\n", "scores: {x: a/b}}\n"), "tasks.two.scores names x"),
    ],
)  # fmt: skip
def test_an_impossible_study_is_refused_in_one_line(parsed: Parsed, change: tuple[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parsed(change=change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ("tasks: digitss", "evaluate: --tasks digitss: no such task; one of digits,"),
        ("task: digits", "evaluate: unknown flag task; did you mean tasks?"),
        ("output_dir: out", "evaluate: unknown flag output_dir"),
        ("digits.domain: sideways", "evaluate: digits.domain is 'sideways': needs to be 'upright', 'mirrored'"),
        ("tasks: mmlu, data_dir: nowhere", "evaluate: --data_dir nowhere is no folder"),
        ("limit: 0", "evaluate: --limit is 0: a number from 1 on is needed"),
        ("confirm_run_unsafe_code: 3", "evaluate: confirm_run_unsafe_code is '3': true or false is needed"),
    ],
)
def test_what_evaluate_would_refuse_is_told_before_any_run(parsed: Parsed, evaluate: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parsed(change=("seeds:", f"evaluate: {{{evaluate}}}\nseeds:"))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_flags_of_evaluate_are_those_of_the_study_and_of_the_command_line(parsed: Parsed) -> None:
    asked = "{tasks: digits, share_prefixes: true, trust_remote_code: false, digits.domain: upright}"
    flags = ["--evaluate.digits.domain=rotated", "--evaluate.confirm_run_unsafe_code", "true", "--evaluate.limit=4"]
    options = parsed(*flags, change=("seeds:", f"evaluate: {asked}\nseeds:"))
    found = job_of(options, options.runs[0]).evaluate
    expected = ["tasks=digits", "share_prefixes=true", "digits.domain=rotated", "limit=4", "confirm_run_unsafe_code"]
    assert found == tuple(f"--{flag}" for flag in expected)
    with pytest.raises(ConfigError, match=r"unknown argument --evaluate.limits=4; did you mean --evaluate.limit\?"):
        parsed("--evaluate.limits=4")


def test_data_that_cannot_be_read_and_a_dev_that_is_not_there_are_told_before_any_run(
    parsed: Parsed, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    for file in (images / split / f"{name}/{at}.png" for split in ("train", "test") for name in "ab" for at in (1, 2)):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(file)
    flags = ["--tasks=one", "--task.name=images", f"--task.data_dir={images}"]
    whole = parsed(*flags)
    check_data(whole, to_do(whole, read(whole)))
    for more, message in (
        (["--task.dev_examples=0"], r"one: task\.dev_examples is 0, so there is no dev split, .*: hold examples out"),
        (["--task.data_dir=nowhere"], "one: .*nowhere"),
        (["--evaluate.tasks=corrupted_images", "--evaluate.corrupted_images.data_dir=elsewhere"], "one: .*elsewhere"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            carry_out(parsed(*flags, *more))
        assert not (tmp_path / "out").exists()
    assert carry_out(parsed(*flags, "--task.dev_examples=0", "--collect")) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("scores: {new: new_domain/accuracy, old: old_domain/accuracy}\nseeds", "scores: {new: new_domain/acuracy, old: old_domain/loss}\nseeds"),
            "scores.new is 'new_domain/acuracy', but the runs of one have no new_domain/acuracy: one of dev/accuracy,"
            " dev/loss, new_domain/accuracy, new_domain/loss, old_domain/accuracy, old_domain/loss is needed; did you mean"
            " new_domain/accuracy?",
        ),
        (
            ("old: old_domain/accuracy}}", "old: dev/loss - train/loss}}"),
            "tasks.two.scores.old is 'dev/loss - train/loss', but the runs of two have no train/loss: one of ",
        ),
        (("seeds:", "select_by: dev/f1\nseeds:"), "select_by is 'dev/f1', but the runs of one have no dev/f1: one of dev/"),
    ],
    ids=["misspelt", "part of a difference", "select_by"],
)  # fmt: skip
def test_a_name_that_no_run_has_is_told_with_those_that_there_are(
    parsed: Parsed, change: tuple[str, str], message: str
) -> None:
    options = parsed(change=change)
    written(options, good)
    with pytest.raises(ConfigError) as error:
        carry_out(replace(options, collect=True))
    assert str(error.value).startswith(message)


def test_dev_chooses_and_a_point_with_a_failed_seed_is_not_chosen() -> None:
    def dev(*accuracies: float, loss: float = 1.0) -> list[dict[str, float]]:
        return [{"accuracy": one, "loss": loss} for one in accuracies]

    assert choose({"a": dev(0.5, 0.7), "b": dev(0.9, 0.4)}, "accuracy") == "b"
    assert choose({"a": dev(0.5, 0.7), "b": [*dev(0.9), None]}, "accuracy") == "a"
    assert choose({"a": dev(0.5, 0.7), "b": dev(0.6, 0.6, loss=0.5)}, "accuracy") == "b", "equal: the lower loss"
    assert choose({"a": dev(0.5, loss=2.0), "b": dev(0.9, loss=3.0)}, "loss") == "a"
    assert choose({"a": dev(float("nan")), "b": dev(0.1)}, "accuracy") == "b"
    assert choose({"a": [None]}, "accuracy") is None


@pytest.mark.parametrize("poison", [0.0, 1.0, float("nan")])
def test_selection_does_not_see_test(parsed: Parsed, poison: float) -> None:
    """Whatever stands for test at the points of the grid, the same are chosen."""
    options = parsed()
    rng = np.random.default_rng(0)

    def score(task: str, row: str, choice: Any, seed: int) -> tuple[float, list[float]]:
        return good(task, row, choice, seed)[0], [poison if rng.random() < 0.5 else rng.random()] * 4

    written(options, score)
    results = results_of(options.study, read(options))
    wanted = {"LoRA": {"training.learning_rate": 0.01}}
    wanted["Slow"] = {"training.learning_rate": 0.01, "cascade.slow_retention": 0.8}
    assert {label: dict(cell.choice or ()) for (_, label), cell in results.cells.items()} == wanted


def test_the_two_tests_are_scipys_and_the_larger_p_counts() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = (
        [{str(e): float(v) for e, v in enumerate(rng.random(40) + shift)} for _ in range(5)] for shift in (0.3, 0.0)
    )
    scores = [[statistics.fmean(one.values()) for one in each] for each in (ours, theirs)]
    found = compare(*scores, ours, theirs)
    matrix = np.array([[list(one.values()) for one in each] for each in (ours, theirs)])
    by_seed, by_example = (scipy.stats.ttest_rel(*matrix.mean(axis=axis)).pvalue for axis in (2, 1))
    assert found.p_seeds == pytest.approx(by_seed)
    assert found.p_examples == pytest.approx(by_example)
    assert found.p == pytest.approx(max(by_seed, by_example))
    assert found.difference == pytest.approx(matrix[0].mean() - matrix[1].mean())


def test_a_difference_that_few_examples_make_at_every_seed_does_not_count() -> None:
    """All seeds agree, but two of four examples speak for it and two against."""
    ours = [{"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.1 + seed / 100} for seed in range(5)]
    theirs = [{"a": 0.0, "b": 0.0, "c": 0.9, "d": 1.0} for _ in range(5)]
    scores = [[statistics.fmean(one.values()) for one in each] for each in (ours, theirs)]
    found = compare(*scores, ours, theirs)
    assert found.p_seeds is not None
    assert found.p_seeds < 0.001
    assert found.p == found.p_examples
    assert found.p > 0.5


def test_examples_are_paired_by_their_names() -> None:
    first, second = {"a": 1.0, "b": 0.0, "c": 1.0}, {"c": 1.0, "a": 1.0, "b": 0.0}
    assert compare([0.6, 0.5], [0.6, 0.4], [first, first], [second, second]).p_examples == 1.0


def test_p_where_t_is_undefined() -> None:
    assert p_of([0.1]) is None
    assert p_of([0.0] * 5) == 1.0
    assert p_of([0.1] * 5) == 2 / 2**5, "the sign test's"


def test_p_of_what_is_not_finite_is_none_and_spoils_no_other() -> None:
    assert p_of([0.1, float("nan"), 0.2]) is None
    lost = compare([float("inf")] * 3, [float("inf")] * 3, [None] * 3, [None] * 3)
    sure = compare([1.0, 1.1, 1.2], [0.0, 0.1, 0.3], [None] * 3, [None] * 3)
    tested = corrected({("a", "row", "ppl"): lost, ("b", "row", "ppl"): sure, ("b", "row", "acc"): sure})
    assert tested.keys() == {("b", "row", "ppl"), ("b", "row", "acc")}
    assert all(one.p == 2 * (sure.p or 0.0) for one in tested.values()), "two that can be tested"


def test_examples_that_are_not_the_same_on_both_sides_are_not_compared() -> None:
    first, second = {"here/x.jsonl:1": 1.0, "b": 0.0}, {"there/x.jsonl:1": 1.0, "b": 0.0}
    assert compare([0.6, 0.5], [0.6, 0.4], [first, first], [second, second]).p_examples is None
    assert compare([0.6, 0.5], [0.6, 0.4], [first, None], [first, first]).p_examples is None


def test_holm_corrects() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm 1979's steps by hand
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_tables_are_means_and_spreads_of_what_was_chosen(parsed: Parsed, capsys: pytest.CaptureFixture[str]) -> None:
    options = parsed()
    written(options, good)
    tell(options, read(options))
    new, _, differences, _, chosen, warned = sheets(results_of(options.study, read(options)))
    assert new.head == ("method", "one", "two")
    assert differences.title == "differences to LoRA, A study: new"
    assert new.rows == (("LoRA", *["30.3 ± 0.6"] * 2), ("Slow", *["91.0 ± 1.0 ↑"] * 2))
    assert differences.rows[0][0] == "Slow"
    assert differences.rows[0][1].startswith("+60.7, p 0.0")
    assert chosen.rows[1][1] == "learning_rate 0.01†, slow_retention 0.8 (dev 70.0 ± 0.0)", "the higher of two"
    assert warned.rows == (("Slow", "gap 2/3", "gap 2/3"),)
    assert r"91.0 $\pm$ 1.0 $\uparrow$ & 91.0 $\pm$ 1.0 $\uparrow$ \\" in latex(new)
    lines = [json.loads(line) for line in (options.output_dir / "results.jsonl").read_text().splitlines()]
    assert [line["digest"] for line in lines] == [run.digest for run in options.runs]
    assert "INCOMPLETE" not in capsys.readouterr().out


def test_a_failed_run_is_shown_and_not_averaged_away(parsed: Parsed) -> None:
    options = parsed("--tasks=one")
    written(options, good)
    failing = [run for run in options.runs if run.row.label == "Slow" and run.seed == 1]
    for run in failing:
        (options.directory(run) / "status.json").unlink()
        ended = {"exit_code": 3, "message": "error: the loss is nan", "seconds": 1.0}
        options.directory(run).with_suffix(".json").write_text(json.dumps(ended))
    scores, *_, failures = sheets(results_of(options.study, read(options)))
    assert scores.rows[1][1:] == ("failed 4/12", "failed 4/12")
    assert failures.title == "4 runs failed"
    assert failures.rows[0] == (failing[0].title, "3", "error: the loss is nan")
    assert to_do(options, read(options)) == [], "what diverged would do so again"
    assert len(to_do(parsed("--tasks=one", "--retry_failed"), read(options))) == 4


def test_a_cell_says_how_many_of_its_runs_failed(parsed: Parsed) -> None:
    options = parsed("--tasks=one")
    written(options, good)
    low = next(run for run in options.runs if dict(run.choice)["training.learning_rate"] == 1e-3)
    (options.directory(low) / "status.json").unlink()
    options.directory(low).with_suffix(".json").write_text('{"exit_code": 3, "message": "", "seconds": 1.0}')
    scores, *_ = sheets(results_of(options.study, read(options)))
    assert scores.rows[0][1] == "30.3 ± 0.6 (1 failed)"


def test_a_swept_study_names_what_its_rows_are_compared_with(parsed: Parsed) -> None:
    options = parsed(change=("grid: {training", "sweep: {training.epochs: [1, 2]}\ngrid: {training"))
    written(options, good)
    new, _, differences, *_ = sheets(results_of(options.study, read(options)))
    assert new.notes[1].startswith("↑ ↓: higher or lower than LoRA at the same epochs, p < 0.05")
    assert differences.title == "differences to LoRA at the same epochs, A study: new"
    assert [row[0] for row in differences.rows] == ["Slow, epochs 1", "Slow, epochs 2"]


def test_what_is_missing_is_said(parsed: Parsed) -> None:
    options = parsed()
    written(parsed("--seeds=0,1"), good)
    found = read(options)
    assert len(to_do(options, found)) == len(options.runs) // 3
    scores, *_ = sheets(results_of(options.study, found))
    assert [row[1] for row in scores.rows] == ["-", "-"]
    assert any(note.startswith("INCOMPLETE: 12 of 36 runs") for note in scores.notes)


def test_values_of_the_paper_stand_beside_ours_or_below(parsed: Parsed) -> None:
    beside = parsed(text=YAML.replace("  one:", "  rte:").replace("title: A", "paper: table1\ntitle: A"))
    written(beside, good)
    rows = sheets(results_of(beside.study, read(beside)))[0].rows
    assert rows[1] == ("LoRA (quoted)", "87.4", "-")
    narrow = parsed("--tasks=rte", text=YAML.replace("  one:", "  rte:").replace("title: A", "paper: table1\ntitle: A"))
    narrow = replace(narrow, study=narrow.study.model_copy(update={"scores": {"new": "new_domain/accuracy"}}))
    (scores, *_) = sheets(results_of(narrow.study, read(narrow)))
    assert (scores.head, scores.rows[1]) == (("method", "rte"), ("LoRA (quoted)", "87.4"))
    below = parsed(change=("title: A", "paper: table4\ntitle: A"))
    quoted = sheets(results_of(below.study, [records.read(run, job_of(below, run)) for run in below.runs]))[2]
    assert quoted.title == "quoted, other model and data"
    assert quoted.rows[-1] == (
        "+++ Noise Tuning, experts 1250 (quoted)",
        *["83.8", "49.4", "69.4", "85.3", "81.1", "92.9", "88.1"],
    )


def test_a_row_is_quoted_whether_its_adapter_stands_before_it_or_not() -> None:
    quoted = TABLES["table1"]
    assert quoted.of(Row("LoRA", "+ Cascade", None, "+ Cascade")) == quoted.rows["LoRA + Cascade"]
    assert quoted.of(Row("DoRA", "+ Cascade", None, "DoRA + Cascade")) == quoted.rows["DoRA + Cascade"]
    assert quoted.of(Row("LoRA", "LoRA", None, "LoRA")) == quoted.rows["LoRA"]
    assert quoted.of(Row("DoRA", "w/ COLA", None, "DoRA w/ COLA")) == {}


def test_what_is_special_to_latex_is_written_out() -> None:
    text = latex(Sheet("a~b", ("50 %", "#_&"), (("$x^2$", "{1}"),)))
    assert r"50 \% & \#\_\& \\" in text
    assert r"\$x\textasciicircum{}2\$ & \{1\} \\" in text
    assert r"\caption{a\textasciitilde{}b}" in text


@pytest.mark.parametrize("names", ["older, new", "new, new"])
def test_a_trade_off_needs_two_of_the_scores(parsed: Parsed, names: str) -> None:
    with pytest.raises(ConfigError, match=f"trade_off names {names}: two different ones of new, old are needed"):
        parsed(change=("seeds:", f"trade_off: [{names}]\nseeds:"))
