"""A study, from the command line to its tables: `python launch/study.py STUDY`. `--help` needs no torch."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from lorasc_ds.errors import RunError
from lorasc_ds.study.options import parse_options


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns 0 done, 1 runs failed or a bug, 2 flags or the study's file, 130 interrupted."""
    try:
        options = parse_options(arguments)
        from lorasc_ds.study.study import carry_out  # torch: not for --help, nor to refuse a flag

        return carry_out(options)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the runs have written checkpoints, and the same command goes on from them", file=sys.stderr)
        return 130
    except Exception:  # the last resort: a bug is shown whole and ends with code 1
        traceback.print_exc()
        return 1
