"""Errors that a user can mend: one line that names the key, the value, what is needed and what to do."""

from __future__ import annotations


class RunError(Exception):
    """Ends the run with `exit_code` and one line on stderr, without a traceback."""

    exit_code = 1


class ConfigError(RunError):
    """The configuration, the command line or the output directory cannot be used."""

    exit_code = 2


class DataError(RunError):
    """A data file, or a row of it, cannot be used."""

    exit_code = 2


class DivergedError(RunError):
    """A number is not finite, or a merge changed what the model computes."""

    exit_code = 3
