"""Requests to stop: a signal, the file STOP, a launcher that is gone. All processes hear of one at the same point."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import psutil

from lorasc_ds.errors import PreemptedError, StoppedError

if TYPE_CHECKING:  # signals are heard before torch is there
    from lorasc_ds.sharding import Processes

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Slurm's usual warning is USR1
AT_ONCE_SECONDS = 1.0  # launchers pass on, within milliseconds, a Ctrl-C that the terminal has sent already
LOOK_SECONDS = 1.0  # between two looks at the file system, which may be a network's
LAUNCHERS = {
    "accelerate", "accelerate-launch", "torchrun", "deepspeed", "torch.distributed.run", "torch.distributed.launch",
    "accelerate.commands.launch", "deepspeed.launcher.launch", "deepspeed.launcher.runner",
}  # fmt: skip


class Stopping:
    """Whether the run was asked to stop. A first signal is noted, a second one ends this process at once.

    Args:
        directory: the run directory, in which STOP may appear.
    """

    def __init__(self, directory: Path) -> None:
        self.file = directory / "STOP"
        self.launchers = launchers()
        self.found: str | None = None
        self.signalled = 0.0
        self.looked = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals are heard."""
        before = {signum: signal.signal(signum, self.hear) for signum in SIGNALS}
        try:
            yield
        finally:
            for signum, handler in before.items():  # the echo of a signal may come as the process ends
                signal.signal(signum, signal.SIG_IGN if self.signalled else handler)

    def hear(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signalled:
            self.signalled = now
            self.found = signal.Signals(signum).name
            text = f"{self.found}: stopping with a checkpoint at the next safe point; once more to stop at once\n"
            with contextlib.suppress(OSError):  # print is not safe in a handler, and nobody may be listening
                os.write(2, text.encode())
        elif now - self.signalled > AT_ONCE_SECONDS:
            raise StoppedError(signum)

    def asked(self) -> bool:
        """Whether this process knows of a request; the file and the launchers are looked at once a second."""
        now = time.monotonic()
        if self.found is None and now - self.looked > LOOK_SECONDS:
            self.looked = now
            if self.file.exists():
                self.found = f"{self.file.name} in {self.file.parent}"
            for launcher in self.launchers:
                if gone(launcher):
                    self.found = f"its launcher (process {launcher.pid}) is gone"
        return self.found is not None

    def heard(self, processes: Processes) -> bool:
        """Collective: whether any process was asked to stop."""
        return processes.any(self.asked())

    def poll(self, processes: Processes) -> None:
        """Collective.

        Raises:
            PreemptedError: in all processes, if any of them was asked to stop.
        """
        if self.heard(processes):
            raise self.request(processes)

    def request(self, processes: Processes) -> PreemptedError:
        """Collective: what the first of those says that were asked to stop."""
        return PreemptedError(f"asked to stop: {processes.problems(self.found)[0]}")

    def forget(self) -> None:
        """Remove STOP, once it was honoured."""
        self.file.unlink(missing_ok=True)


def launchers() -> list[psutil.Process]:
    """The processes that started this one and would pass a signal on, or die of it without a word."""
    found = []
    for parent in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            if is_launcher(parent.cmdline()):
                found.append(parent)
    return found


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def is_launcher(command: list[str]) -> bool:
    """Whether a command line is `python LAUNCHER …` or `python -m LAUNCHER …`."""
    script = next((Path(argument).name for argument in command[1:] if not argument.startswith("-")), "")
    return script in LAUNCHERS
