"""Evaluate: `python launch/evaluate.py MODEL_OR_ADAPTER_OR_RUN_DIR --tasks rte,gsm8k --output_dir OUT`."""

import sys

from lorasc_ds.evaluate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
