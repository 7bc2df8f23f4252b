"""Evaluate: `python launch/evaluate.py SUBJECT --tasks rte,gsm8k --output_dir OUT`. `--help` needs no torch."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from lorasc_ds.errors import PeerError, RunError
from lorasc_ds.evaluate_options import parse


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns 0 done, 2 flags, data or model, 4 a damaged ledger, 130 Ctrl-C, 1 a bug."""
    try:
        options = parse(arguments)
        from lorasc_ds.algorithm.ledger import LedgerError  # torch: not for --help, nor to refuse a flag
        from lorasc_ds.evaluator import evaluate_all

        try:
            evaluate_all(options)
        except LedgerError as error:
            print(f"error: {error}", file=sys.stderr)
            return 4
    except PeerError as error:
        if not error.told:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: stopped by Ctrl-C", file=sys.stderr)
        return 130
    except Exception:  # the last resort: a bug is shown whole and ends with code 1
        traceback.print_exc()
        return 1
    return 0
