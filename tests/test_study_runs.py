"""Studies that run: processes that know nothing of each other, interruptions, runs that fail, and the paper's rows."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import image_models
import pytest
from conftest import RECIPE, ROOT

from lorasc_ds.errors import ConfigError
from lorasc_ds.preparation import prepare
from lorasc_ds.run_directory import state_of
from lorasc_ds.study.command import main
from lorasc_ds.study.estimate import estimate, evaluation_seconds
from lorasc_ds.study.options import StudyOptions, evaluation_of, parse_options
from lorasc_ds.study.study import read
from lorasc_ds.study.worker import IMPORTED, carry_out
from lorasc_ds.tasks import load_task
from lorasc_ds.train import main as train

SMALL = {
    "task.train_examples": 8,
    "task.dev_examples": 4,
    "task.test_examples": 4,
    "training.epochs": 2,
    "training.evaluate": "end",
    "training.save_model": False,
    "tracking.tensorboard": False,
}
STUDY: dict[str, Any] = {
    "title": "A study",
    "recipe": str(RECIPE),
    "set": SMALL,
    "tasks": {"mirrored": {}},
    "strategies": {
        "LoRA": {"set": {"cascade.strategy": "lora"}},
        "LoRASC": {"set": {"cascade.strategy": "lorasc"}},
        "broken": {"set": {"cascade.strategy": "lora", "cascade.max_boundary_drift": 1e-12}},
    },
    "scores": {"new": "new_domain/accuracy", "rotated": "digits/new_domain/accuracy", "rank": "ledger/bound"},
    "evaluate": {"tasks": "digits", "digits.domain": "rotated", "digits.test_examples": 4, "splits": "new_domain"},
    "inspect": True,
    "seeds": [0, 1],
}


def arguments(folder: Path, *flags: str) -> list[str]:
    (folder / "study.yaml").write_text(json.dumps(STUDY))
    return [str(folder / "study.yaml"), "--output_dir", str(folder / "out"), "--at_once=2", *flags]


def runs(options: StudyOptions) -> dict[str, Path]:
    return {run.title: options.directory(run) for run in options.runs}


def digest(directory: Path) -> str:
    return json.loads((directory / "summary.json").read_text())["weights_sha256"]


def written_at(file: Path) -> tuple[int, int]:
    """Another when it is written again."""
    return file.stat().st_ino, file.stat().st_mtime_ns


def wait(condition: Any, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def test_a_killed_study_is_completed_and_what_is_finished_is_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed with two runs under way; every digest is that of a run alone, whatever ran before it."""
    command = arguments(tmp_path)
    options = parse_options(command)
    directories = runs(options)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])
    killed = context.Process(target=main, args=(command,))
    killed.start()
    wait(lambda: any(record.state == "done" for record in read(options)))
    wait(lambda: sum(state_of(directory) == "running" for directory in directories.values()) > 0)
    killed.kill()
    killed.join()
    done = [record.job.directory for record in read(options) if record.state == "done"]
    finished = {directory: written_at(directory / "summary.json") for directory in done}
    assert 0 < len(finished) < 6

    assert main(command) == 1, "two runs fail"
    printed = capsys.readouterr().out
    assert "broken" in printed
    assert "failed 2/2" in printed
    states = {record.run.title: record.state for record in read(options)}
    assert [state for title, state in states.items() if "broken" not in title] == ["done"] * 4
    assert [record.exit_code for record in read(options) if record.state == "failed"] == [3, 3]
    for directory, before in finished.items():
        assert written_at(directory / "summary.json") == before
    done = [record for record in read(options) if record.state == "done"]
    assert all(record.score("digits/new_domain/accuracy") is not None for record in done)
    assert all(set((record.outcomes("digits/new_domain/accuracy") or {}).values()) <= {0.0, 1.0} for record in done)
    assert [record.score("ledger/bound") for record in done] == [8, 8, 16, 16]

    for record in done[1:3]:  # one of each strategy, in this process
        alone = tmp_path / record.run.name
        assert train(["--output_dir", str(alone), *record.run.flags], RECIPE) == 0
        assert digest(alone) == digest(record.job.directory)
        assert (alone / "examples.json").read_bytes() == (record.job.directory / "examples.json").read_bytes()

    capsys.readouterr()
    assert main(command) == 1
    assert "broken" in capsys.readouterr().out
    assert {r.job.directory: written_at(r.job.directory / "summary.json") for r in done}.items() >= finished.items()


def test_a_run_that_is_killed_alone_is_told_and_tried_again(tmp_path: Path) -> None:
    """The worker goes on, and the next run of the study is as if nothing had been."""
    command = arguments(tmp_path, "--rows=LoRA", "--training.epochs=30", "--training.checkpoint_steps=4")
    (options := parse_options(command)).directory(options.runs[0]).parent.mkdir(parents=True)
    jobs = [record.job for record in read(options)]
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    killer = context.Process(target=kill_run, args=(jobs[0].directory, ready))
    killer.start()
    assert ready.wait(120)
    assert [code for _, code, _ in carry_out(jobs, at_once=1)] == [-9, 0]
    killer.join()
    first, second = read(options)
    assert (first.state, first.message, second.state) == ("failed", "ended by SIGKILL", "done")

    shutil.rmtree(second.job.evaluation)  # as if it had been killed in `evaluate`, and in `inspect`
    second.job.evaluation.mkdir()
    (second.job.evaluation / "summary.json").write_text('{"complete": false}')
    second.job.inspection.unlink()
    trained = written_at(second.job.directory / "summary.json")
    assert main(command) == 0
    assert {record.state for record in read(options)} == {"done"}
    assert written_at(second.job.directory / "summary.json") == trained
    assert [record.score("digits/new_domain/accuracy") for record in read(options)][1] is not None


def kill_run(directory: Path, ready: Any) -> None:
    """Once it has a checkpoint."""
    ready.set()
    wait(lambda: any((directory / "checkpoints").glob("step*")))
    os.kill(int((directory / ".owner").read_text().split()[1]), signal.SIGKILL)


def test_rows_of_one_s_own_are_studied_by_one_command(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Test is scored on rows that no run has trained on or chosen by; its perplexity is that of its loss."""
    rows = [{"instruction": f"{at}", "input": "", "output": f"{at} {at}"} for at in range(20)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [str(ROOT / "launch/studies/own-data.yaml"), "--model.name_or_path", str(tiny_folder)]
    command += ["--task.train_file", str(tmp_path / "mine.jsonl"), "--output_dir", str(tmp_path / "out")]
    command += ["--training.max_length=128", "--training.batch_size=8", "--seeds=0", "--training.learning_rate=1e-3"]
    assert main([*command, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "study     Own data: 3 runs, 0 done" in printed
    assert "on one H100" in printed
    assert not (tmp_path / "out").exists()

    assert main(command) == 0, capsys.readouterr().out
    records = read(parse_options(command))
    assert [record.run.row.label for record in records] == ["LoRA", "COLA", "LoRASC"]
    for record in records:
        loss, perplexity = record.score("test/loss"), record.score("test/perplexity")
        assert loss is not None
        assert perplexity == pytest.approx(math.exp(loss))
    tested = load_task(records[0].run.config.task, seed=0).splits["test"]
    assert [{*(record.outcomes("test/loss") or {})} for record in records] == [{one.id for one in tested}] * 3
    assert len(tested) == 2
    printed = capsys.readouterr().out
    assert "Own data: loss of a token" in printed
    assert "the lower the better\n" in printed
    assert "best by dev" in printed, "the answer"


def test_a_score_that_no_run_has_stops_the_study_after_the_first_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(tmp_path, "--rows=LoRA,LoRASC", "--at_once=1")
    (tmp_path / "study.yaml").write_text(json.dumps(STUDY | {"scores": {"rank": "ledger/bond"}}))
    for _ in range(2):  # the second time before a run
        assert main(command) == 2
        said = capsys.readouterr()
        assert said.err.startswith(
            "error: scores.rank is 'ledger/bond', but the runs of mirrored have no ledger/bond: one of"
        )
        assert said.err.endswith(" is needed; did you mean ledger/bound?\n")
        assert [record.state for record in read(parse_options(command))].count("done") == 1
    assert "1/4" not in said.out


def test_a_part_of_the_published_table_1_is_made_again_and_is_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA, LoRASC, DoRA and its cascade: of each the run that the study has at this rate, domain and seed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    part = ["--tasks=mirrored", "--adapters=LoRA,DoRA", "--rows=plain,+++ Noise Tuning", "--seeds=0", "--at_once=2"]
    studies = ROOT / "launch" / "studies"
    command = [str(studies / "table1-mini.yaml"), *part, "--training.learning_rate=1e-2"]
    published = studies / "results" / "table1-mini" / "results.jsonl"
    ended = main([*command, "--output_dir", str(tmp_path / "out"), f"--against={published}"])
    said = capsys.readouterr().out
    assert ended == 0, said
    assert "4 runs, 0 done" in said


def test_the_plan_counts_what_is_scored_after_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four digits of one batch, on a model of four layers that launching kernels takes all the time of."""
    options = parse_options(arguments(tmp_path, "--rows=LoRA,LoRASC", "--seeds=0"))
    study, preparation = options.study, prepare(options.runs[0].config)
    evaluation = evaluation_of(study, options.runs[0])
    assert evaluation is not None
    assert evaluation_seconds(preparation, evaluation) == pytest.approx(4 * 5e-4)
    assert evaluation_seconds(preparation, replace(evaluation, tasks=())) == 0
    without = study.model_copy(update={"evaluate": {}, "inspect": False})
    assert "not counted" not in "".join(estimate(without, read(options), 2**40, at_once=1))
    asked = []
    monkeypatch.setattr("lorasc_ds.study.estimate.evaluation_seconds", lambda *of: asked.append(of) or 7200.0)
    told = [*estimate(study, read(options), 2**40, at_once=1)]
    assert [" 2.0 h " in line for line in told[1:3]] == [True, True]
    assert told[3].startswith("time      about 4.0 h on one H100")
    assert "inspections of the ledger not counted" in told[3]
    assert len(asked) == 1, "both runs are scored alike"


def test_the_plan_of_a_new_classifier_counts_what_is_scored_after(tmp_path: Path) -> None:
    """On the task that it is trained for, whose classes are not those of the model's own head."""
    command = [f"--model.name_or_path={image_models.vit(tmp_path / 'vit', classes=None)}", "--task.train_head=true"]
    command += ["--task.name=digit_images", "--model.kind=auto", *arguments(tmp_path, "--rows=LoRA", "--seeds=0")]
    command += ["--evaluate.tasks=digit_images", "--evaluate.splits=old_domain", "--tasks=mirrored"]
    changed = STUDY | {"evaluate": {}, "scores": {"new": "new_domain/accuracy"}}
    (tmp_path / "study.yaml").write_text(json.dumps(changed))
    options = parse_options(command)
    evaluation = evaluation_of(options.study, options.runs[0])
    assert evaluation is not None
    assert evaluation_seconds(prepare(options.runs[0].config), evaluation) > 0


def test_the_plan_says_how_many_runs_how_long_and_how_much_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path, "--dry_run", "--gpu_memory=1")) == 0
    printed = capsys.readouterr().out
    assert "study     A study: 6 runs, 0 done" in printed
    assert "on one H100" in printed
    assert "of 1.00G in one process: fits" in printed
    assert not (tmp_path / "out").exists()


def test_help_and_mistakes_do_not_wait_for_torch(tmp_path: Path) -> None:
    code = "import sys; from lorasc_ds.study.command import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    command = [sys.executable, "-c", code, *arguments(tmp_path, "--evaluate.digits.domain=sideways")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 2
    assert ended.stderr == (
        "error: evaluate: digits.domain is 'sideways': needs to be 'upright', 'mirrored', 'rotated' or 'blurred'\n"
    )
    with pytest.raises(ConfigError, match=r"'brocken' is none of the study's strategies.*; did you mean broken"):
        parse_options(arguments(tmp_path, "--rows=brocken"))
