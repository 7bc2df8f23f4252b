"""What is strange about a run's numbers, said while it can still be stopped."""

from __future__ import annotations

import statistics
from collections import deque

SPIKE_WINDOW = 100  # steps whose median the loss is compared with
SPIKE_LEAST = 20  # of them, before anything is said
SPIKE_FACTOR = 2.0


class LossWatch:
    """Finds steps whose loss stands far above those before; one in a row is told, the others belong to it."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.high = False

    def spike(self, loss: float) -> str | None:
        """What is strange about the loss of this step, if anything."""
        usual = statistics.median(self.losses) if len(self.losses) >= SPIKE_LEAST else None
        self.losses.append(loss)
        was_high, self.high = self.high, usual is not None and loss > SPIKE_FACTOR * usual
        if not self.high or was_high:
            return None
        return f"the loss is {loss:.4g}, and the median of the {len(self.losses) - 1} steps before {usual:.4g}"
