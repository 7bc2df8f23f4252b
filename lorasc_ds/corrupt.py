"""Corrupt a folder of images as ImageNet-C's are: `python launch/corrupt.py SOURCE OUT`. No torch."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from lorasc_ds.corrupt_options import parse
from lorasc_ds.errors import RunError


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns 0 done, 2 flags, folders or images, 130 Ctrl-C, 1 a bug."""
    try:
        options = parse(arguments)
        from lorasc_ds.corrupted_folder import write  # numpy and PIL: not for --help, nor to refuse a flag

        write(options)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception:  # the last resort: a bug is shown whole and ends with code 1
        traceback.print_exc()
        return 1
    return 0
