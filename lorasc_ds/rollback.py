"""A run goes back to what it was after one of its experts; the same command then goes on from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorasc_ds import run_directory
from lorasc_ds.algorithm.ledger import Ledger, LedgerError
from lorasc_ds.checkpoint import Checkpoint, Checkpoints, problem_of
from lorasc_ds.config import STRATEGIES
from lorasc_ds.errors import CheckpointError, ConfigError
from lorasc_ds.progress import Progress
from lorasc_ds.watch import until


def roll_back(directory: Path, experts: int) -> str:
    """Put the experts after the first `experts` aside, in `ledger/discarded/`, and the checkpoints after them away.

    Returns:
        what was done, in a line.

    Raises:
        CheckpointError: there is no whole checkpoint, or the ledger is damaged.
        ConfigError: the run cannot go back to that expert.
    """
    if experts < 1:
        raise ConfigError(f"--expert {experts}: experts count from 1; to begin anew, take another --output_dir")
    with run_directory.locked(directory):
        # Any whole checkpoint knows the settings of the run, and its totals: what was spent stays spent.
        checkpoints = Checkpoints(directory / "checkpoints", kept=1)
        newest, passed = checkpoints.newest(lambda checkpoint: None)
        if newest is None:
            raise CheckpointError(f"{directory}: no whole checkpoint to go back with; {'; '.join(passed)}")
        try:
            known = newest.state["ledger"]
            if Ledger.read(directory / "ledger").sha256(known["experts"]) != known["sha256"]:
                raise LedgerError(f"{directory / 'ledger' / 'ledger.json'} is not what was written (sha256 differs)")
            if experts > known["experts"]:
                raise LedgerError(f"the newest whole checkpoint knows of {known['experts']} experts, not of {experts}")
            ledger = Ledger.load(directory / "ledger", experts)
        except LedgerError as error:
            raise CheckpointError(str(error)) from error
        step = ledger.experts[-1].steps[1]
        name = Progress(step).name
        if problem_of(checkpoints.directory / name) is not None:
            selected = {key: tensor for key, tensor in newest.tensors.items() if key.startswith("selected.")}
            checkpoints.save(name, state_after(newest, ledger, step, directory), selected)
        # In this order, a crash leaves a run that can be rolled back again or goes on from the new checkpoint.
        run_directory.write_status(directory, "preempted", step, experts, f"rolled back to expert {experts}", 75)
        (directory / "summary.json").unlink(missing_ok=True)
        ledger.truncate(experts, keep=True)
        checkpoints.remove_after(name)
    return f"{directory} is as it was after expert {experts}, step {step}; the same command goes on from there"


def state_after(newest: Checkpoint, ledger: Ledger, step: int, directory: Path) -> dict[str, Any]:
    """The state of a checkpoint right after the last expert of `ledger`, where nothing of the optimizer goes on.

    Raises:
        ConfigError: something does.
    """
    experts = len(ledger.experts)
    kept = newest.state["optimizer_steps"]
    reasons = {
        "DoRA's magnitudes": ledger.adapter.method == "dora",
        "ReLoRA's pairs": STRATEGIES[ledger.strategy].optimizer == "pruned",
        "the task's head": any(name.startswith("head.") for name in kept),
    }
    for keeps in (reason for reason, holds in reasons.items() if holds):
        raise ConfigError(
            f"--expert {experts}: the moments of {keeps} go on from expert to expert, and only a checkpoint at the"
            f" end of one has them: there is none at step {step} (raise training.checkpoints_kept)"
        )
    selection = newest.state["selection"]
    if selection and selection["step"] > step:
        raise ConfigError(
            f"--expert {experts}: training.select best_dev holds the weights of step {selection['step']}, which is"
            f" after it, and those that were the best until step {step} are not known: go back to a later expert"
        )
    tracker = newest.state["tracker"]
    tracker = tracker | {"step": step, "expert": experts, "window": [], "after": {}}
    tracker |= {
        "boundary_seconds": tracker["boundary_seconds"][:experts],
        "metrics_bytes": bytes_until(directory / "metrics.jsonl", experts),
    }
    if "signs" in tracker:  # of a run of an earlier version they are not known
        tracker["signs"] = until(tracker["signs"], step)
    return newest.state | {
        "step": step,
        "phase": "merged",
        "expert": None,
        "ledger": {"experts": experts, "sha256": ledger.sha256()},
        "weights_checksum": None,
        "patience": [one for one in newest.state["patience"] if one[0] <= step],
        "optimizer_steps": {},
        "tracker": tracker,
    }


def bytes_until(metrics: Path, experts: int) -> int:
    """How much of `metrics.jsonl` had been written when that expert closed."""
    total = 0
    for line in metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []:
        total += len(line)
        record = json.loads(line)
        if record["event"] == "close" and record["expert"] == experts:
            return total
    return total
