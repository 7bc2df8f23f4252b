"""Make a long ledger short: `python launch/compact.py RUN_DIRECTORY`."""

import sys

from lorasc_ds.compaction import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
