"""How every command ends: with an exit code of DESIGN's contract, and one line for whatever a user can mend."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from lorasc_ds.errors import PeerError, PreemptedError


def ending(work: Callable[[], object], interrupted: str = "stopped by Ctrl-C") -> int:
    """Do the work of a command.

    Args:
        interrupted: what is said after Ctrl-C, where the work does not hear it itself.

    Returns:
        0 done, the `exit_code` of an error that has one, 130 Ctrl-C, 1 a bug, which is shown whole.
    """
    try:
        work()
    except BrokenPipeError:  # `head`, for instance, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except Exception as error:  # the last resort: what a user can mend has a code, the rest is a bug
        code: int | None = getattr(error, "exit_code", None)
        if code is None:
            traceback.print_exc()
            return 1
        told = isinstance(error, PeerError) and error.told
        if isinstance(error, PreemptedError):  # the same in all processes, and no error
            told = os.environ.get("RANK", "0") != "0"
        if not told:
            print(error if isinstance(error, PreemptedError) else f"error: {error}", file=sys.stderr)
        return code
    return 0
