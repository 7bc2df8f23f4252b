"""The command line of the benchmark: rows are measured one after the other, and written as they come."""

from __future__ import annotations

from collections.abc import Sequence

from lorasc_ds.benchmark.options import parse
from lorasc_ds.command import ending


def main(arguments: Sequence[str]) -> int:
    """Returns an exit code as `ending` does; a missed target is no error."""

    def work() -> None:
        options = parse(arguments)
        from lorasc_ds.benchmark.measuring import measure  # torch: not for --help, nor to refuse a flag

        measure(options)

    return ending(work, "stopped; what was measured is in --output_dir")
