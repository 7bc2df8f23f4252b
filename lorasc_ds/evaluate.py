"""Evaluate: `python launch/evaluate.py SUBJECT --tasks rte,gsm8k --output_dir OUT`. `--help` needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from lorasc_ds.command import ending
from lorasc_ds.evaluate_options import parse


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns 0 done, 2 flags, data or model, 4 a damaged ledger, 130 Ctrl-C, 1 a bug."""

    def work() -> None:
        options = parse(arguments)
        from lorasc_ds.evaluator import evaluate_all  # torch: not for --help, nor to refuse a flag

        evaluate_all(options)

    return ending(work)
