"""The commands on a ledger: inspect it, go back in it, make it short. `--help` needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorasc_ds.cli import Parser
from lorasc_ds.command import ending
from lorasc_ds.errors import ConfigError

RUN = "run directory of launch/train.py"


def check_run(directory: Path) -> None:
    """
    Raises:
        ConfigError: there is no run.
    """
    if not (directory / "ledger" / "ledger.json").is_file():
        raise ConfigError(f"{directory} holds no run: give the directory that launch/train.py had as --output_dir")


def inspect(arguments: Sequence[str]) -> int:
    """`launch/inspect_ledger.py`. Returns 0 whole, 2 the command line, 4 damaged, 130 Ctrl-C, 1 a bug."""
    parser = Parser(
        description="Check a run's ledger and measure its experts: ranks, overlaps, noise; draw these and its curves.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of a run, or a ledger's own")
    parser.add_argument("--experts", type=int, metavar="K", help="measure the first K experts (default: all)")
    parser.add_argument("--base", metavar="MODEL", help="pretrained model (default: the ledger's, if it can be read)")
    parser.add_argument("--per_weight", action="store_true", help="print a table for every weight, too")
    parser.add_argument(
        "--output_dir",
        type=Path,
        metavar="DIR",
        help="for inspection.json, its figure, and the run's curves (default: RUN_DIR)",
    )

    def work() -> None:
        options = parser.parse_args(arguments)
        directory = options.run_dir / "ledger"
        if not directory.is_dir():
            directory = options.run_dir
            if not (directory / "ledger.json").is_file():
                raise ConfigError(f"{directory} holds no ledger/: give the directory of a run, or a ledger's own")
        from lorasc_ds.inspection import run

        run(options, directory)

    return ending(work)


def roll_back(arguments: Sequence[str]) -> int:
    """`launch/rollback.py`. Returns 0, or the exit code of an error, which is one line."""
    parser = Parser(
        description="A run goes back to what it was after one of its experts; the same command then goes on from there."
    )
    parser.add_argument("run", type=Path, help=RUN)
    parser.add_argument("--expert", type=int, required=True, metavar="K", help="the last expert that stays")

    def work() -> None:
        options = parser.parse_args(arguments)
        check_run(options.run)
        from lorasc_ds.rollback import roll_back

        print(roll_back(options.run, options.expert))

    return ending(work)


def compact(arguments: Sequence[str]) -> int:
    """`launch/compact.py`. Returns 0, or the exit code of an error, which is one line."""
    parser = Parser(
        description="A long ledger made short: a snapshot of the float32 sums takes the place of early experts."
    )
    parser.add_argument("run", type=Path, help=RUN)
    parser.add_argument(
        "--above", type=float, default=16.0, metavar="GIB", help="compact only more than this (default: 16)"
    )

    def work() -> None:
        options = parser.parse_args(arguments)
        check_run(options.run)
        from lorasc_ds.compaction import compact

        print(compact(options.run, options.above))

    return ending(work)
