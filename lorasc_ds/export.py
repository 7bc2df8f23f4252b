"""Export: `python launch/export.py RUN_DIR --output_dir OUT [--as merged|adapter|svd]`. `--help` needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from lorasc_ds.command import ending
from lorasc_ds.export_options import parse


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns 0 done, 2 flags, paths or model, 4 a damaged ledger, 130 Ctrl-C, 1 a bug."""

    def work() -> None:
        options = parse(arguments)
        from lorasc_ds.exporter import export  # torch: not for --help, nor to refuse a flag

        export(options)

    return ending(work, interrupted="stopped by Ctrl-C; nothing was left behind")
