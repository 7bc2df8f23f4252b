"""One run, from the command line to its summary: checked, begun or taken up again, carried out, ended in order."""

from __future__ import annotations

import errno
import json
import math
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers.utils.logging import disable_progress_bar

from lorasc_ds import models, resuming, run_directory
from lorasc_ds.backends import Backend
from lorasc_ds.checkpoint import Checkpoint, Checkpoints, read
from lorasc_ds.cli import Invocation
from lorasc_ds.config import Config
from lorasc_ds.dry_run import report
from lorasc_ds.errors import CheckpointError, PreemptedError
from lorasc_ds.in_flight import InFlight
from lorasc_ds.layer_compilation import check_compilation
from lorasc_ds.loop import count, train
from lorasc_ds.memory import gpu_bytes
from lorasc_ds.prefetching import explaining_dead_workers
from lorasc_ds.preparation import Preparation, attach_adapters, prepare
from lorasc_ds.profiling import Profile
from lorasc_ds.progress import Progress
from lorasc_ds.recipes import to_yaml
from lorasc_ds.reports import results_table
from lorasc_ds.safe_points import SafePoints, restore
from lorasc_ds.sharding import (
    Launch,
    Processes,
    detect,
    failing_together,
    sharded_loading,
    speaking_once_per_node,
)
from lorasc_ds.stopping import Stopping
from lorasc_ds.tensorboard import TensorBoard
from lorasc_ds.tracking import Tracker
from lorasc_ds.trainer import Trainer, start_engine
from lorasc_ds.warning_signs import Setting
from lorasc_ds.watch import SignWatch


def next_commands(directory: Path, config: Config) -> str:
    other = "lora" if config.cascade.strategy != "lora" else "lorasc"
    experts = " --cascade.experts null" if config.cascade.experts is not None else ""
    recipe, output_dir = shlex.quote(str(directory / "config.yaml")), shlex.quote(f"{directory}-{other}")
    model = f"the merged model is in {directory / 'model'}, " if config.training.save_model else ""
    lines = [f"{model}the record in {directory}; next:"]
    if config.tracking.tensorboard:
        lines.append(f"  tensorboard --logdir {shlex.quote(str(directory / 'tensorboard'))}")
    lines.append(
        f"  accelerate launch launch/train.py --config {recipe} --cascade.strategy {other}{experts}"
        f" --output_dir {output_dir}"
    )
    return "\n".join(lines)


def deterministic() -> None:
    """The same bits at every run, on an accelerator too; an operation that cannot is named in a warning."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 (torch declares no such name)


def check(invocation: Invocation) -> tuple[Launch, Preparation] | None:
    """All that can be known before processes meet and weights are loaded; None where nothing is left to do."""
    config, directory = invocation.config, invocation.output_dir
    summary = resuming.finished(directory, config, invocation.resume, invocation.resume_override)
    launch = detect(invocation.deepspeed)
    main = launch.rank == 0
    if summary is not None:
        if main:
            print(f"{directory} is finished; its summary:\n{json.dumps(summary, indent=2)}")
        if not invocation.dry_run:
            return None
    rank, processes = (launch.rank, launch.world_size) if invocation.gpus is None else (0, invocation.gpus)
    preparation = prepare(config, rank, processes)
    if config.training.compile:
        check_compilation(preparation.shape, launch.stage)
    if main:
        notes = [f"note      {launch.note}"] if launch.note else []
        print("\n".join((f"recipe    {invocation.recipe}", *preparation.derived_numbers(), *notes)), flush=True)
    if not invocation.dry_run:
        return launch, preparation
    if main:
        print(report(preparation, gpu_bytes(invocation.gpu_memory)))
    return None


def run(invocation: Invocation, stopping: Stopping) -> None:
    """Carry out what the command line asks for.

    Raises:
        RunError: with the exit code of DESIGN's contract.
    """
    deterministic()
    if not sys.stderr.isatty():
        disable_progress_bar()
    with speaking_once_per_node(stopping.asked):
        checked = check(invocation)
    if checked is None:
        return
    launch, preparation = checked
    config = invocation.config
    accelerator = start_engine(launch, preparation)
    processes = Processes(launch.rank, launch.world_size, accelerator.device)
    main = launch.rank == 0
    tracker: Tracker | None = None

    def record_failure(message: str, exit_code: int) -> None:
        if tracker is not None:
            tracker.failed(message, exit_code)

    with (
        failing_together(launch.rank, launch.world_size, record_failure),
        run_directory.locked(invocation.output_dir) if main else nullcontext(),
    ):
        checkpoint = choose(invocation, preparation, launch, processes)
        try:
            with (
                tracker_of(invocation.output_dir, preparation, checkpoint, main) as tracker,
                explaining_full_disk(invocation.output_dir),
            ):
                summary = carry_out(invocation, launch, preparation, accelerator, stopping, tracker, checkpoint)
        except PreemptedError:
            if main:
                stopping.forget()
            processes.wait()  # a launcher ends all as soon as one is gone
            raise
    if main:
        print(results_table(summary["eval_before"], summary["eval"]))
        print(next_commands(invocation.output_dir, config))
    accelerator.end_training()


def choose(invocation: Invocation, preparation: Preparation, launch: Launch, processes: Processes) -> Checkpoint | None:
    """What the run goes on from, the same for all processes; where it begins, its directory is made ready."""
    path = None
    if processes.main:
        directory, config = invocation.output_dir, invocation.config
        try:
            chosen, lines = resuming.find(
                directory,
                config,
                invocation.resume,
                invocation.resume_override,
                preparation.reading.data_sha256,
                preparation.plan,
            )
        except CheckpointError as error:  # a script that reads an older status would start the run again and again
            run_directory.write_status(directory, "failed", 0, 0, str(error), error.exit_code)
            raise
        if chosen is not None:
            path = chosen.path
            lines.append(resuming.describe(chosen, launch.world_size, launch.stage))
        print("".join(f"resume    {line}\n" for line in lines), end="", flush=True)
        if chosen is None:
            run_directory.clear(directory)
            run_directory.begin(directory, config)
    path = processes.share(path)
    return None if path is None else read(path)


def tracker_of(directory: Path, preparation: Preparation, checkpoint: Checkpoint | None, main: bool) -> Tracker:
    config, plan, data = preparation.config, preparation.plan, preparation.data
    settings = run_directory.flatten(config.model_dump(mode="json"))
    state = None if checkpoint is None else checkpoint.state["tracker"]
    known: dict[str, str | None] = {}
    origin = run_directory.origin_of(directory)
    if checkpoint is not None and not (origin and origin.name == checkpoint.path.name):  # that one is another run's
        known = checkpoint.state["tracker"].get("backends", {})  # of a run of an earlier version there is none
    setting = Setting(
        values=settings,
        epochs=math.ceil(plan.steps / data.steps_per_epoch),
        train_examples=data.steps_per_epoch * data.batch_size,
        dev_examples=len(preparation.splits.get("dev", ())),
    )
    return Tracker(
        directory,
        task=preparation.task.name,
        headline=preparation.task.headline,
        counted=preparation.task.counted,
        steps=plan.steps,
        steps_per_epoch=data.steps_per_epoch,
        experts=plan.experts,
        log_steps=config.tracking.log_steps,
        signs=SignWatch(
            setting, steps=plan.steps, steps_per_epoch=data.steps_per_epoch, scored=preparation.evaluation_steps
        ),
        tensorboard=(
            TensorBoard(directory / "tensorboard", None if state is None else state["step"])
            if config.tracking.tensorboard and main
            else None
        ),
        backends=[
            Backend(name, config.tracking.project, directory, plain(settings), known.get(name))
            for name in (config.tracking.backends if main else ())
        ],
        main=main,
        resumed=state,
    )


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """As trackers take them: numbers, booleans and texts."""
    return {key: v if isinstance(v, bool | int | float) else str(v) for key, v in settings.items()}


def carry_out(
    invocation: Invocation,
    launch: Launch,
    preparation: Preparation,
    accelerator: Accelerator,
    stopping: Stopping,
    tracker: Tracker,
    checkpoint: Checkpoint | None,
) -> dict[str, Any]:
    """Load the model, train it and record the end. Returns the summary."""
    config, directory = preparation.config, invocation.output_dir
    torch.manual_seed(config.training.seed)  # of a new classifier
    with sharded_loading(launch, accelerator, config.model.dtype):
        model = models.load_model(preparation.model)
        weights = attach_adapters(config, model)  # here, since DoRA's magnitudes are made from whole weights
    length = None if checkpoint is None else checkpoint.state["ledger"]["experts"]
    trainer = Trainer(preparation, model, weights, accelerator, directory, stopping, length)
    stopping.poll(trainer.processes)
    if checkpoint is None:
        progress = Progress()
        tracker.configuration(to_yaml(config), plain(run_directory.flatten(config.model_dump(mode="json"))))
    else:
        progress = restore(trainer, checkpoint)
        if trainer.processes.main:  # now that nothing can refuse it any more
            resuming.settle(directory, checkpoint, trainer.cascade.ledger)
            run_directory.begin(directory, config)
        tracker.goes_on(checkpoint.path, run_directory.environment())
    checkpoints = Checkpoints(directory / "checkpoints", config.training.checkpoints_kept)
    safe_points = SafePoints(trainer, tracker, checkpoints, InFlight(partial(count, tracker, config.training)))
    trace = directory / "profile" / "rank_0.pt.trace.json" if invocation.profile and trainer.processes.main else None
    with (
        closing(trainer.batches),
        explaining_dead_workers(trainer.batches.workers),
        Profile(trace, tracker.say) as profile,
    ):
        summary = train(trainer, tracker, safe_points, progress, directory, profile)
    if trainer.processes.main:
        run_directory.write_json(directory / "summary.json", summary)
    tracker.status("done", "finished", exit_code=0)
    return summary


@contextmanager
def explaining_full_disk(directory: Path) -> Iterator[None]:
    """
    Raises:
        CheckpointError: what was written inside met a full disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CheckpointError(
            f"{directory}: {error}; free some space and run the same command again, it goes on from the last checkpoint"
        ) from error
