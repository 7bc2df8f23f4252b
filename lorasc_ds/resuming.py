"""What a run goes on from: looked for, compared with what is asked for now, and then made the run's own."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from lorasc_ds import run_directory
from lorasc_ds.algorithm.ledger import Ledger, LedgerError
from lorasc_ds.algorithm.plan import Plan
from lorasc_ds.checkpoint import Checkpoint, Checkpoints, open_checkpoint
from lorasc_ds.config import Config
from lorasc_ds.contract import changes, check_contract, check_override
from lorasc_ds.errors import CheckpointError, ConfigError
from lorasc_ds.progress import Progress, check_plan

REMEDY = "give it back its value, or take another --output_dir"


def finished(directory: Path, config: Config, resume: str | Path, override: Collection[str]) -> dict[str, Any] | None:
    """The summary of the run in `directory`, where it is finished and nothing is asked for that it has not done.

    Raises:
        ConfigError, CheckpointError: the directory cannot be used like this.
    """
    check_override(override)
    run_directory.check_usable(directory, resume)
    if isinstance(resume, Path) and run_directory.origin_of(directory) != resume.resolve():
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
    directory: Path,
    config: Config,
    resume: str | Path,
    override: Collection[str],
    data_sha256: dict[str, str],
    plan: Plan,
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from, None for a beginning; what was passed over and what differs, a line each.

    Nothing is changed but by a fork: a checkpoint of another run and its ledger are copied into an empty directory.

    Args:
        resume, override: as in `Invocation`.
        data_sha256: of the examples by split, as they are now.
        plan: of the run as it is asked for now.

    Raises:
        CheckpointError: there are checkpoints and none can be used, or there has to be one and there is none.
        ConfigError: settings or data are not those that the run began with.
    """
    checkpoints = Checkpoints(directory / "checkpoints", config.training.checkpoints_kept)
    ledger, lines = directory / "ledger", []
    origin = run_directory.origin_of(directory)
    if isinstance(resume, Path) and not (origin == resume.resolve() and checkpoints.names()):
        chosen = open_checkpoint(resume)
        ledger = resume.resolve().parent.parent / "ledger"
        problem = problem_with_ledger(ledger, chosen)
        if problem is not None:
            raise CheckpointError(f"--resume {resume}: {problem}")
    else:
        chosen, lines = checkpoints.newest(lambda checkpoint: problem_with_ledger(ledger, checkpoint))
        if chosen is None and lines:
            raise CheckpointError(f"{directory}: no checkpoint can be used: {'; '.join(lines)}")
    if chosen is None:
        if resume == "must":
            raise CheckpointError(f"--resume must: {directory} holds no checkpoint; give --resume auto to begin anew")
        return None, begin_anew(directory, config, plan, origin)
    old = run_directory.flatten(chosen.state["config"])
    lines += [f"changed: {line}" for line in check_contract(old, settings(config), override, REMEDY)]
    passed = {"train"} if "task.train_file" in override else set()
    check_data(
        *({k: v for k, v in one.items() if k not in passed} for one in (chosen.state["data_sha256"], data_sha256))
    )
    progress, opened = Progress(chosen.state["step"], chosen.state["phase"]), chosen.state["expert"]
    closed = [record.steps for record in Ledger.load(ledger, chosen.state["ledger"]["experts"]).experts]
    check_plan(plan, progress, opened and opened["index"], closed)
    return (chosen if ledger == directory / "ledger" else own(directory, chosen, ledger, checkpoints)), lines


def begin_anew(directory: Path, config: Config, plan: Plan, origin: Path | None) -> list[str]:
    """What to say where a run in `directory` ended without a checkpoint.

    Raises:
        CheckpointError: it got too far to be thrown away, or was a fork that was not complete yet.
        ConfigError: it was another run, which has closed experts.
    """
    if origin is not None:
        raise CheckpointError(f"{directory} is a fork of {origin} that was cut short: give --resume {origin} again")
    if not (directory / "config.yaml").exists():
        return []
    try:
        closed = len(Ledger.read(directory / "ledger").experts)
    except LedgerError:
        closed = 0
    if closed:  # else there is nothing to lose
        check_contract(run_directory.settings_of(directory), settings(config), (), REMEDY)
    if closed >= plan.experts:
        raise CheckpointError(
            f"{directory} holds all {closed} experts of the run but no checkpoint: launch/export.py makes the model of"
            " them; to train again take another --output_dir"
        )
    return [f"{directory} holds a run that ended before its first checkpoint: it begins anew"]


def own(directory: Path, chosen: Checkpoint, ledger: Path, checkpoints: Checkpoints) -> Checkpoint:
    """Copy a checkpoint of another run and its ledger; or find that it is the directory's own.

    Raises:
        ConfigError: there is another run in `directory`.
    """
    if ledger.resolve() == (directory / "ledger").resolve():
        return chosen
    if checkpoints.names() or (directory / "config.yaml").exists():
        raise ConfigError(
            f"--resume {chosen.path} is a checkpoint of another run than the one in --output_dir {directory}: give an"
            " empty --output_dir to go on there"
        )
    run_directory.write_origin(directory, chosen.path)
    Ledger.load(ledger, chosen.state["ledger"]["experts"]).copy(directory / "ledger")
    checkpoints.save(chosen.path.name, chosen.state, chosen.tensors)
    return Checkpoint(checkpoints.directory / chosen.path.name, chosen.state, chosen.tensors)


def settle(directory: Path, checkpoint: Checkpoint, ledger: Ledger) -> None:
    """The run goes on from this checkpoint: remove what was later, and what said that it was finished."""
    ledger.truncate(checkpoint.state["ledger"]["experts"], keep=False)
    Checkpoints(directory / "checkpoints", kept=1).remove_after(checkpoint.path.name)
    (directory / "summary.json").unlink(missing_ok=True)


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
    changed = [f"{split} {before} -> {now}" for split, (before, now) in changes(old, new).items()]
    if changed:
        raise ConfigError(
            f"task: the examples are not those that the run began with (sha256 of {', '.join(changed)}): give it back"
            " its files and tokenizer, or take another --output_dir; where training rows were mended, add"
            " --resume_override task.train_file"
        )


def describe(chosen: Checkpoint, world_size: int, stage: int | None) -> str:
    """One line for the log: from where, and what is another now.

    Args:
        stage: of ZeRO; None without DeepSpeed.
    """

    def layout(processes: int, zero: int | None) -> str:
        return f"{processes} x {'no DeepSpeed' if zero is None else f'zero{zero}'}"

    state = chosen.state
    before, now = layout(state["world_size"], state["zero_stage"]), layout(world_size, stage)
    changed = "" if before == now else f"; written by {before}, now {now}"
    return f"resuming  after step {state['step']} ({state['phase']}), from {chosen.path}{changed}"
