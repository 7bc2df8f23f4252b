"""The command line of every launcher script: flags, a recipe, and an override for every field of it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from lorasc_ds.config import Config
from lorasc_ds.errors import ConfigError
from lorasc_ds.fields import build_config, describe, did_you_mean, fields_of, json_schema, meaning, parse_override
from lorasc_ds.recipes import load_yaml, to_yaml

__all__ = [
    "Invocation",
    "Parser",
    "add_recipe",
    "build_config",
    "configuration",
    "fields_of",
    "json_schema",
    "make_parser",
    "parse",
    "parse_command_line",
    "parse_override",
    "to_yaml",
]

C = TypeVar("C", bound=Config)


@dataclass(frozen=True, slots=True)
class Invocation:
    """What the command line asks for.

    Args:
        resume: `auto`, `must`, `never`, or the folder of a checkpoint.
        resume_override: settings that may differ from those the run began with.
        profile: whether to trace a few steps and a boundary.
        gpus, gpu_memory: how many the plan of a dry run is for, and the GiB of each; None: those that are here.
    """

    config: Config
    recipe: Path
    output_dir: Path
    resume: Literal["auto", "must", "never"] | Path
    dry_run: bool
    resume_override: tuple[str, ...] = ()
    deepspeed: Path | None = None
    gpus: int | None = None
    gpu_memory: float | None = None
    profile: bool = False


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(message)


def make_parser(default_recipe: Path) -> argparse.ArgumentParser:
    parser = Parser(
        description="Train with LoRASC: a cascade of LoRA experts, averaged, merged and started again.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe(parser, default_recipe)
    parser.add_argument("--output_dir", type=Path, help="run directory (default: runs/RECIPE-STRATEGY)")
    parser.add_argument(
        "--resume",
        metavar="auto|must|never|PATH",
        default="auto",
        help="auto: go on with the run in output_dir, begin where there is none, print the summary of a finished one;"
        " must: there has to be something to go on with; never: the directory must be empty; PATH: go on from this"
        " checkpoint, in the directory of its run or in an empty one",
    )
    parser.add_argument(
        "--resume_override",
        metavar="KEY[,KEY]",
        default="",
        help="settings that differ from those the run began with, and hold from the checkpoint on",
    )
    parser.add_argument("--dry_run", action="store_true", help="check everything, print the plan; load no weights")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="with --dry_run: plan for N processes (default: those that were launched)"
    )
    parser.add_argument(
        "--gpu_memory", type=float, metavar="GIB", help="with --dry_run: of each GPU (default: the one here, or 80)"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="write a trace of a few steps and of one boundary to output_dir/profile/, for Perfetto or TensorBoard;"
        " what is scored between them is in it",
    )
    parser.add_argument("--print_config", action="store_true", help="print every field with its meaning, and stop")
    parser.add_argument("--deepspeed", type=Path, metavar="JSON", help="DeepSpeed settings, as in ds_configs/")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def add_recipe(parser: argparse.ArgumentParser, default_recipe: Path, model: type[Config] = Config) -> None:
    """`--config` and an override for every field."""
    parser.add_argument("--config", type=Path, default=default_recipe, help="YAML recipe (default: the quickstart)")
    add_overrides(parser, model)


def add_overrides(parser: argparse.ArgumentParser, model: type[Config] = Config) -> None:
    """An override for every field."""
    group = parser.add_argument_group("overrides of the recipe")
    for key, fields in fields_of(model).items():
        group.add_argument(f"--{key}", metavar="VALUE", help=meaning(fields).replace("%", "%%"))


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """
    Raises:
        ConfigError: an unknown flag.
    """
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        flag = unknown[0].split("=")[0]
        flags = [option for action in parser._actions for option in action.option_strings]
        raise ConfigError(f"unknown argument {unknown[0]}{did_you_mean(flag, flags)}")
    return options


def configuration(options: argparse.Namespace, model: type[C] = Config) -> C:
    """The recipe that the command line names, with its overrides.

    Raises:
        ConfigError: it is impossible.
    """
    overrides = {key: value for key, value in vars(options).items() if "." in key and value is not None}
    return build_config(*load_yaml(options.config), overrides, model)


def parse_command_line(arguments: Sequence[str], default_recipe: Path) -> Invocation | str:
    """The run that is asked for, or the text to print (`--print_config`).

    Raises:
        ConfigError: an unknown flag or an impossible configuration.
    """
    options = parse(make_parser(default_recipe), arguments)
    for flag, number in (("--gpus", options.gpus), ("--gpu_memory", options.gpu_memory)):
        if number is not None and not 0 < number < math.inf:
            raise ConfigError(f"{flag} is {number:g}: a number above 0 is needed")
        if number is not None and not options.dry_run:
            raise ConfigError(f"{flag} {number:g} is for planning: add --dry_run, or leave it out")
    config = configuration(options)
    if options.print_config:
        return describe(config)
    output_dir = options.output_dir or Path("runs") / f"{options.config.stem}-{config.cascade.strategy}"
    return Invocation(
        config=config,
        recipe=options.config,
        output_dir=output_dir,
        resume=options.resume if options.resume in ("auto", "must", "never") else Path(options.resume),
        resume_override=tuple(key.strip() for key in options.resume_override.split(",") if key.strip()),
        dry_run=options.dry_run,
        deepspeed=options.deepspeed,
        gpus=options.gpus,
        gpu_memory=options.gpu_memory,
        profile=options.profile,
    )


if __name__ == "__main__":
    print(json_schema(), end="")
