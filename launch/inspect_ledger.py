"""Check and measure a ledger: `python launch/inspect_ledger.py RUN_DIR [--experts K] [--per_weight]`."""

import sys

from lorasc_ds.ledger_commands import inspect

if __name__ == "__main__":
    sys.exit(inspect(sys.argv[1:]))
