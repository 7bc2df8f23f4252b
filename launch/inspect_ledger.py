"""Check and measure a ledger: `python launch/inspect_ledger.py RUN_DIR [--experts K] [--per_weight]`."""

import sys

from lorasc_ds.inspection import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
