"""What a run needs of an engine: few verbs, the same for one process and a sharded cluster.

All methods are collective: every process calls them in one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from torch import Tensor, nn


class Slice(NamedTuple):
    """The part of a weight that this process edits: `flat` holds the elements from `start` on; it may be empty.

    `flat` is a one-dimensional view of the row-major weight in its storage dtype; writing to it changes the
    weight.
    """

    flat: Tensor
    start: int


class Engine(Protocol):
    """Takes optimizer steps."""

    name: str
    model: nn.Module
    """Every forward pass goes through it, those of an evaluation too."""

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a micro batch; `last`: an optimizer step follows."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add this process's share of the step's loss: the gradients of all processes are summed."""
        ...

    def update(self, learning_rate: float, max_grad_norm: float | None) -> Tensor:
        """Clip and take the optimizer step.

        Returns:
            the gradient's norm before clipping; where it is not finite, nothing has been updated.
        """
        ...


class Backend(Protocol):
    """Reaches weights and optimizer wherever they live: what the cascade needs."""

    merge_path: str
    """`local` or `gather`, and the reason: one line."""

    def edit(self, weight: nn.Parameter) -> AbstractContextManager[Slice]:
        """Change a frozen weight in place; on exit every forward pass sees the change."""
        ...

    def full(self, tensor: Tensor) -> Tensor:
        """A tensor of the model, for digests and saving: whole on the main process, perhaps empty on others.

        Do not write to it.
        """
        ...

    def read(self, parameter: nn.Parameter) -> Tensor:
        """A copy of a trainable parameter, whole, in float32."""
        ...

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a trainable parameter everywhere it lives: the master and the copy that computes."""
        ...

    def holds(self, parameter: nn.Parameter, value: Tensor) -> bool:
        """Whether a trainable parameter is `value` everywhere this process keeps it."""
        ...

    def empty_optimizer(self) -> None:
        """Moments and step counts as before the first step, in place."""
        ...

    def optimizer_is_empty(self) -> bool:
        """Whether `empty_optimizer` has just been called, read from the state itself."""
        ...

    def differing_replicas(self, weights: Sequence[nn.Parameter]) -> list[int]:
        """Which of the frozen weights are not the same bits on all processes that hold them whole."""
        ...
