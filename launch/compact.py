"""Make a long ledger short: `python launch/compact.py RUN_DIRECTORY`."""

import sys

from lorasc_ds.ledger_commands import compact

if __name__ == "__main__":
    sys.exit(compact(sys.argv[1:]))
