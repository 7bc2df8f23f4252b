"""From float grey levels to bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def to_bytes(levels: NDArray[Any]) -> NDArray[np.uint8]:
    """Grey levels cut off to 0 to 255, and down to whole numbers, as the published code does.

    What is a rounding error below a whole number is that number, on every machine.
    """
    return np.clip(levels + 1e-6, 0, 255).astype(np.uint8)
