"""Train: `accelerate launch launch/train.py`. `--help` needs no torch, and neither does a wrong configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorasc_ds.backends import check_installed
from lorasc_ds.cli import parse_command_line
from lorasc_ds.command import ending


def main(arguments: Sequence[str], default_recipe: Path) -> int:
    """The command line. Returns an exit code of DESIGN's contract.

    That is 0 done, 2 configuration or data, 3 diverged, 4 checkpoint unusable, 75 stopped after a checkpoint, 130 or
    143 a second signal, 1 a bug.
    """

    def work() -> None:
        invocation = parse_command_line(arguments, default_recipe)
        if isinstance(invocation, str):
            print(invocation)
            return
        check_installed(invocation.config.tracking.backends)
        from lorasc_ds.stopping import Stopping  # psutil

        stopping = Stopping(invocation.output_dir)
        with stopping.listening():
            from lorasc_ds.run import run  # torch and the rest

            run(invocation, stopping)

    return ending(work)
