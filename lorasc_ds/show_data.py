"""Look at a recipe's data: `python launch/show_data.py [--config RECIPE.yaml]`. `--help` needs no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from lorasc_ds.cli import Parser, add_recipe, configuration, parse
from lorasc_ds.command import ending
from lorasc_ds.config import Config
from lorasc_ds.errors import ConfigError
from lorasc_ds.task_config import DigitsConfig, TaskConfig


class ShownConfig(Config):
    """A recipe, whose task may be one that is only evaluated."""

    task: Annotated[TaskConfig, Field(discriminator="name")] = Field(default_factory=DigitsConfig)


def make_parser(default_recipe: Path) -> argparse.ArgumentParser:
    parser = Parser(
        description="Look at a recipe's data as the model will see it; no weights are loaded.", allow_abbrev=False
    )
    add_recipe(parser, default_recipe, ShownConfig)
    parser.add_argument("--split", help="whose examples are shown (default: train, or a benchmark's first)")
    parser.add_argument("--examples", type=int, default=3, metavar="N", help="how many examples are shown")
    parser.add_argument("--full", action="store_true", help="show long texts without a gap, and lines as they break")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="processes that will train (default: 1)")
    return parser


def main(arguments: Sequence[str], default_recipe: Path) -> int:
    """The command line. Returns 0, 2 configuration or data, 130 Ctrl-C, 1 a bug."""

    def work() -> None:
        options = parse(make_parser(default_recipe), arguments)
        for flag, number, least in (("--examples", options.examples, 0), ("--gpus", options.gpus, 1)):
            if number < least:
                raise ConfigError(f"{flag} is {number}: a number from {least} on is needed")
        config = configuration(options, ShownConfig)
        from lorasc_ds.shown_data import load, report  # torch and transformers

        for line in report(load(config, options.gpus), options.split, options.examples, options.full):
            print(line)

    return ending(work)
