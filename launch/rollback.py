"""Go back to an earlier expert: `python launch/rollback.py RUN_DIRECTORY --expert K`."""

import sys

from lorasc_ds.rollback import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
