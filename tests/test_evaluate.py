"""`launch/evaluate.py`: models, adapters and runs on real rows, in one process, in two, and cut up by ZeRO-3."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RECIPE, ROOT, Start, flip
from forking import Job, group
from forking import run as run_jobs
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lorasc_ds import export
from lorasc_ds.evaluate import main
from lorasc_ds.evaluate_options import folder_of, parse
from lorasc_ds.train import main as train

Command = Callable[..., tuple[int, str, str]]
TASKS = "--tasks=rte,copa,squad", "--limit=6", "--max_length=512", "--records"


@pytest.fixture
def evaluated(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process: exit code, what it printed, its errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def metrics_of(folder: Path) -> dict[str, Any]:
    return {name: task["metrics"] for name, task in summary_of(folder)["tasks"].items()}


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K"


def test_real_rows_of_many_tasks(evaluated: Command, stories: Path, shared_data: Path, tmp_path: Path) -> None:
    """Whatever the batch, and whether beginnings are shared: the same predictions, scores to 1e-5."""
    flags = [str(stories), *TASKS, f"--data_dir={shared_data}"]
    others = {
        "one": ["--batch_size=1"],
        "many": ["--batch_size=64"],
        "apart": ["--share_prefixes=false", "--batch_size=5"],
    }
    for name, changed in others.items():
        code, out, _ = evaluated(*flags, *changed, f"--output_dir={tmp_path / name}")
        assert code == 0
        assert "  rte    test          6  accuracy " in out
    expected = records_of(tmp_path / "one")
    assert [one["task"] for one in expected] == ["rte"] * 6 + ["copa"] * 6 + ["squad"] * 6
    for name in ("many", "apart"):
        for one, other in zip(expected, records_of(tmp_path / name), strict=True):
            assert (one["id"], one["prediction"], one["metrics"]) == (
                other["id"],
                other["prediction"],
                other["metrics"],
            )
            assert one.get("scores", []) == pytest.approx(other.get("scores", []), abs=1e-5)
    summary = summary_of(tmp_path / "one")
    right = [one["metrics"]["accuracy"] for one in expected[:6]]
    assert summary["tasks"]["rte"]["metrics"]["test"]["accuracy"] == sum(right) / 6
    assert summary["tasks"]["squad"]["headline"] == "f1"
    assert all(isinstance(one["prediction"], str) for one in expected[12:])


def launched(folder: Path, *commands: list[str]) -> None:
    """Each command on two processes, which a launcher would start."""
    jobs = [
        Job("lorasc_ds.evaluate:main", [arguments], str(folder / f"log{number}"), 240, group(2))
        for number, arguments in enumerate(commands)
    ]
    for ended in run_jobs(*jobs):
        assert ended.codes == [0, 0], ended.err


def test_two_processes_and_zero_3_give_what_one_does(
    evaluated: Command, stories: Path, shared_data: Path, tmp_path: Path
) -> None:
    """Every prediction, metric and score; seven examples, so that one process has none at the end."""
    flags = [str(stories), "--tasks=cb,squad", "--limit=7", "--max_length=300", "--records", "--batch_size=2"]
    flags += [f"--data_dir={shared_data}"]
    assert evaluated(*flags, f"--output_dir={tmp_path / 'alone'}")[0] == 0
    cut_up = [f"--output_dir={tmp_path / 'zero3'}", "--deepspeed=ds_configs/zero3.json"]
    launched(tmp_path, [*flags, f"--output_dir={tmp_path / 'plain'}"], [*flags, *cut_up])
    assert records_of(tmp_path / "plain") == records_of(tmp_path / "alone")
    assert metrics_of(tmp_path / "plain") == metrics_of(tmp_path / "alone")
    for one, other in zip(records_of(tmp_path / "alone"), records_of(tmp_path / "zero3"), strict=True):
        assert (one["id"], one["prediction"], one["metrics"]) == (other["id"], other["prediction"], other["metrics"])
        assert one.get("scores", []) == pytest.approx(other.get("scores", []), abs=1e-5)
    assert summary_of(tmp_path / "zero3")["zero_stage"] == 3


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_run_at_any_of_its_experts(evaluated: Command, run: Start, tmp_path: Path, method: str) -> None:
    """The last one scores as the run did; an earlier one as its export; an adapter as the weights it stands for."""
    finished = run(**{"adapter.method": method, "cascade.noise_intensity": 0, "cascade.slow_retention": 0.5})
    run_dir = finished.directory
    assert evaluated(run_dir, f"--output_dir={tmp_path / 'shipped'}")[0] == 0
    assert evaluated(run_dir, "--expert=3", f"--output_dir={tmp_path / 'last'}")[0] == 0
    assert metrics_of(tmp_path / "shipped") == metrics_of(tmp_path / "last")
    for split, scores in metrics_of(tmp_path / "last")["digits"].items():  # DoRA's live model normalises as it computes
        assert scores == pytest.approx(finished.summary["eval"][split], abs=0 if method == "lora" else 1e-5)
    assert summary_of(tmp_path / "last")["expert"] == 3

    settings = ["--tasks=digits", "--digits.train_examples=12", "--digits.dev_examples=8", "--digits.test_examples=10"]
    for kind in ("merged", "adapter"):
        exported = tmp_path / kind
        flags = [str(run_dir), "--expert=1", f"--as={kind}", f"--output_dir={exported}", "--compare=false"]
        assert export.main(flags) == 0
        base = [f"--base={ROOT / 'lorasc_ds' / 'quickstart' / 'base'}"] if kind == "adapter" else []
        assert evaluated(exported, *settings, *base, f"--output_dir={tmp_path / f'of-{kind}'}")[0] == 0
    assert evaluated(run_dir, "--expert=1", f"--output_dir={tmp_path / 'first'}")[0] == 0
    first, merged = metrics_of(tmp_path / "first")["digits"], metrics_of(tmp_path / "of-merged")["digits"]
    assert first == merged != finished.summary["eval"]
    for split, scores in metrics_of(tmp_path / "of-adapter")["digits"].items():
        assert scores == pytest.approx(first[split], abs=1e-4)


def test_a_run_on_two_cut_up_processes_is_its_ledger_s(evaluated: Command, run: Start, tmp_path: Path) -> None:
    """ZeRO-3 with noise on every matrix: each shard gets its part of the replayed weights."""
    changed = {"cascade.strategy": "noisytune", "cascade.noise_on": "all", "cascade.noise_intensity": 0.5}
    run_dir = run(**changed).directory
    cut_up = [f"--output_dir={tmp_path / 'zero3'}", "--deepspeed=ds_configs/zero3.json"]
    launched(tmp_path, [str(run_dir), "--expert=1", *cut_up])
    assert evaluated(run_dir, "--expert=1", f"--output_dir={tmp_path / 'alone'}")[0] == 0
    alone = metrics_of(tmp_path / "alone")["digits"]
    for split, scores in metrics_of(tmp_path / "zero3")["digits"].items():
        assert scores == pytest.approx(alone[split], abs=1e-5)


def test_few_shots_on_a_model_with_room(evaluated: Command, stories: Path, shared_data: Path, tmp_path: Path) -> None:
    """Every benchmark, and GSM8K with its eight demonstrations, on a random Llama of 4096 positions."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(stories, max_position_embeddings=4096, num_hidden_layers=1, hidden_size=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(stories).save_pretrained(tmp_path / "model")
    tasks = "--tasks=gsm8k,mmlu,bbh,drop_few_shot,humaneval"
    folders = [f"--drop_few_shot.data_dir={shared_data / 'drop'}", f"--data_dir={shared_data}"]
    refused = evaluated(tmp_path / "model", tasks, *folders, "--limit=1", f"--output_dir={tmp_path / 'out'}")
    assert refused[0] == 2
    assert "--confirm_run_unsafe_code" in refused[2]
    assert not (tmp_path / "out").exists()
    flags = ["--confirm_run_unsafe_code", "--records", "--limit=1", f"--output_dir={tmp_path / 'out'}"]
    code, out, _ = evaluated(tmp_path / "model", tasks, *folders, *flags)
    assert code == 0
    assert re.search(r"humaneval +test +1 +pass@1 +0\.0", out)
    examples = {name: task["examples"]["test"] for name, task in summary_of(tmp_path / "out")["tasks"].items()}
    assert examples == {"gsm8k": 1, "mmlu": 3, "bbh": 3, "drop_few_shot": 1, "humaneval": 1}
    remarks = summary_of(tmp_path / "out")["tasks"]["mmlu"]["remarks"]
    assert any("demonstrations are left out" in line for line in remarks)  # of a history, in 512 tokens' letters
    assert set(metrics_of(tmp_path / "out")["bbh"]["test"]) >= {"accuracy", "accuracy/boolean_expressions"}


@pytest.mark.parametrize(
    ("task", "recipe", "flags"),
    [
        ("alpaca", "llama2-7b-alpaca.yaml", ["--task.dev_examples=20", "--training.batch_size=16"]),
        ("gsm8k", "llama2-7b.yaml", ["--task.shots=0", "--task.max_new_tokens=64", "--task.dev_examples=8"]),
    ],
)
def test_a_pretrained_model_learns_real_rows_and_is_exported_and_scored(
    evaluated: Command, stories: Path, shared_data: Path, tmp_path: Path, task: str, recipe: str, flags: list[str]
) -> None:
    """From the paper's recipes: the loss of unseen rows falls, and the export scores as the run says."""
    directory, rows = tmp_path / "run", json.loads((shared_data / "alpaca" / "random_9k.json").read_text())
    if task == "alpaca":
        (tmp_path / "rows.json").write_text(json.dumps(rows[:260]))
        flags = [*flags, f"--task.train_file={tmp_path / 'rows.json'}", "--training.warmup_steps=4"]
    else:
        flags = [*flags, "--task.name=gsm8k", f"--task.data_dir={shared_data / 'gsm8k'}"]
        flags += ["--task.train_examples=100", "--task.test_examples=4", "--training.batch_size=10"]
    flags += [f"--model.name_or_path={stories}", "--model.dtype=float32", "--training.epochs=2"]
    flags += ["--training.learning_rate=1e-2", "--tracking.tensorboard=false", "--training.micro_batch_size=null"]
    assert train(["--config", str(RECIPE.parent / recipe), f"--output_dir={directory}", *flags], RECIPE) == 0
    summary = summary_of(directory)
    assert summary["experts"] == 2
    assert summary["eval"]["dev"]["loss"] < summary["eval_before"]["dev"]["loss"] - 0.3
    assert export.main([str(directory), f"--output_dir={tmp_path / 'exported'}", "--compare=false"]) == 0
    assert evaluated(directory, "--splits=dev,test", f"--output_dir={tmp_path / 'scores'}")[0] == 0
    for split, scores in metrics_of(tmp_path / "scores")[task].items():
        assert scores == pytest.approx(summary["eval"][split], abs=1e-5)


def test_training_examples_are_scored_as_they_were_trained_on(evaluated: Command, tmp_path: Path) -> None:
    """Wrong labels too: a step on all of them at a rate of nothing has the loss that is found afterwards."""
    directory = tmp_path / "run"
    flags = ["--cascade.strategy=lora", "--training.max_steps=1", "--training.batch_size=100", "--training.seed=3"]
    flags += ["--training.learning_rate=1e-12", "--tracking.tensorboard=false"]
    assert train(["--config", str(RECIPE), f"--output_dir={directory}", *flags], RECIPE) == 0
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    (step,) = [line for line in lines if line["event"] == "step"]
    assert evaluated(directory, "--splits=train", f"--output_dir={tmp_path / 'scores'}")[0] == 0
    assert metrics_of(tmp_path / "scores")["digits"]["train"]["loss"] == pytest.approx(step["loss"], abs=1e-5)


def test_a_run_is_scored_on_its_own_draw_and_length(stories: Path, shared_data: Path, tmp_path: Path) -> None:
    """Of dev another seed would draw training rows."""
    recipe = tmp_path / "run" / "config.yaml"
    recipe.parent.mkdir()
    rte = f"{{name: rte, data_dir: {shared_data / 'superglue' / 'RTE'}}}"
    recipe.write_text(f"task: {rte}\ntraining: {{seed: 2, max_length: 300}}\n")
    options = parse([str(recipe.parent), "--tasks=rte,cb", f"--output_dir={tmp_path / 'out'}"])
    assert (options.seed, options.max_lengths) == (2, {"rte": 300, "cb": None})
    given = ["--seed=0", "--max_length=200"]
    options = parse([str(recipe.parent), "--tasks=rte", *given, f"--output_dir={tmp_path / 'out'}"])
    assert (options.seed, options.max_lengths) == (0, {"rte": 200})


def test_what_was_scored_before_an_error_stays(
    evaluated: Command, stories: Path, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("lorasc_ds.generation.Generator.__call__", out_of_memory)
    flags = [
        str(stories),
        "--tasks=copa,squad",
        "--limit=2",
        f"--data_dir={shared_data}",
        f"--output_dir={tmp_path / 'out'}",
    ]
    code, _, errors = evaluated(*flags)
    assert (code, len(errors.splitlines())) == (2, 1)
    assert "an evaluation ran out of memory on 2 sequences of" in errors
    assert "--batch_size" in errors
    assert list(metrics_of(tmp_path / "out")) == ["copa"]
    assert not summary_of(tmp_path / "out")["complete"]


def test_release_folders_are_found_in_any_spelling(tmp_path: Path) -> None:
    for name in ("SST-2", "glue/RTE", "drop", "BoolQ.txt"):
        (tmp_path / name).mkdir(parents=True)
    found = {task: folder_of(tmp_path, task) for task in ("sst2", "rte", "drop", "drop_few_shot", "boolq")}
    expected = {"sst2": "SST-2", "rte": "glue/RTE", "drop": "drop", "drop_few_shot": "drop"}
    assert found == {task: tmp_path / name for task, name in expected.items()} | {"boolq": None}


BAD = {
    "unknown split": (["MODEL", "--tasks=rte", "--splits=tst", "--rte.data_dir=DATA/superglue/RTE"], "--splits tst: task rte has no such split; give dev or test"),
    "no split": (["MODEL", "--tasks=rte", "--splits=,"], "--splits ',': name splits that are scored"),
    "a stream": (["MODEL", "--tasks=text", "--splits=train", "--text.train_file=ROWS", "--text.streaming=true"], "--splits train: text.streaming is true; give --text.streaming false"),
    "run that is none": (["BROKEN"], "task is 3"),
    "no task": (["MODEL"], "--tasks is needed: MODEL is no run directory whose task could be taken"),
    "unknown task": (["MODEL", "--tasks=rt"], "--tasks rt: no such task; one of digits, text, sst2,"),
    "unknown flag": (["MODEL", "--tasks=rte", "--rte.dta_dir=x"], "unknown argument --rte.dta_dir=x; did you mean --rte.data_dir?"),
    "no files": (["MODEL", "--tasks=rte", "--data_dir=nowhere"], "--data_dir nowhere is no folder"),
    "expert of a model": (["MODEL", "--tasks=rte", "--expert=2", "--rte.data_dir=DATA/superglue/RTE"], "--expert 2: MODEL is no run directory"),
    "base of a model": (["MODEL", "--tasks=rte", "--base=x"], "--base x: MODEL is no PEFT adapter"),
    "offline hub": (["MODEL", "--tasks=rte"], "HF_HUB_OFFLINE"),
    "no model": (["nowhere", "--tasks=rte", "--rte.data_dir=DATA/superglue/RTE"], "model.name_or_path nowhere: its configuration cannot be loaded"),
    "bad value": (["MODEL", "--tasks=gsm8k", "--gsm8k.mode=fast"], "gsm8k.mode is 'fast'"),
    "no limit": (["MODEL", "--tasks=rte", "--limit=0"], "--limit is 0: a number from 1 on is needed"),
    "too long an answer": (["MODEL", "--tasks=gsm8k", "--gsm8k.data_dir=DATA/gsm8k"], "task gsm8k generates up to 512 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_command_is_one_line_and_leaves_nothing(
    evaluated: Command, stories: Path, shared_data: Path, tmp_path: Path, case: str
) -> None:
    arguments, message = BAD[case]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("task: 3")
    (tmp_path / "rows.jsonl").write_text('{"text": "a row"}\n' * 4)
    arguments = [one.replace("BROKEN", str(tmp_path / "broken")) for one in arguments]
    arguments = [one.replace("ROWS", str(tmp_path / "rows.jsonl")) for one in arguments]
    placed = [one.replace("MODEL", str(stories)).replace("DATA", str(shared_data)) for one in arguments]
    code, _, errors = evaluated(*placed, f"--output_dir={tmp_path / 'out'}")
    assert code == 2
    assert len(errors.splitlines()) == 1
    assert message.replace("MODEL", str(stories)) in errors
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_and_a_damaged_run_are_refused(evaluated: Command, run: Start, tmp_path: Path) -> None:
    assert "exists: give a folder that does not exist yet" in evaluated("x", f"--output_dir={tmp_path}")[2]
    directory = run(**{"training.epochs": 1}).directory
    flip(directory / "ledger" / "expert_0001.safetensors", 5000)
    code, _, errors = evaluated(directory, "--expert=1", f"--output_dir={tmp_path / 'out'}")
    assert (code, len(errors.splitlines())) == (4, 1)
