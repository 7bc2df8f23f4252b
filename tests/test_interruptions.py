"""Runs that are killed, asked to stop, or have no disk left, at named points; then the same command again.

Each becomes the run that was never interrupted: weights, ledger, summary and every record, bit for bit. `LORASC_ALL_POINTS=1`
(in `.ci/long`) takes every point that a run passes, not a handful.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from forking import Job, run

RUN = [
    "--training.epochs=2",
    "--task.train_examples=14",  # four steps an epoch, the last of two examples
    "--task.dev_examples=6",
    "--task.test_examples=4",
    "--cascade.noise_intensity=1",
    "--cascade.experts=3",  # boundaries inside epochs
    "--adapter.dropout=0.1",
    "--training.micro_batch_size=2",
    "--training.checkpoint_steps=3",
    "--training.select=best_dev",
    "--tracking.log_steps=3",
    "--tracking.tensorboard=false",
]
SAVE = "checkpoints/.tmp-step_00000003_training"
KILLED = [
    "fsync .tmp-config.yaml#1:before",
    "step#1:before",
    f"fsync {SAVE}/state.json#1:before",
    f"fsync {SAVE}/manifest.json#1:before",
    "rename checkpoints/step_00000003_training#1:before",
    "rename checkpoints/step_00000003_training#1:after",
    "remove checkpoints/step_00000003_training#1:before",  # the rotation
    "clear#2:before",  # within the second boundary
    "replace ledger/expert_0002.safetensors#1:after",
    "noise#3:before",
    "evaluate#11:before",
    "rename model#1:before",
]
STOPPED = ["load#1:after", "merge#1:after", "evaluate#8:before", "rename checkpoints/step_00000003_training#1:before"]
TWICE = "step#5:before"
FULL = [f"fsync {SAVE}/tensors.safetensors#1:before"]


def carry_out(cases: list[dict[str, Any]], folder: Path, seconds: float) -> list[dict[str, Any]]:
    file = folder / "cases.json"
    file.write_text(json.dumps(cases))
    (ended,) = run(Job("interruptions:main", [str(file)], str(folder / "log"), seconds))
    assert ended.codes == [0], ended.err
    return json.loads(Path(f"{file}.done").read_text())


def summary(directory: Path) -> dict[str, Any]:
    """Without what a clock says."""
    return json.loads((directory / "summary.json").read_text()) | {"timing": None}


def records(directory: Path) -> list[dict[str, Any]]:
    """Of `metrics.jsonl`, without what a clock says and without the interruptions themselves."""
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    clock = {"seconds", "choosing_seconds", "tokens_per_second"}
    return [
        {key: value for key, value in record.items() if key not in clock}
        for record in found
        if record["event"] not in ("resumed", "warning")
    ]


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.rglob(".tmp-*")]


class Interrupted:
    """What became of the runs: `whole` was not interrupted, the others by point and action, twice each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        points = {"kill": KILLED, "terminate": STOPPED, "fill the disk": FULL}
        self.whole = folder / "whole"
        self.twice = folder / "twice"
        again = {"arguments": [f"--output_dir={self.twice}", *RUN]}
        signals = [(0.1, signal.SIGINT), (0.1, signal.SIGTERM), (1.5, signal.SIGINT)]  # the second is an echo
        cases = [
            {"arguments": [f"--output_dir={self.whole}", *RUN]},
            again | {"point": TWICE, "action": "wait", "signals": signals},
            again,
        ]
        if os.environ.get("LORASC_ALL_POINTS") == "1":
            (result,) = carry_out(cases[:1], folder, 120)
            shutil.rmtree(self.whole)
            passed = result["points"].splitlines()
            points = {"kill": passed, "terminate": passed, "fill the disk": FULL}
        self.places = {
            (action, point): folder / f"{action}{number}".replace(" ", "_")
            for action, chosen in points.items()
            for number, point in enumerate(chosen)
        }
        for (action, point), directory in self.places.items():
            again = {"arguments": [f"--output_dir={directory}", *RUN]}
            cases += [again | {"point": point, "action": action}, again]
        results = carry_out(cases, folder, 250 if len(cases) < 100 else 7200)
        self.points = results[0]["points"].splitlines()
        self.at_once, self.after_it = results[1:3]
        self.first = dict(zip(self.places, results[3::2], strict=True))
        self.second = dict(zip(self.places, results[4::2], strict=True))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    return Interrupted(tmp_path_factory.mktemp("interrupted"))


def test_every_point_that_is_named_is_passed(interrupted: Interrupted) -> None:
    assert {point for _, point in interrupted.places} <= set(interrupted.points)
    assert len(interrupted.points) > 250


def test_killed_anywhere_the_same_command_gives_the_run_that_was_never_killed(interrupted: Interrupted) -> None:
    agrees(interrupted, "kill")
    assert {first["code"] for (action, _), first in interrupted.first.items() if action == "kill"} == {-9}


def test_asked_to_stop_anywhere_it_leaves_a_checkpoint_and_goes_on_as_if_nothing_had_been(
    interrupted: Interrupted,
) -> None:
    agrees(interrupted, "terminate")
    for (action, point), first in interrupted.first.items():
        if action == "terminate" and first["code"] != 0:  # asked after the last safe point, it is done
            assert first["code"] == 75, (point, first["err"])
            assert "Traceback" not in first["err"]
            assert "asked to stop: SIGTERM" in first["err"]


def test_a_second_ctrl_c_stops_at_once_and_harms_nothing(interrupted: Interrupted) -> None:
    assert interrupted.at_once["code"] == 130
    assert "error: stopped at once by a second SIGINT; the last checkpoint is whole" in interrupted.at_once["err"]
    assert interrupted.after_it["code"] == 0
    assert summary(interrupted.twice) == summary(interrupted.whole)
    assert records(interrupted.twice) == records(interrupted.whole)


def test_a_full_disk_costs_one_checkpoint_and_says_so(interrupted: Interrupted) -> None:
    agrees(interrupted, "fill the disk")
    for (action, _), first in interrupted.first.items():
        if action == "fill the disk":
            assert first["code"] == 0, first["err"]
            assert (
                "the checkpoint after step 3 could not be written: [Errno 28] No space left on device" in first["out"]
            )


def agrees(interrupted: Interrupted, action: str) -> None:
    expected, expected_records = summary(interrupted.whole), records(interrupted.whole)
    ledger = (interrupted.whole / "ledger" / "ledger.json").read_text()
    for (of_action, point), directory in interrupted.places.items():
        if of_action == action:
            second = interrupted.second[of_action, point]
            assert second["code"] == 0, (point, second["err"])
            assert summary(directory) == expected, point
            assert records(directory) == expected_records, point
            assert (directory / "ledger" / "ledger.json").read_text() == ledger, point
            assert leftovers(directory) == [], point
