"""What a run goes on from: looked for, compared with what is asked for now, and made ready in the run directory."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from lorasc_ds import run_directory
from lorasc_ds.algorithm.ledger import Ledger, LedgerError
from lorasc_ds.checkpoint import Checkpoint, Checkpoints, open_checkpoint
from lorasc_ds.config import Config
from lorasc_ds.contract import check_contract, check_override
from lorasc_ds.errors import CheckpointError, ConfigError

REMEDY = "give it back its value, or take another --output_dir"


def finished(directory: Path, config: Config, resume: str | Path, override: Collection[str]) -> dict[str, Any] | None:
    """The summary of the run in `directory`, where it is finished and nothing is asked for that it has not done.

    Raises:
        ConfigError, CheckpointError: the directory cannot be used like this.
    """
    check_override(override)
    run_directory.check_usable(directory, resume)
    if isinstance(resume, Path):
        return None
    summary = run_directory.finished_summary(directory)
    if summary is None:
        return None
    changed = check_contract(settings_of(directory), settings(config), override, REMEDY)
    return None if any(line.split()[0] in override for line in changed) else summary


def settings(config: Config) -> dict[str, Any]:
    return run_directory.flatten(config.model_dump(mode="json"))


def settings_of(directory: Path) -> dict[str, Any]:
    """Those of the run in `directory`: as its newest whole checkpoint has them, else as `config.yaml` does."""
    newest, _ = Checkpoints(directory / "checkpoints", kept=1).newest(lambda checkpoint: None)
    return run_directory.settings_of(directory) if newest is None else run_directory.flatten(newest.state["config"])


def find(
    directory: Path, config: Config, resume: str | Path, override: Collection[str], data_sha256: dict[str, str]
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from, None for a beginning; what was passed over and what differs, a line each.

    The directory is then as the checkpoint wants it: no newer ledger, no newer checkpoints, nothing of a dead run.

    Args:
        resume, override: as in `Invocation`.
        data_sha256: of the examples by split, as they are now.

    Raises:
        CheckpointError: there are checkpoints and none can be used, or there has to be one and there is none.
        ConfigError: settings or data are not those that the run began with.
    """
    checkpoints = Checkpoints(directory / "checkpoints", config.training.checkpoints_kept)
    if isinstance(resume, Path):
        chosen, lines = open_checkpoint(resume), []
        source = resume.resolve().parent.parent / "ledger"
        problem = problem_with_ledger(source, chosen)
        if problem is not None:
            raise CheckpointError(f"--resume {resume}: {problem}")
    else:
        source = directory / "ledger"
        chosen, lines = checkpoints.newest(lambda checkpoint: problem_with_ledger(source, checkpoint))
        if chosen is None and lines:
            raise CheckpointError(f"{directory}: no checkpoint can be used: {'; '.join(lines)}")
    if chosen is None:
        if resume == "must":
            raise CheckpointError(f"--resume must: {directory} holds no checkpoint; give --resume auto to begin anew")
        if (directory / "config.yaml").exists():
            if any((directory / "ledger").glob("expert_*")):  # else there is nothing to lose
                check_contract(run_directory.settings_of(directory), settings(config), (), REMEDY)
            lines.append(f"{directory} holds a run that ended before its first checkpoint: it begins anew")
        run_directory.clear(directory)
        return None, lines
    old = run_directory.flatten(chosen.state["config"])
    lines += [f"changed: {line}" for line in check_contract(old, settings(config), override, REMEDY)]
    check_data(chosen.state["data_sha256"], data_sha256)
    if isinstance(resume, Path) and source.resolve() != (directory / "ledger").resolve():
        if (directory / "config.yaml").exists():
            raise ConfigError(
                f"--resume {resume} is a checkpoint of another run than the one in --output_dir {directory}: give an"
                " empty --output_dir to go on there"
            )
        Ledger.load(source, chosen.state["ledger"]["experts"]).copy(directory / "ledger")
    else:
        checkpoints.remove_after(chosen.path.name)
    (directory / "summary.json").unlink(missing_ok=True)
    return chosen, lines


def problem_with_ledger(directory: Path, checkpoint: Checkpoint) -> str | None:
    """Why the ledger is not the one that the checkpoint was written beside, if it is not."""
    expected = checkpoint.state["ledger"]
    try:
        ledger = Ledger.load(directory, expected["experts"])
    except LedgerError as error:
        return str(error)
    if ledger.sha256() != expected["sha256"]:
        return f"{directory / 'ledger.json'} is not what was written (sha256 differs)"
    return None


def check_data(old: dict[str, str], new: dict[str, str]) -> None:
    """
    Raises:
        ConfigError: a split holds other examples than when the run began, or in another order.
    """
    changed = [
        f"{split} {old.get(split)} -> {new.get(split)}"
        for split in sorted(old | new)
        if old.get(split) != new.get(split)
    ]
    if changed:
        raise ConfigError(
            f"task: the examples are not those that the run began with (sha256 of {', '.join(changed)}): give it back"
            " its files and tokenizer, or take another --output_dir"
        )


def describe(chosen: Checkpoint, world_size: int, engine: str) -> str:
    """One line for the log: from where, and what is another now."""
    state = chosen.state
    text = f"resuming  after step {state['step']} ({state['phase']}), from {chosen.path}"
    if (state["world_size"], state["engine"]) != (world_size, engine):
        text += f"; written by {state['world_size']} x {state['engine']}, now {world_size} x {engine}"
    return text
