"""The curves of a run in TensorBoard; the x of each is the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams


class TensorBoard:
    """
    Args:
        directory: gets the event files.
        step: of a run that goes on, the last one it had taken: what was recorded later happens again. None: it begins.
    """

    def __init__(self, directory: Path, step: int | None) -> None:
        self.writer = SummaryWriter(directory, purge_step=None if step is None else step + 1)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def histogram(self, tag: str, values: Sequence[float], step: int) -> None:
        """Of finite values; TensorBoard has none of others."""
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            self.writer.add_histogram(tag, np.array(finite), step)

    def configuration(self, text: str, settings: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """The resolved configuration as text, and as hyper-parameters of this same run.

        Args:
            settings: numbers, booleans and texts.
            metrics: the tags that runs are compared by.
        """
        self.writer.add_text("config", f"```yaml\n{text}\n```")
        assert self.writer.file_writer is not None  # opened by add_text
        for summary in hparams(dict(settings), dict.fromkeys(metrics, 0.0)):
            self.writer.file_writer.add_summary(summary)

    def close(self) -> None:
        self.writer.close()
