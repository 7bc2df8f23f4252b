"""Runs of several processes as users start them, and as they end where one of the processes fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, base_weights
from forking import Ended, Job, free_port, group, run
from safetensors.torch import load_file

from lorasc_ds.algorithm.ledger import Ledger, digest
from lorasc_ds.models import QUICKSTART_BASE

pytestmark = pytest.mark.timeout(600)  # the first of these tests waits for all launchers, each up to 200 s

SMALL = [
    "--training.epochs=2",
    "--task.train_examples=12",
    "--task.dev_examples=8",
    "--task.test_examples=10",
    "--training.max_grad_norm=null",
    "--training.select=best_dev",
    "--tracking.tensorboard=false",
]
BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
}
LAUNCHERS = {
    "torchrun": ["torchrun", "--standalone", "--nproc_per_node=2", "launch/train.py"],
    "torchrun-zero3": ["torchrun", "--standalone", "--nproc_per_node=2", "launch/train.py", "--deepspeed=ds_configs/zero3.json", "--model.dtype=bfloat16"],
    "accelerate-config_file": ["accelerate", "launch", "--config_file=ds_configs/accelerate/zero2.yaml", "--num_processes=2", "--main_process_port", "PORT", "launch/train.py"],
    "accelerate-use_deepspeed": ["accelerate", "launch", "--use_deepspeed", "--zero_stage=3", "--num_processes=2", "--main_process_port", "PORT", "launch/train.py", "--model.dtype=bfloat16"],
    "deepspeed": ["deepspeed", "--num_accelerators=2", "--master_port", "PORT", "launch/train.py", "--deepspeed", "ds_configs/zero1.json"],
    "python-zero3_offload": ["python", "launch/train.py", "--deepspeed=ds_configs/zero3_offload.json", "--training.micro_batch_size=2"],
}  # fmt: skip


def with_a_port(command: list[str]) -> list[str]:
    """Drawn as it is needed: what was free when the tests were read may be another's by now."""
    return [str(free_port()) if part == "PORT" else part for part in command]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], str]]:
    """Summary and printed text of the same short run under every launcher; two at a time, since launchers wait."""

    def launch(name: str) -> tuple[dict[str, Any], str]:
        directory = folder / name
        result = subprocess.run(
            [*with_a_port(LAUNCHERS[name]), f"--output_dir={directory}", *SMALL],
            cwd=ROOT,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        summary = json.loads((directory / "summary.json").read_text())
        return summary | {"directory": str(directory)}, result.stdout

    folder = tmp_path_factory.mktemp("launched")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(LAUNCHERS, pool.map(launch, LAUNCHERS), strict=True))


def test_every_launcher_starts_the_same_run(launched: dict[str, tuple[dict[str, Any], str]]) -> None:
    engines = {name: (summary["engine"], summary["world_size"]) for name, (summary, _) in launched.items()}
    assert engines == {
        "torchrun": ("ddp", 2),
        "torchrun-zero3": ("zero3", 2),
        "accelerate-config_file": ("zero2", 2),
        "accelerate-use_deepspeed": ("zero3", 2),
        "deepspeed": ("zero1", 2),
        "python-zero3_offload": ("zero3", 1),
    }
    digests = {name: summary["weights_sha256"] for name, (summary, _) in launched.items()}
    assert digests["torchrun"] == digests["accelerate-config_file"] == digests["deepspeed"]
    assert digests["torchrun-zero3"] == digests["accelerate-use_deepspeed"]
    losses = {name: summary["eval"]["dev"]["loss"] for name, (summary, _) in launched.items()}
    assert losses["python-zero3_offload"] == pytest.approx(losses["torchrun"], rel=1e-4)
    assert losses["torchrun-zero3"] == pytest.approx(losses["torchrun"], rel=2e-2)  # in bfloat16


def test_the_ledger_of_every_run_replays_to_its_weights_on_one_process(
    launched: dict[str, tuple[dict[str, Any], str]],
) -> None:
    for name, (summary, _) in launched.items():
        ledger = Ledger.load(Path(summary["directory"]) / "ledger")
        base = base_weights(QUICKSTART_BASE, list(ledger.weights), getattr(torch, ledger.base.dtype))
        assert digest(weight for _, weight in ledger.replay(base.__getitem__)) == summary["weights_sha256"], name


def test_every_launcher_saves_the_whole_model(launched: dict[str, tuple[dict[str, Any], str]]) -> None:
    """The adapted weights as trained (their digest is checked by the run itself), all others as they were."""
    for name, (summary, _) in launched.items():
        dtype = getattr(torch, summary["model"]["dtype"])
        base = {key: t.to(dtype) for key, t in load_file(QUICKSTART_BASE / "model.safetensors").items()}
        saved = load_file(Path(summary["directory"]) / "model" / "model.safetensors")
        assert {key: tensor.shape for key, tensor in saved.items()} == {key: t.shape for key, t in base.items()}, name
        changed = {key for key in base if not torch.equal(saved[key], base[key])}
        assert {key.split(".")[-2] for key in changed} == {"q_proj", "v_proj"}, name


def test_the_output_is_that_of_one_process(launched: dict[str, tuple[dict[str, Any], str]]) -> None:
    """Printed once, with what was derived from the number of processes, the engine and the merge path."""
    for name, (summary, printed) in launched.items():
        lines = printed.splitlines()
        processes = "1 process x 2" if summary["world_size"] == 1 else "2 processes x 1"
        assert lines.count(f"batch     4 = 2 micro x {processes} accumulation") == 1, name
        assert sum(line.startswith("expert 1/2 ") for line in lines) == 1
        (engine,) = [line for line in lines if line.startswith("engine ")]
        assert engine.startswith(f"engine    {summary['engine']}, merges local: ")


# Where, on which rank, under which engine, with which exit code and message. The one that hangs comes first: it waits.
FAILURES: dict[str, tuple[int, str | None, int, str]] = {
    "hang": (1, "ds_configs/zero3.json", 1, "rank 0: "),
    "boundary": (1, "ds_configs/zero3.json", 1, "rank 1: RuntimeError: a planted fault"),
    "divergence": (1, None, 3, "rank 1: a planted divergence"),
    "ledger": (0, "ds_configs/zero2.json", 4, "rank 0: "),
    "checkpoint": (0, None, 4, "rank 0: the checkpoint after step 2 could not be written: [Errno 28] No space left on device"),
    "save": (1, None, 1, "rank 1: RuntimeError: a planted fault"),
}  # fmt: skip


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Ended]]:
    """Directories of the runs of `FAILURES`, and how they ended, without a launcher that would end the other process."""
    folder = tmp_path_factory.mktemp("failed")
    jobs = []
    for place, (rank, engine, _, _) in FAILURES.items():
        arguments = [place, str(rank), f"--output_dir={folder / place}", *SMALL, "--training.ddp_timeout=10"]
        arguments += ["--training.checkpoint_steps=2", "--training.save_failures_allowed=0"]
        arguments += [] if engine is None else [f"--deepspeed={engine}"]
        jobs.append(Job("faulty_run:main", arguments, str(folder / f"{place}-log"), 90, group(2)))
    endings = run(*jobs, at_once=2)
    return {place: (folder / place, ended) for place, ended in zip(FAILURES, endings, strict=True)}


@pytest.mark.parametrize("place", FAILURES)
def test_one_process_that_fails_ends_all_with_one_message(place: str, failed: dict[str, tuple[Path, Ended]]) -> None:
    """In a boundary, before a file, in a save, and where one hangs."""
    _, _, code, message = FAILURES[place]
    directory, ended = failed[place]
    assert ended.codes == [code, code], ended.err
    assert ended.seconds < 60
    messages = [line for error in ended.err for line in error.splitlines() if re.match(r"error: |\w*Error: ", line)]
    assert len(messages) == 1, ended.err
    speaker = int(message.split()[1].rstrip(":"))
    assert messages[0] in ended.err[speaker]
    if code == 1:
        assert f"on rank {speaker} of 2" in ended.err[speaker]
    else:
        assert messages[0].startswith(f"error: {message}")
    status = json.loads((directory / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", code)
    assert message in status["message"] or (speaker == 0 and message.removeprefix("rank 0: ") in status["message"])
