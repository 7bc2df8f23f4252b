"""The real command under the real launcher, once: the record it leaves, and that it asks for no network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
SMALL = [
    "--task.train_examples=12",
    "--task.dev_examples=8",
    "--task.test_examples=10",
    "--training.epochs=3",
    "--cascade.strategy=lorasc",
    "--tracking.log_steps=2",
]


def launch(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "launch/train.py", *arguments]
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode == 0:
        command = ["unshare", "-rn", *command]  # a network namespace without a network
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, timeout=250, check=False)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[bytes], Path]:
    directory = tmp_path_factory.mktemp("launched") / "run"
    return launch(f"--output_dir={directory}", *SMALL), directory


Launched = tuple[subprocess.CompletedProcess[bytes], Path]


def test_it_ends_well_and_says_what_to_do_next(launched: Launched) -> None:
    result, directory = launched
    assert result.returncode == 0, result.stderr.decode()
    printed = result.stdout.decode()
    lines = printed.splitlines()
    assert any(line.startswith("before training") for line in lines)
    assert [line.split("|")[0].strip() for line in lines if line.startswith("expert ")] == [
        "expert 1/3",
        "expert 2/3",
        "expert 3/3",
    ]
    assert any(line.split() == ["split", "metric", "before", "after"] for line in lines)
    assert f"tensorboard --logdir {directory / 'tensorboard'}" in printed
    assert b"\r" not in result.stdout + result.stderr  # no progress bar where there is no terminal
    assert b"real_accelerator" not in result.stdout + result.stderr  # no word of an engine that is not used


def test_the_run_directory_is_whole(launched: Launched) -> None:
    _, directory = launched
    assert {path.name for path in directory.iterdir()} == {
        ".lock", ".owner", "checkpoints", "config.yaml", "environment.json", "examples.json", "ledger", "metrics.jsonl",
        "model", "status.json", "summary.json", "tensorboard",
    }  # fmt: skip
    config = directory / "config.yaml"
    assert config.read_text().startswith("# lorasc_ds ")
    assert yaml.safe_load(config.read_text())["training"]["epochs"] == 3.0
    environment = json.loads((directory / "environment.json").read_text())
    assert environment["packages"].keys() >= {"torch", "transformers", "peft", "accelerate"}
    assert environment["command"][1:] == [f"--output_dir={directory}", *SMALL]
    assert json.loads((directory / "status.json").read_text()) == {
        "state": "done", "step": 9, "expert": 3, "message": "finished", "exit_code": 0
    }  # fmt: skip
    summary = json.loads((directory / "summary.json").read_text())
    assert summary.keys() >= {
        "strategy", "adapter", "engine", "world_size", "experts", "steps", "global_batch", "eval", "timing", "weights_sha256"
    }  # fmt: skip
    assert summary["timing"].keys() == {
        "train_seconds",
        "boundary_seconds",
        "checkpoint_seconds",
        "tokens_per_second",
        "peak_memory_bytes",
    }
    assert len(summary["timing"]["boundary_seconds"]) == 3
    assert summary["eval"].keys() == {"dev", "new_domain", "new_domain_blurred", "new_domain_noisy", "old_domain"}
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["event"] == "step"] == [2, 3, 4, 6, 8, 9]
    for record in (r for r in records if r["event"] == "step"):
        assert record.keys() == {"event", "step", "expert", "epoch", "loss", "lr", "grad_norm", "tokens_per_second"}


def test_tensorboard_has_one_run_with_every_curve(launched: Launched) -> None:
    _, directory = launched
    files = [path for path in (directory / "tensorboard").rglob("*") if path.is_file()]
    assert {path.parent for path in files} == {directory / "tensorboard"}
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    tags = events.Tags()
    splits = ("dev", "new_domain", "new_domain_blurred", "new_domain_noisy", "old_domain")
    assert set(tags["scalars"]) == {
        "train/loss", "train/dev_gap", "train/lr/pairs", "train/grad_norm", "perf/tokens_per_second",
        *(f"lorasc/open/{key}" for key in ("noise_intensity", "noise_scale", "noise_norm", "noise_change", "seconds")),
        *(f"lorasc/close/{key}" for key in ("slow_retention", "norm", "std", "overlap", "lost", "averaging_change", "drift", "noise_to_update", "seconds")),
        *(f"eval/digits/{split}/{metric}" for split in splits for metric in ("accuracy", "loss")),
    }  # fmt: skip
    assert set(tags["histograms"]) == {"lorasc/open/noise_scale_by_weight", "lorasc/close/std_by_weight"}
    assert tags["tensors"] == ["config/text_summary"]
    assert [event.step for event in events.Scalars("lorasc/close/norm")] == [3, 6, 9]
    assert [event.step for event in events.Scalars("eval/digits/dev/accuracy")] == [0, 3, 6, 9]
    hparams = {tag for tag in events.summary_metadata if tag.startswith("_hparams_")}
    assert hparams == {"_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"}


SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(scope="module")
def signalled(tmp_path_factory: pytest.TempPathFactory) -> dict[signal.Signals, tuple[int, str, Path]]:
    """Exit code, errors and directory of a run each, both at once, that got a signal in its second expert."""
    folder = tmp_path_factory.mktemp("signalled")
    command = [sys.executable, "launch/train.py", *SMALL, "--training.epochs=9999"]
    running = {
        signum: subprocess.Popen(
            [*command, f"--output_dir={folder / signum.name}"],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for signum in SIGNALS
    }
    found = {}
    try:
        for signum, process in running.items():
            assert process.stdout is not None
            while not process.stdout.readline().startswith(b"expert 2/"):
                assert process.poll() is None
            process.send_signal(signum)
        for signum, process in running.items():
            errors = process.communicate(timeout=60)[1].decode()
            found[signum] = process.returncode, errors, folder / signum.name
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return found


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_ends_the_run_in_order(
    signum: signal.Signals, signalled: dict[signal.Signals, tuple[int, str, Path]]
) -> None:
    code, errors, directory = signalled[signum]
    assert code == 75
    assert f"asked to stop: {signum.name}; left after step " in errors
    assert "Traceback" not in errors
    status = json.loads((directory / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 75)


def test_an_error_is_one_line_with_its_code_and_reaches_the_user_through_the_launcher() -> None:
    """accelerate turns every code into 1 and adds its own traceback; plain Python keeps the code and adds nothing."""
    line = "error: adapter.rank is 0 (--adapter.rank): needs to be greater than or equal to 1\n"
    plain = [sys.executable, "launch/train.py", "--adapter.rank=0"]
    with subprocess.Popen(plain, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        launched = launch("--adapter.rank=0")
        errors = process.communicate(timeout=100)[1]
    assert (process.returncode, errors) == (2, line)
    assert launched.returncode == 1
    assert line in launched.stderr.decode()
