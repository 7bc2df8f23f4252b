"""What a terminal or a log file shows of a run."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from lorasc_ds.reports import shown
from lorasc_ds.tasks import Scores

PLAIN_LINE_SECONDS = 30.0  # between two lines of the loss where there is no terminal


class Console:
    """A progress bar where there is a terminal, and lines on stdout.

    Args:
        steps: optimizer steps of the run.
        step: of them, those already taken.
        headline: the metric that the lines of an evaluation show.
        main: whether this process says anything.
    """

    def __init__(self, steps: int, step: int, headline: str, main: bool) -> None:
        self.headline = headline
        self.main = main
        self.bar = tqdm(
            total=steps, initial=step, unit="step", disable=not (main and sys.stderr.isatty()), dynamic_ncols=True
        )
        self.last_line = time.monotonic()
        self.headed = False

    def say(self, line: str) -> None:
        """A line on stdout, above the progress bar where there is one."""
        if self.main:
            with tqdm.external_write_mode(file=sys.stdout):
                print(line, flush=True)

    def doing(self, step: int, expert: str, state: str) -> None:
        """How far the run is, in the bar, or from time to time in a line."""
        self.bar.set_description(expert, refresh=False)
        self.bar.set_postfix_str(state)
        if self.bar.disable and time.monotonic() - self.last_line > PLAIN_LINE_SECONDS:
            self.last_line = time.monotonic()
            self.say(f"step {step}/{self.bar.total}, {expert}: {state}")

    def scored(self, when: str, scores: Scores) -> None:
        """The headline of every split, and the dev loss, under headings the first time."""
        lost = "dev" if "dev" in scores else list(scores)[-1]
        if not self.headed:
            self.headed = True
            self.say(" | ".join((f"{self.headline:<15}", *(f"{split:>5}" for split in scores), f"{lost} loss")))
        cells = (
            f"{shown(self.headline, of_split[self.headline]):>{max(5, len(split))}}"
            for split, of_split in scores.items()
        )
        self.say(" | ".join((f"{when:<15}", *cells, f"{scores[lost]['loss']:8.3f}")))
