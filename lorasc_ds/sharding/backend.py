"""What the cascade needs of an engine: a few verbs, the same for one process and a sharded cluster."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from torch import Tensor, nn


class Slice(NamedTuple):
    """The part of a weight that this process edits: `flat` holds the elements from `start` on.

    `flat` is a one-dimensional view of the row-major weight in its storage dtype; writing to it changes the
    weight.
    """

    flat: Tensor
    start: int


class Backend(Protocol):
    """An engine's weights and optimizer. All methods are collective: every process calls them in one order."""

    name: str

    def edit(self, weight: nn.Parameter) -> AbstractContextManager[Slice]:
        """Change a frozen weight in place; on exit every forward pass sees the change."""
        ...

    def full(self, weight: nn.Parameter) -> Tensor:
        """A frozen weight whole, for digests and saving."""
        ...

    def read(self, parameter: nn.Parameter) -> Tensor:
        """A copy of a trainable parameter's float32 master."""
        ...

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a trainable parameter everywhere it lives: master and compute copy."""
        ...

    def empty_optimizer(self, parameters: Iterable[nn.Parameter]) -> None:
        """Moments and step counts of the parameters as before the first step, in place."""
        ...
