"""The command line of the benchmark: rows are measured one after the other, and written as they come."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from lorasc_ds.benchmark.options import parse
from lorasc_ds.errors import RunError


def main(arguments: Sequence[str]) -> int:
    """Returns 0 done (a missed target is no error), 2 flags, 130 stopped by a signal, 1 a bug."""
    try:
        options = parse(arguments)
        from lorasc_ds.benchmark.measuring import measure  # torch: not for --help, nor to refuse a flag

        measure(options)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; what was measured is in --output_dir", file=sys.stderr)
        return 130
    except Exception:  # the last resort: a bug is shown whole and ends with code 1
        traceback.print_exc()
        return 1
    return 0
