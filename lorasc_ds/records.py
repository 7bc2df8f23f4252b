"""`metrics.jsonl`: one object for every event of a run, which may be cut back to where a checkpoint was written."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


class Records:
    """The file; None: nothing is written."""

    def __init__(self, path: Path | None) -> None:
        self.file = None if path is None else path.open("a", encoding="utf-8")

    def write(self, content: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(without_nan(content)) + "\n")
            self.file.flush()

    @property
    def bytes(self) -> int:
        """How much has been written."""
        return 0 if self.file is None else self.file.tell()

    def cut(self, length: int) -> None:
        """Forget what lies beyond `length` bytes."""
        if self.file is not None:
            self.file.truncate(min(self.file.seek(0, os.SEEK_END), length))
            self.file.seek(0, os.SEEK_END)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
