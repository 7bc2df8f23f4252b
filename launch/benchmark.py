"""Speed and memory beside peers: `python launch/benchmark.py --output_dir OUT [--rows C1,C8] [--quick]`."""

import sys

from lorasc_ds.benchmark.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
