"""Faults of numbers, disks and neighbours: what is said, with which code, and what is left."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import RECIPE

from lorasc_ds import checkpoint as checkpoint_module
from lorasc_ds import run_directory, trainer
from lorasc_ds.checkpoint import Checkpoints
from lorasc_ds.encoded import EncodedExample, ScoredTokens
from lorasc_ds.errors import ConfigError, StoppedError
from lorasc_ds.progress import Progress
from lorasc_ds.stopping import Stopping, is_launcher
from lorasc_ds.text_reading import repeated
from lorasc_ds.train import main
from lorasc_ds.watch import LossWatch

SMALL = ["--training.epochs=2", "--task.train_examples=12", "--task.dev_examples=6", "--task.test_examples=2", "--training.checkpoint_steps=1", "--tracking.tensorboard=false", "--tracking.log_steps=1"]  # fmt: skip


def command(directory: Path, *flags: str) -> int:
    return main([f"--output_dir={directory}", *SMALL, *flags], RECIPE)


def records(directory: Path, event: str) -> list[dict[str, Any]]:
    found = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [record for record in found if record["event"] == event]


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the loss of some micro batches, counted from 0, not finite."""

    def spoil(*steps: int) -> None:
        summed_loss, calls = trainer.summed_loss, iter(range(1000))

        def loss(*arguments: Any) -> torch.Tensor:
            return summed_loss(*arguments) * (torch.nan if next(calls) in steps else 1)

        monkeypatch.setattr(trainer, "summed_loss", loss)

    return spoil


def test_a_loss_that_is_not_finite_ends_the_run_with_the_examples_named(
    spoiled: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoiled(2)
    assert command(tmp_path / "run") == 3
    error = capsys.readouterr().err
    assert error.startswith("error: step 3: the loss is nan and the gradient's norm nan; its examples: ")
    assert "stopped before the update" in error
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 3, 2)
    assert Checkpoints(tmp_path / "run" / "checkpoints", 9).names()[-1] == "step_00000002_training"


def test_steps_that_are_not_finite_can_be_left_out_up_to_a_cap(
    spoiled: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoiled(1, 4)
    assert command(tmp_path / "run", "--training.non_finite=skip") == 0
    printed = capsys.readouterr().out
    assert "warning   step 2: the loss is nan" in printed
    assert "left out, number 2" in printed
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_steps"] == 2
    assert [record["step"] for record in records(tmp_path / "run", "step")] == [1, 3, 4, 6]
    spoiled(0, 1)
    assert command(tmp_path / "capped", "--training.non_finite=skip", "--training.max_skipped_steps=1") == 3
    assert "more than training.max_skipped_steps 1 steps were left out" in capsys.readouterr().err


def test_a_loss_spike_is_told_once() -> None:
    watch = LossWatch()
    losses = [1.0] * 19 + [9.0] + [1.0] * 5 + [2.1, 2.2, 2.3] + [1.0, 2.5]
    told = [index for index, loss in enumerate(losses) if watch.spike(loss) is not None]
    assert told == [25, 29]  # not before twenty steps; the second and third in a row belong to the first


def test_out_of_memory_says_what_to_lower(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(trainer, "summed_loss", full)
    assert command(tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: step 1: a micro batch ran out of memory on 4 sequences of 66 tokens: lower training."
    )
    assert error.count("\n") == 1


def test_a_full_disk_is_seen_before_it_is_written_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage

    def nearly_full(path: Path) -> Any:
        return SimpleNamespace(free=1 << 20) if len(list(Path(path).glob("step_*"))) >= 2 else usage(path)

    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", nearly_full)
    assert command(tmp_path / "run", "--training.save_failures_allowed=1") == 4
    printed = capsys.readouterr()
    assert "warning   the checkpoint after step 3 could not be written: disk full: a checkpoint needs 1." in printed.out
    assert "1.0 MiB are free" in printed.out
    assert "after step 4 could not be written" in printed.err
    assert "free some space and run the same command again" in printed.err
    monkeypatch.undo()
    assert command(tmp_path / "run") == 0
    assert "resuming  after step 2 (training)" in capsys.readouterr().out


def test_saves_never_leave_less_than_there_was(tmp_path: Path) -> None:
    """Old ones go only after a new one is there; a damaged one does not count, and is replaced."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", kept=2)
    names = [Progress(step).name for step in range(4)]
    for step, name in enumerate(names):
        checkpoints.save(name, {"step": step}, {"x": torch.ones(3)})
        assert name in checkpoints.names()
        checkpoints.rotate()
    assert checkpoints.names() == names[2:]
    last = checkpoints.directory / names[3]
    os.truncate(last / "tensors.safetensors", 10)
    (checkpoints.directory / ".tmp-step_9").mkdir()
    (checkpoints.directory / "my own copy").mkdir()
    (checkpoints.directory / "notes.txt").touch()
    checkpoints.rotate()
    assert checkpoints.names() == names[2:]
    newest, passed = checkpoints.newest(lambda checkpoint: None)
    assert newest is not None
    assert newest.state == {"step": 2}
    assert passed == [f"checkpoint {names[3]} is not used: {last / 'tensors.safetensors'} has 10 bytes, not 76"]
    checkpoints.save(names[3], {"step": 3}, {"x": torch.ones(3)})
    newest, passed = checkpoints.newest(lambda checkpoint: None)
    assert (newest.state if newest else None, passed) == ({"step": 3}, [])
    assert list(checkpoints.directory.glob(".tmp-*")) == []
    before = (last / "manifest.json").stat().st_mtime_ns
    checkpoints.save(names[3], {"step": 3}, {"x": torch.ones(3)})
    assert (last / "manifest.json").stat().st_mtime_ns == before
    assert {"my own copy", "notes.txt"} <= {path.name for path in checkpoints.directory.iterdir()}


def hold(directory: Path, taken: Any, release: Any) -> None:
    with run_directory.locked(directory):
        taken.set()
        release.wait(60)


def test_a_second_run_in_one_directory_is_told_who_is_there(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    taken, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, taken, release))
    other.start()
    assert taken.wait(30)
    with pytest.raises(ConfigError, match=f"is in use by process {other.pid} on "), run_directory.locked(tmp_path):
        pass
    assert other.pid is not None
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    with run_directory.locked(tmp_path):  # the lock went with the process
        pass


def test_no_secret_of_the_environment_and_only_readable_files_are_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecretvalue")
    monkeypatch.setattr("sys.argv", ["launch/train.py", "--config=https://me:hf_verysecretvalue@host/x.yaml"])
    before = os.umask(0o022)
    try:
        assert command(tmp_path / "run") == 0
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(b"hf_verysecretvalue" in path.read_bytes() for path in files)
    assert "<HF_TOKEN>" in (tmp_path / "run" / "environment.json").read_text()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in files}
    assert set(modes.values()) == {0o644}, modes
    weights = {path.suffix for path in files if path.stat().st_size > 50_000}
    assert weights <= {".safetensors"}


def test_a_second_signal_ends_at_once_but_not_the_echo_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([10.0, 10.2, 11.5])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    stopping = Stopping(tmp_path)
    stopping.hear(signal.SIGINT, None)
    stopping.hear(signal.SIGTERM, None)  # from a launcher that passes the terminal's Ctrl-C on
    with pytest.raises(StoppedError, match="stopped at once by a second SIGINT") as caught:
        stopping.hear(signal.SIGINT, None)
    assert caught.value.exit_code == 130


@pytest.mark.parametrize(
    ("command_line", "expected"),
    [
        ("python /venv/bin/accelerate launch launch/train.py", True),
        ("/usr/bin/python3 -u -m deepspeed.launcher.launch --world_info=x", True),
        ("python /venv/bin/torchrun --nproc_per_node=2 launch/train.py", True),
        ("python /venv/bin/deepspeed launch/train.py --deepspeed x.json", True),
        ("bash run.sh accelerate launch", False),
        ("python launch/train.py --deepspeed deepspeed", False),
    ],
)
def test_launchers_are_known_by_their_command(command_line: str, expected: bool) -> None:
    assert is_launcher(command_line.split()) is expected


def test_another_format_is_named(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", kept=2)
    checkpoints.save(Progress(1).name, {}, {})
    manifest = tmp_path / "checkpoints" / Progress(1).name / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 7'))
    assert checkpoints.newest(lambda checkpoint: None)[1] == [
        f"checkpoint {Progress(1).name} is not used: {manifest} has format 7, and this version reads 1"
    ]


def test_a_file_outside_of_the_run_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A ledger or a manifest that names one is refused."""
    assert command(tmp_path / "run") == 0
    capsys.readouterr()
    shutil.copy(tmp_path / "run" / "ledger" / "expert_0001.safetensors", tmp_path / "outside.safetensors")
    ledger = tmp_path / "run" / "ledger" / "ledger.json"
    ledger.write_text(ledger.read_text().replace('"expert_0001', '"../../outside'))
    (tmp_path / "run" / "status.json").unlink()
    assert command(tmp_path / "run") == 4
    assert "outside.safetensors is missing or not the file that was written" in capsys.readouterr().err
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", 2)
    manifest = checkpoints.directory / checkpoints.names()[-1] / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"state.json"', '"../state.json"'))
    assert "lists ../state.json" in checkpoints.newest(lambda checkpoint: None)[1][0]


def test_a_recipe_is_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"training: !!python/object/apply:os.system ['touch {tmp_path / 'executed'}']\n")
    assert command(tmp_path / "run", f"--config={recipe}") == 2
    assert "could not determine a constructor" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


def test_code_that_comes_with_a_model_is_not_run(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (tiny_folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    (tiny_folder / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    assert command(tmp_path / "run", f"--model.name_or_path={tiny_folder}") == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


def test_repeated_examples_are_counted() -> None:
    example = [EncodedExample(str(n), (ScoredTokens((1, n), 1),), (0,)) for n in (2, 3, 3, 4)]
    told = list(repeated({"train": example[:3], "dev": example[1:2], "test": example[3:]}))
    assert told == [
        "1 of 3 training examples are repetitions of others",
        "1 of 1 examples of dev are training examples too: its score is no test",
    ]
