"""A study, from the command line to its tables: `python launch/study.py STUDY`. `--help` needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from lorasc_ds.command import ending
from lorasc_ds.study.options import parse_options


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns an exit code as `ending` does, and 1 where runs have failed or differ."""
    codes = [0]

    def work() -> None:
        options = parse_options(arguments)
        from lorasc_ds.study.study import carry_out  # torch: not for --help, nor to refuse a flag

        codes.append(carry_out(options))

    interrupted = "interrupted; the runs have written checkpoints, and the same command goes on from them"
    return ending(work, interrupted) or codes[-1]
