"""Corrupt a folder of images as ImageNet-C's are: `python launch/corrupt.py SOURCE OUT`. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from lorasc_ds.command import ending
from lorasc_ds.corrupt_options import parse


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns 0 done, 2 flags, folders or images, 130 Ctrl-C, 1 a bug."""

    def work() -> None:
        options = parse(arguments)
        from lorasc_ds.corrupted_folder import write  # numpy and PIL: not for --help, nor to refuse a flag

        write(options)

    return ending(work, interrupted="stopped by Ctrl-C; the same command goes on from here")
