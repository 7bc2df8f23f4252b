"""Corrupt a folder of images: `python launch/corrupt.py SOURCE OUT [--corruptions a,b] [--severities 1,2,3,4,5]`."""

import sys

from lorasc_ds.corrupt import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
