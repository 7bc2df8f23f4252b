"""What `launch/corrupt.py` takes: its flags, without numpy, so that `--help` is quick."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasc_ds.cli import Parser
from lorasc_ds.cli import parse as parse_flags
from lorasc_ds.corruption_parameters import NAMES, SEVERITIES, Parameters
from lorasc_ds.errors import ConfigError
from lorasc_ds.fields import did_you_mean

IMAGENET_SIZE = 224


@dataclass(frozen=True, slots=True)
class CorruptOptions:
    """What the command line asks for.

    Args:
        source: a folder of a folder per class.
        out: where `corruption/severity/class/name` and `manifest.json` go.
        frost_dir: textures of frost; None: made-up ice.
        size: of the middle that is kept, in pixels; 0: every image keeps its own size and geometry.
        limit: images of every class, the first by name; None: all.
        format: `jpeg` of quality 85, or `png`, without a loss.
    """

    source: Path
    out: Path
    corruptions: tuple[str, ...]
    severities: tuple[int, ...]
    parameters: Parameters
    frost_dir: Path | None
    size: int
    format: str
    seed: int
    limit: int | None
    workers: int


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="corrupt.py",
        description="Corrupt a folder of images as ImageNet-C's are: 15 corruptions at five severities.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="a folder with a folder of images for every class")
    add("out", type=Path, metavar="OUT", help="new, or what the same command left; gets corruption/severity/class/name")
    add("--corruptions", default=",".join(NAMES), metavar="NAME[,NAME]", help="default: all of %(default)s")
    add("--severities", default="1,2,3,4,5", metavar="N[,N]", help="default: %(default)s")
    add(
        "--parameters",
        choices=("auto", "imagenet", "cifar"),
        default="auto",
        help="imagenet: those of ImageNet-C, for 224 pixels; cifar: those of CIFAR-10-C, for 32; auto: by what an"
        " image's shorter side is nearer to, imagenet from 85 on (default: auto)",
    )
    add(
        "--frost_dir",
        type=Path,
        metavar="DIR",
        help="textures of frost for the corruption frost (default: made-up ice, not comparable with ImageNet-C's)",
    )
    add(
        "--size",
        type=int,
        default=IMAGENET_SIZE,
        metavar="N",
        help="resize the shorter side to N * 256/224 and keep the N x N in the middle; 0: every image as it is"
        " (default: %(default)s)",
    )
    add("--format", choices=("jpeg", "png"), default="jpeg", help="jpeg: quality 85, ImageNet-C's; png: without a loss")
    add("--seed", type=int, default=0, metavar="N", help="of all chance (default: 0)")
    add("--limit", type=int, metavar="N", help="images of every class, the first by name (default: all)")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one per core)")
    return parser


def parse(arguments: Sequence[str]) -> CorruptOptions:
    """
    Raises:
        ConfigError: an unknown flag or name, or flags that do not go together.
    """
    options = parse_flags(make_parser(), arguments)
    for flag, least in (("size", 0), ("seed", 0), ("limit", 1), ("workers", 1)):
        number = getattr(options, flag)
        if number is not None and number < least:
            raise ConfigError(f"--{flag} is {number}: a number from {least} on is needed")
    corruptions = chosen("--corruptions", options.corruptions, NAMES)
    severities = chosen("--severities", options.severities, tuple(str(severity) for severity in SEVERITIES))
    if options.frost_dir is not None and "frost" not in corruptions:
        raise ConfigError(f"--frost_dir {options.frost_dir} is for frost: add it to --corruptions, or leave it out")
    return CorruptOptions(
        source=options.source,
        out=options.out,
        corruptions=corruptions,
        severities=tuple(int(severity) for severity in severities),
        parameters=options.parameters,
        frost_dir=options.frost_dir,
        size=options.size,
        format=options.format,
        seed=options.seed,
        limit=options.limit,
        workers=options.workers,
    )


def chosen(flag: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """What a list with commas names, each once, in the order of `known`."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ConfigError(f"{flag} {text}: {name!r} is not one of {', '.join(known)}{did_you_mean(name, known)}")
    if not names:
        raise ConfigError(f"{flag} is empty: name one or more of {', '.join(known)}")
    return tuple(name for name in known if name in names)
