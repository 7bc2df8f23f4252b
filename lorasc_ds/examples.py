"""The metrics of every example of an evaluation, so that runs can be compared example by example."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorasc_ds.algorithm.files import write_atomically
from lorasc_ds.scoring import Record


class ExampleMetrics:
    """Split -> `id` and every metric (the loss where there is none) -> a list, in the order of the split."""

    def __init__(self) -> None:
        self.splits: dict[str, dict[str, list[Any]]] = {}

    def add(self, split: str, example: Any, record: Record) -> None:
        """An example that could not be read is left out."""
        if record.metrics or record.count:
            values = {"id": example.id} | (record.metrics or {"loss": record.loss / record.count})
            for key, value in values.items():
                self.splits.setdefault(split, {}).setdefault(key, []).append(value)

    def write(self, file: Path) -> None:
        write_atomically(file, (json.dumps(self.splits, ensure_ascii=False) + "\n").encode())
