"""Go back to an earlier expert: `python launch/rollback.py RUN_DIRECTORY --expert K`."""

import sys

from lorasc_ds.ledger_commands import roll_back

if __name__ == "__main__":
    sys.exit(roll_back(sys.argv[1:]))
