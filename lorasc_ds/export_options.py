"""What `launch/export.py` takes: its flags, without torch, so that `--help` is quick."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasc_ds.cli import Parser
from lorasc_ds.errors import ConfigError
from lorasc_ds.fields import did_you_mean

SHARD_GIB = 5.0


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What the command line asks for.

    Args:
        run: the run directory.
        expert: after how many experts; None: after all that closed.
        kind: `merged`, `adapter` or `svd`.
        rank: of `svd`; None for the others.
        noise: whether the run's noise is in the weights; never in an adapter.
        max_shard_size: bytes.
        compare: None: where memory allows.
    """

    run: Path
    output_dir: Path
    expert: int | None
    kind: str
    rank: int | None
    noise: bool
    max_shard_size: float
    compare: bool | None


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="export.py",
        description="A plain Hugging Face model, or one PEFT adapter, from the ledger of a run.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="the --output_dir of a run, finished or not")
    parser.add_argument(
        "--output_dir", type=Path, required=True, metavar="OUT", help="a folder that does not exist yet"
    )
    parser.add_argument(
        "--as",
        dest="kind",
        choices=("merged", "adapter", "svd"),
        default="merged",
        help="merged: a plain model; adapter: one PEFT adapter of rank T·r, without the noise; svd: one of rank R, the"
        " closest (default: merged)",
    )
    parser.add_argument("--expert", type=int, metavar="K", help="after K experts (default: all that closed)")
    parser.add_argument("--rank", type=int, metavar="R", help="with --as svd: rank of the adapter")
    parser.add_argument(
        "--noise",
        choices=("true", "false"),
        help="with --as merged: false leaves the noise out, as the run never had it (default: true)",
    )
    parser.add_argument(
        "--max_shard_size", type=float, metavar="GIB", help=f"with --as merged: of a file (default: {SHARD_GIB:g})"
    )
    parser.add_argument(
        "--compare",
        choices=("true", "false", "auto"),
        default="auto",
        help="measure logits and loss on the run's dev split against the live model; auto: where memory has room for"
        " the model twice (default: auto)",
    )
    return parser


def parse(arguments: Sequence[str]) -> ExportOptions:
    """
    Raises:
        ConfigError: an unknown flag, or flags that do not go together.
    """
    parser = make_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        raise ConfigError(f"unknown argument {unknown[0]}{did_you_mean(unknown[0].split('=')[0], flags)}")
    for flag, number, least in (("--expert", options.expert, 1), ("--rank", options.rank, 1)):
        if number is not None and number < least:
            raise ConfigError(f"{flag} is {number}: a number from {least} on is needed")
    size = options.max_shard_size
    if size is not None and not 0 < size < math.inf:
        raise ConfigError(f"--max_shard_size is {size:g}: a number of GiB above 0 is needed")
    if (options.rank is None) == (options.kind == "svd"):
        raise ConfigError(
            f"--rank is {options.rank} and --as is {options.kind}: svd needs a rank, and the others have none"
        )
    if options.kind != "merged" and (size is not None or options.noise == "true"):
        flag = "--max_shard_size" if size is not None else "--noise true"
        raise ConfigError(f"--as {options.kind} and {flag} exclude each other: take --as merged, or leave {flag} out")
    if options.output_dir.exists():
        raise ConfigError(f"--output_dir {options.output_dir} exists: give a folder that does not exist yet")
    return ExportOptions(
        run=options.run,
        output_dir=options.output_dir,
        expert=options.expert,
        kind=options.kind,
        rank=options.rank,
        noise=options.kind == "merged" and options.noise != "false",
        max_shard_size=(size or SHARD_GIB) * 2**30,
        compare={"true": True, "false": False, "auto": None}[options.compare],
    )
