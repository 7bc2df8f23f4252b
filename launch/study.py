"""A study: `python launch/study.py launch/studies/NAME.yaml [--output_dir DIR] [--dry_run] [--slurm FLAGS]`."""

import sys

from lorasc_ds.study.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
