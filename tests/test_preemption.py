"""One run under every launcher in turn, whose launcher is ended, each with another engine or world size; then a restart."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import psutil
import pytest
from conftest import RECIPE, ROOT, base_weights
from test_processes import ENVIRONMENT, with_a_port

from lorasc_ds.algorithm.ledger import Ledger, digest
from lorasc_ds.models import QUICKSTART_BASE
from lorasc_ds.train import main

SETTINGS = [
    "--training.epochs=12",
    "--cascade.experts=5",
    "--training.learning_rate=1e-3",
    "--training.micro_batch_size=2",
    "--training.max_grad_norm=null",
    "--training.evaluate=end",
    "--training.checkpoint_steps=null",  # every one is made because the run was asked to stop
    "--adapter.dropout=0.1",
    "--task.train_examples=40",  # ten steps an epoch
    "--task.dev_examples=8",
    "--task.test_examples=4",
    "--tracking.log_steps=1",
    "--tracking.tensorboard=false",
]
STEPS = 120


STAGES: list[tuple[list[str], bool]] = [
    (["deepspeed", "--num_accelerators=2", "--master_port", "PORT", "launch/train.py", "--deepspeed", "ds_configs/zero3.json"], True),
    (["accelerate", "launch", "launch/train.py"], True),
    (["torchrun", "--standalone", "--nproc_per_node=2", "launch/train.py", "--deepspeed=ds_configs/zero2.json"], True),
    (["torchrun", "--standalone", "--nproc_per_node=2", "--max-restarts=1", "tests/faulty_run.py", "death", "1", "--deepspeed=ds_configs/zero3.json"], False),
]  # fmt: skip


def status(directory: Path) -> dict[str, object]:
    return json.loads((directory / "status.json").read_text())


def steps_taken(directory: Path) -> int:
    """By `metrics.jsonl`."""
    if not (directory / "metrics.jsonl").exists():
        return 0
    lines = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory after all stages; every stage but the last is stopped and is seen to have left in order."""
    directory = tmp_path_factory.mktemp("preempted") / "run"
    environment = ENVIRONMENT | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # for torchrun's restart
    taken = 0
    for number, (command, stopped) in enumerate(STAGES):
        log = directory.with_name(f"stage{number}")
        with log.open("w") as file:
            launcher = psutil.Popen(
                [*with_a_port(command), f"--output_dir={directory}", *SETTINGS],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=file,
            )
        if not stopped:
            assert launcher.wait(120) == 0, log.read_text()
            continue
        deadline = time.monotonic() + 90
        while steps_taken(directory) < taken + 5:
            assert time.monotonic() < deadline, log.read_text()
            assert launcher.is_running(), log.read_text()
            time.sleep(0.05)
        workers = launcher.children(recursive=True)
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(60)  # it may end first, and then nobody waits for the processes it has started
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive, log.read_text()
        assert status(directory)["state"] == "preempted", log.read_text()
        assert status(directory)["exit_code"] == 75
        before, taken = taken, int(str(status(directory)["step"]))
        assert before + 5 <= taken < STEPS, log.read_text()
    return directory


def test_it_goes_on_from_every_launcher_to_the_end(run: Path) -> None:
    assert status(run) | {"expert": 0} == {
        "state": "done",
        "step": STEPS,
        "expert": 0,
        "message": "finished",
        "exit_code": 0,
    }
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["event"] == "step"] == list(range(1, STEPS + 1))
    assert sum(record["event"] == "resumed" for record in records) == len(STAGES) - 1
    logs = [run.with_name(f"stage{number}").read_text() for number in range(len(STAGES))]
    assert "written by 2 x zero3, now 1 x no DeepSpeed" in logs[1]


def test_its_ledger_gives_its_weights(run: Path) -> None:
    ledger = Ledger.load(run / "ledger")
    base = base_weights(QUICKSTART_BASE, list(ledger.weights))
    summary = json.loads((run / "summary.json").read_text())
    assert digest(weight for _, weight in ledger.replay(base.__getitem__)) == summary["weights_sha256"]


def test_it_is_the_run_that_one_process_makes_without_a_stop(run: Path, tmp_path: Path) -> None:
    """The losses of every step, within what ZeRO-3 adds up in another order."""
    assert main([f"--output_dir={tmp_path / 'whole'}", *SETTINGS], RECIPE) == 0

    def losses(directory: Path) -> list[float]:
        records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
        return [record["loss"] for record in records if record["event"] == "step"]

    assert losses(run) == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)
