"""Runs in processes of their own that begin with everything imported.

One worker, the fork server of `multiprocessing`, imports torch and the trainer once for all runs, no more.
A run is a fork of it: it starts at once, and knows nothing of the runs before it.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from lorasc_ds import run_directory
from lorasc_ds.algorithm.files import write_atomically
from lorasc_ds.errors import ConfigError

IMPORTED = ("lorasc_ds.run", "lorasc_ds.tasks.digits", "sklearn.datasets", "transformers.models.llama.modeling_llama")
INTERRUPTED = {75, 130, 143, -signal.SIGINT, -signal.SIGTERM}  # asked to stop: nothing has failed
# What a log holds of why a job failed: words of a command of this package, of Slurm, of torchrun.
REASON = re.compile(r"^error: .*|Detected \d+ oom.kill event.*|Signal \d+ \(SIG\w+\) received by PID \d+")


@dataclass(frozen=True, slots=True)
class Job:
    """A run and what follows it.

    Args:
        directory: of the run; what it prints goes to `DIRECTORY.log` or Slurm's log, how it ended to `DIRECTORY.json`.
        train: arguments of `launch/train.py`.
        evaluate: of `launch/evaluate.py`, but for its subject and folder; None: not wanted.
        inspect: whether to measure the ledger.
    """

    directory: Path
    recipe: Path
    train: tuple[str, ...]
    evaluate: tuple[str, ...] | None
    inspect: bool

    @property
    def log(self) -> Path:
        return self.directory.with_suffix(".log")

    @property
    def evaluation(self) -> Path:
        """The folder of the scores of `evaluate`, by its flags."""
        return self.directory / f"evaluation-{hashlib.sha256(json.dumps(self.evaluate).encode()).hexdigest()[:8]}"

    @property
    def inspection(self) -> Path:
        return self.directory / "inspection.json"


def carry_out(jobs: Sequence[Job], at_once: int) -> Iterator[tuple[Job, int, float]]:
    """Every job with its exit code and its seconds, as it ends; a code below 0 is minus the signal that ended it.

    When the caller stops listening, or is killed, the runs are asked to stop, and write a checkpoint.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])
    waiting = list(jobs)
    running: dict[ForkServerProcess, tuple[Job, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                process = context.Process(target=begin, args=(waiting[0],))
                process.start()
                running[process] = waiting.pop(0), time.monotonic()
            connection.wait([process.sentinel for process in running])
            for process in [process for process in running if not process.is_alive()]:
                job, began = running.pop(process)
                code, seconds = process.exitcode or 0, time.monotonic() - began
                tell_end(job, code, seconds, job.log)
                yield job, code, seconds
    finally:
        for process in running:
            process.terminate()
        for process, (job, began) in running.items():
            process.join()
            tell_end(job, process.exitcode or 0, time.monotonic() - began, job.log)


def tell_end(job: Job, code: int, seconds: float, log: Path) -> None:
    """Write how a job ended, unless it was asked to stop."""
    if code not in INTERRUPTED:
        content = {"exit_code": code, "message": last_words(job, code, log), "seconds": round(seconds, 3)}
        write_atomically(job.directory.with_suffix(".json"), json.dumps(content).encode())


def last_words(job: Job, code: int, log: Path) -> str:
    """Why a job failed, in its own words where it has any."""
    if code == 0:
        return ""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = log.read_text(errors="replace").splitlines()
    reasons = [found[0] for line in lines if (found := REASON.search(line))]
    status = run_directory.status_of(job.directory)
    if not reasons and status.get("exit_code") == code:  # a bug, which torchrun tells before words of its own
        reasons = [status["message"]]
    return (reasons or [line for line in lines if line and not line.startswith("srun: ")] or [""])[-1][:500]


def begin(job: Job) -> None:
    """The new process: its streams, what ends it with its parent, and the work."""
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)  # as a launcher would; the run then writes a checkpoint

    threading.Thread(target=follow, name="parent watch", daemon=True).start()
    sys.exit(perform(job))


def perform(job: Job) -> int:
    """Train, then what is asked for besides and not there yet. Returns the exit code of what failed, or 0."""
    from lorasc_ds.evaluate import main as evaluate
    from lorasc_ds.ledger_commands import inspect
    from lorasc_ds.train import main as train

    wait_for(job.directory)
    arguments = ["--config", str(job.recipe), "--output_dir", str(job.directory), *job.train]
    sys.argv = ["launch/train.py", *arguments]  # what environment.json says
    code = train(arguments, job.recipe)
    if code == 0 and job.evaluate is not None and not is_complete(job.evaluation):
        shutil.rmtree(job.evaluation, ignore_errors=True)
        code = evaluate([str(job.directory), "--output_dir", str(job.evaluation), "--records", *job.evaluate])
    if code == 0 and job.inspect and not job.inspection.exists():
        code = inspect([str(job.directory)])
    return code


def is_complete(evaluation: Path) -> bool:
    try:
        return json.loads((evaluation / "summary.json").read_text())["complete"]
    except (OSError, ValueError):
        return False


def wait_for(directory: Path, seconds: float = 120.0) -> None:
    """Until no run of a study that was killed is left in the directory; it writes a checkpoint and ends by itself."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with run_directory.locked(directory):
                return
        except ConfigError:
            time.sleep(0.5)


def read_job(file: Path) -> Job:
    """What `slurm.submit` wrote."""
    content = json.loads(file.read_text())
    return Job(
        directory=Path(content["directory"]),
        recipe=Path(content["recipe"]),
        train=tuple(content["train"]),
        evaluate=None if content["evaluate"] is None else tuple(content["evaluate"]),
        inspect=content["inspect"],
    )


def tell_end_of_task(file: Path, code: int, seconds: float) -> None:
    """How a task of an array ended, whose log lies beside the file of its job; a shell adds 128 to a signal."""
    code = 128 - code if code - 128 in [*signal.Signals] else code
    tell_end(read_job(file), code, seconds, file.with_suffix(".log"))


if __name__ == "__main__":  # in a job of Slurm's: FILE when the run has been trained, FILE CODE SECONDS at its end
    file, *end = sys.argv[1:]
    if end:
        tell_end_of_task(Path(file), int(end[0]), float(end[1]))
    else:
        sys.exit(perform(read_job(Path(file))))
