"""Export: `python launch/export.py RUN_DIR --output_dir OUT [--as merged|adapter|svd]`. `--help` needs no torch."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from lorasc_ds.errors import ConfigError, RunError
from lorasc_ds.export_options import parse


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns 0 done, 2 flags, paths or model, 4 a damaged ledger, 130 Ctrl-C, 1 a bug."""
    try:
        options = parse(arguments)
    except ConfigError as error:
        return told(error, error.exit_code)
    from lorasc_ds.algorithm.ledger import LedgerError  # torch: not for --help, nor to refuse a flag
    from lorasc_ds.exporter import export

    try:
        export(options)
    except LedgerError as error:
        return told(error, 4)
    except RunError as error:
        return told(error, error.exit_code)
    except KeyboardInterrupt:
        return told("stopped by Ctrl-C; nothing was left behind", 130)
    except Exception:  # the last resort: a bug is shown whole and ends with code 1
        traceback.print_exc()
        return 1
    return 0


def told(message: object, exit_code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return exit_code
