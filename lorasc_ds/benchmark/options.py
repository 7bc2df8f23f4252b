"""What `launch/benchmark.py` takes: its flags, without torch, so that `--help` is quick."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasc_ds.benchmark.catalogue import ROWS
from lorasc_ds.cli import Parser, did_you_mean
from lorasc_ds.cli import parse as parse_flags
from lorasc_ds.errors import ConfigError

BOUNDARIES = "64x64,64x1024,4x4096"


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for.

    Args:
        rows: ids of `ROWS`, in their order.
        quick: small shapes, few repetitions; the rows of a GPU too, on whatever is here. No result is judged.
        repetitions, warm_up: turns of every variant that count, and before them that do not.
        boundaries: of row C1: how many weights, and how large each side is.
        hidden_sizes: of the models of rows S1 and S3.
        processes: of the rows under ZeRO.
        data_dir: real training sets, a folder each, for the rows C9 and C10.
    """

    output_dir: Path
    rows: tuple[str, ...]
    quick: bool
    repetitions: int
    warm_up: int
    boundaries: tuple[tuple[int, int], ...]
    hidden_sizes: tuple[int, ...]
    processes: int
    data_dir: Path | None


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="benchmark.py",
        description="Measure speed and memory beside peers, in turns, in one run; writes benchmark.json, benchmark.md"
        " and benchmark.png.",
        epilog="rows: " + "; ".join(f"{row.id} {row.title}" for row in ROWS.values()),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, metavar="OUT", help="a folder that does not exist yet")
    add("--rows", default="all", metavar="ID[,ID]", help="what is measured (default: all; those of a GPU need one)")
    add(
        "--quick",
        action="store_true",
        help="small shapes and few repetitions, the rows of a GPU too, on whatever is here; nothing is judged",
    )
    add("--repetitions", type=int, metavar="N", help="turns of every variant that count (default: 7; quick: 2)")
    add("--warm_up", type=int, metavar="N", help="turns before them (default: 2; quick: 1)")
    add(
        "--boundaries",
        metavar="NxD[,NxD]",
        help=f"of row C1: N weights of D x D (default: {BOUNDARIES}; quick: 4x16)",
    )
    add("--hidden_sizes", metavar="D[,D]", help="of the models of rows S1 and S3 (default: 64,512; quick: 32)")
    add("--processes", type=int, default=2, metavar="N", help="of the rows under ZeRO (default: 2)")
    add(
        "--data_dir",
        type=Path,
        metavar="DIR",
        help="released files for C9 and C10: alpaca/*.json, gsm8k, superglue/RTE, ..., tokenizers/gpt2 (default:"
        " lengths that are in the package)",
    )
    return parser


def parse(arguments: Sequence[str]) -> Options:
    """
    Raises:
        ConfigError: an unknown flag or row, or an impossible value.
    """
    options = parse_flags(make_parser(), arguments)
    if "WORLD_SIZE" in os.environ:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: start benchmark.py by python alone; it starts processes of its"
            " own (--processes)"
        )
    quick = options.quick
    repetitions = (2 if quick else 7) if options.repetitions is None else options.repetitions
    warm_up = (1 if quick else 2) if options.warm_up is None else options.warm_up
    for flag, number, least in (
        ("repetitions", repetitions, 2),
        ("warm_up", warm_up, 1),
        ("processes", options.processes, 2),
    ):
        if number < least:
            raise ConfigError(f"--{flag} is {number}: a number from {least} on is needed")
    if options.output_dir.exists():
        raise ConfigError(f"--output_dir {options.output_dir} exists: give a folder that does not exist yet")
    if options.data_dir is not None and not options.data_dir.is_dir():
        raise ConfigError(f"--data_dir {options.data_dir} is no folder: give one with released files, or leave it out")
    return Options(
        output_dir=options.output_dir,
        rows=chosen(options.rows),
        quick=quick,
        repetitions=repetitions,
        warm_up=warm_up,
        boundaries=sizes(options.boundaries or ("4x16" if quick else BOUNDARIES)),
        hidden_sizes=widths(options.hidden_sizes or ("32" if quick else "64,512")),
        processes=options.processes,
        data_dir=options.data_dir,
    )


def chosen(text: str) -> tuple[str, ...]:
    """Ids of rows, in the order of the catalogue."""
    asked = [name.strip().upper() for name in text.split(",") if name.strip()]
    if asked == ["ALL"]:
        return tuple(ROWS)
    for name in asked:
        if name not in ROWS:
            raise ConfigError(f"--rows {text}: {name!r} is not one of {', '.join(ROWS)}{did_you_mean(name, [*ROWS])}")
    if not asked:
        raise ConfigError(f"--rows is empty: name one or more of {', '.join(ROWS)}")
    return tuple(id for id in ROWS if id in asked)


def sizes(text: str) -> tuple[tuple[int, int], ...]:
    """`64x1024,4x4096`: how many weights, and the side of each. A layer has two, and eight dimensions a head."""
    found = [re.fullmatch(r"(\d+)x(\d+)", part.strip()) for part in text.split(",")]
    pairs = tuple((int(one[1]), int(one[2])) for one in found if one is not None)
    if len(pairs) < len(found) or any(count < 2 or count % 2 or side < 16 or side % 16 for count, side in pairs):
        raise ConfigError(
            f"--boundaries is {text}: sizes like {BOUNDARIES} are needed, an even number of weights whose sides are"
            " multiples of 16"
        )
    return pairs


def widths(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) >= 16 and int(part) % 16 == 0 for part in parts):
        raise ConfigError(f"--hidden_sizes is {text}: multiples of 16, with commas between, are needed")
    return tuple(map(int, parts))
