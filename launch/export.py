"""Export: `python launch/export.py RUN_DIR --output_dir OUT [--as merged|adapter|svd]`."""

import sys

from lorasc_ds.export import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
