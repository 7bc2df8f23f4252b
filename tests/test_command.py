"""The command in this process: how it ends, its code and its one line, and what it leaves behind."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import RECIPE
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel, LlamaForCausalLM

from lorasc_ds import run_directory
from lorasc_ds.config import Config
from lorasc_ds.run import next_commands
from lorasc_ds.train import main


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    small = ("--task.train_examples=12", "--task.dev_examples=8", "--task.test_examples=10", "--training.epochs=1")
    code = main([*(small if not any("task.name" in a for a in arguments) else ()), *arguments], RECIPE)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return code, "\n".join(errors)


def test_more_experts_than_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = outcome(capsys, f"--output_dir={tmp_path / 'out'}", "--cascade.experts=4")
    assert code == 2
    assert "cascade.experts is 4, but 1 epochs are only 3 optimizer steps" in error
    assert not (tmp_path / "out").exists()


def test_a_batch_or_a_warm_up_beyond_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = outcome(capsys, f"--output_dir={tmp_path / 'out'}", "--training.batch_size=13")
    assert code == 2
    assert "training.batch_size is 13, but there are only 12 training examples" in error
    code, error = outcome(capsys, f"--output_dir={tmp_path / 'out'}", "--training.warmup_steps=3")
    assert code == 2
    assert "training.warmup_steps is 3, but the run has only 3 optimizer steps" in error


def test_a_model_that_cannot_be_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = outcome(capsys, f"--output_dir={tmp_path / 'out'}", "--model.name_or_path=some/model")
    assert code == 2
    assert error.startswith("error: model.name_or_path some/model: its configuration cannot be loaded")


@pytest.mark.parametrize("damage", ["truncated", "no weights of a layer", "tokenizer", "config"])
def test_a_damaged_model_is_one_line_and_leaves_no_directory(
    damage: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tiny_folder / "model.safetensors"
    match damage:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "no weights of a layer":
            save_file({k: v for k, v in load_file(weights).items() if "layers.1" not in k}, weights, {"format": "pt"})
        case "tokenizer":
            (tiny_folder / "tokenizer.json").write_text("{}")
        case "config":
            config = json.loads((tiny_folder / "config.json").read_text())
            (tiny_folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}))
    code, error = outcome(capsys, f"--output_dir={tmp_path / 'out'}", f"--model.name_or_path={tiny_folder}")
    assert code == 2
    assert len(error.splitlines()) == 1
    assert error.startswith(f"error: model.name_or_path {tiny_folder}: ")
    assert not (tmp_path / "out" / "ledger").exists()


def test_quantised_and_bidirectional_models_are_refused(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tiny_folder / "config.json").write_text(json.dumps(quantised))
    where = (f"--output_dir={tmp_path / 'out'}", f"--model.name_or_path={tiny_folder}")
    code, error = outcome(capsys, *where)
    assert code == 2
    assert "has quantised weights" in error
    bert = BertConfig(vocab_size=40, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
    bert.initializer_range = 0.2
    BertLMHeadModel(bert).save_pretrained(tiny_folder)
    code, error = outcome(capsys, *where, "--adapter.target_modules=query,value")
    assert code == 2
    assert "BertLMHeadModel lets a token see the tokens after it" in error


def test_pickled_weights_are_refused(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny_folder / "model.safetensors").rename(tiny_folder / "pytorch_model.bin")
    code, error = outcome(capsys, f"--output_dir={tmp_path / 'out'}", f"--model.name_or_path={tiny_folder}")
    assert code == 2
    assert "model.safetensors" in error


def test_a_directory_with_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    code, error = outcome(capsys, f"--output_dir={tmp_path}")
    assert code == 2
    assert "holds something that is no run (thesis.tex): choose another --output_dir" in error
    assert outcome(capsys, f"--output_dir={tmp_path}", "--dry_run")[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "file").touch()
    assert outcome(capsys, f"--output_dir={tmp_path / 'file'}")[0] == 2


@pytest.mark.skipif(
    not Path("/proc/version").exists(), reason="needs a directory that even root cannot write, as in /proc"
)
def test_a_directory_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = outcome(capsys, "--output_dir=/proc/none")
    assert code == 2
    assert "--output_dir /proc/none: No such file or directory; choose a directory that can be written" in error


def test_a_finished_run_prints_its_summary_and_another_configuration_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = f"--output_dir={tmp_path / 'out'}"
    assert outcome(capsys, directory) == (0, "")
    metrics = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    assert (
        main(
            [
                directory,
                "--task.train_examples=12",
                "--task.dev_examples=8",
                "--task.test_examples=10",
                "--training.epochs=1",
            ],
            RECIPE,
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("{") :]) == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == metrics
    code, error = outcome(capsys, directory, "--cascade.strategy=lora")
    assert code == 2
    assert error.startswith("error: cascade.strategy lorasc -> lora: the run was begun otherwise")
    assert outcome(capsys, directory, "--resume=never")[0] == 2
    (tmp_path / "out" / "summary.json").unlink()
    code, error = outcome(capsys, directory)
    assert code == 4
    assert "summary.json of a finished run cannot be read" in error


def test_divergence_is_code_3_and_keeps_the_last_good_state(
    tiny_llama: LlamaForCausalLM, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama.model.norm.weight.data[0] = torch.inf
    tiny_llama.save_pretrained(tiny_folder)
    code, error = outcome(capsys, f"--output_dir={tmp_path / 'out'}", f"--model.name_or_path={tiny_folder}")
    assert code == 3
    assert error.startswith("error: step 1: the loss is nan")
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    assert (status["step"], status["expert"]) == (0, 1)
    assert json.loads((tmp_path / "out" / "ledger" / "ledger.json").read_text())["experts"] == []
    assert not (tmp_path / "out" / "model").exists()
    for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN is no JSON


def test_a_text_run_from_a_jsonl_to_a_lower_perplexity(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (shared_data / "gsm8k" / "train.jsonl").read_text().splitlines()[:40]
    (tmp_path / "questions.jsonl").write_text("\n".join(rows))
    code, error = outcome(
        capsys, f"--output_dir={tmp_path / 'out'}", "--task.name=text", f"--task.train_file={tmp_path / 'questions.jsonl'}",
        "--task.text_field=question", "--task.block_size=64", f"--model.name_or_path={shared_data / 'models' / 'stories260K'}",
        "--training.epochs=2", "--training.learning_rate=3e-3",
    )  # fmt: skip
    assert (code, error) == (0, "")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    before, after = summary["eval_before"]["dev"]["perplexity"], summary["eval"]["dev"]["perplexity"]
    assert after < 0.9 * before
    saved, base = (
        load_file(f / "model.safetensors") for f in (tmp_path / "out" / "model", shared_data / "models" / "stories260K")
    )
    assert saved.keys() == base.keys()  # its embeddings are tied
    changed = {name for name in saved if not torch.equal(saved[name], base[name])}
    assert changed == {name for name in saved if "q_proj" in name or "v_proj" in name}


def test_bad_data_is_one_line_and_code_2(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": oops}\n')
    code, error = outcome(
        capsys, f"--output_dir={tmp_path / 'out'}", "--task.name=text", f"--task.train_file={tmp_path / 'a.jsonl'}",
        f"--model.name_or_path={shared_data / 'models' / 'stories260K'}",
    )  # fmt: skip
    assert code == 2
    assert error == f"error: {tmp_path / 'a.jsonl'}:2: not JSON (Expecting value at column 10); mend the row"
    assert not (tmp_path / "out").exists()


def test_dry_run_prints_the_plan_and_loads_no_weights(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny_folder / "model.safetensors").unlink()
    arguments = [
        f"--output_dir={tmp_path / 'out'}",
        f"--model.name_or_path={tiny_folder}",
        "--dry_run",
        "--model.dtype=bfloat16",
    ]
    assert main(arguments, RECIPE) == 0
    printed = capsys.readouterr().out
    assert "steps     1000 = 40 epochs x 25; 40 experts of about 25 steps" in printed
    assert "batch     4 = 4 micro x 1 process x 1 accumulation" in printed
    assert "    1  steps 1 to 25" in printed
    assert printed.count("[[") == 4  # the legend and three examples
    assert "float32 accumulators" in printed
    assert not (tmp_path / "out").exists()


def test_the_next_command_is_one_that_works() -> None:
    config = Config.model_validate({"cascade": {"experts": 3}, "task": {"name": "digits"}})
    printed = next_commands(Path("my runs/one"), config)
    command = shlex.split(printed.splitlines()[-1])
    assert command[:3] == ["accelerate", "launch", "launch/train.py"]
    assert command[command.index("--config") + 1] == "my runs/one/config.yaml"
    assert command[command.index("--output_dir") + 1] == "my runs/one-lora"
    assert command[command.index("--cascade.experts") + 1] == "null"
    bare = {"training": {"save_model": False}, "tracking": {"tensorboard": False}, "task": {"name": "digits"}}
    printed = next_commands(Path("one"), Config.model_validate(bare))
    assert "merged model" not in printed
    assert "tensorboard --logdir" not in printed


def test_the_commit_says_whether_the_code_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that studies publish beside the code change nothing of what a run computes."""
    code, results = tmp_path / "package" / "module.py", tmp_path / "launch" / "studies" / "results" / "tables.md"
    monkeypatch.setattr(run_directory, "__file__", str(code))
    for file in (code, results):
        file.parent.mkdir(parents=True)
        file.write_text("one\n")
    assert run_directory.git_commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert run_directory.git_commit() == head
    results.write_text("two\n")
    (tmp_path / "notes").write_text("of no repository\n")
    assert run_directory.git_commit() == head
    code.write_text("two\n")
    assert run_directory.git_commit() == f"{head}-dirty"
