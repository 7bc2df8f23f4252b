"""Errors that a user can mend: one line that names the key, the value, what is needed and what to do."""

from __future__ import annotations

import signal


class RunError(Exception):
    """Ends the run with `exit_code` and one line on stderr, without a traceback."""

    exit_code = 1


class ConfigError(RunError):
    """The configuration, the command line or the output directory cannot be used."""

    exit_code = 2


class DataError(RunError):
    """A data file, or a row of it, cannot be used."""

    exit_code = 2


class StoppedError(RunError):
    """A second signal ended the run at once; the code is the shell's, 128 and the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped at once by a second {signal.Signals(signum).name}; the last checkpoint is whole")
        self.exit_code = 128 + signum


class DivergedError(RunError):
    """A number is not finite, or a merge changed what the model computes."""

    exit_code = 3


class CheckpointError(RunError):
    """What a run is to be continued from cannot be used, or could not be written."""

    exit_code = 4


class PreemptedError(RunError):
    """The run was asked to stop. Raised by all processes at one point, where the weights are as between two steps."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again


class PeerError(RunError):
    """Another process of the run failed first; `told`: it has printed the message."""

    def __init__(self, message: str, exit_code: int, *, told: bool) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.told = told
