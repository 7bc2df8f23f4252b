"""What a run needs of an engine: few verbs, the same for one process and a sharded cluster.

All methods are collective: every process calls them in one order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    zero_stage: int | None
    """None without DeepSpeed."""
    model: nn.Module
    """Every forward pass goes through it, those of an evaluation too."""

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a micro batch; `last`: an optimizer step follows."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add this process's share of the step's loss: the gradients of all processes are summed."""
        ...

    def learning_rates(self, learning_rate: float) -> dict[str, float]:
        """What every parameter group of the optimizer that takes the steps trains at where the run's rate is this one.

        Returns:
            the rate by the group's `role`.
        """
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

    def edit(self, weights: Sequence[nn.Parameter]) -> Iterator[list[Slice]]:
        """Change frozen weights in place: slices of as many as may be whole at once, in order, until all have come.

        When the next ones are asked for, every forward pass sees the change.
        """
        ...

    def full(self, tensor: Tensor) -> Tensor:
        """A tensor of the model, for digests and saving: whole on the main process, perhaps empty on others.

        Do not write to it.
        """
        ...

    def read(self, parameter: nn.Parameter) -> Tensor:
        """A copy of a parameter of the adapters, whole, in float32: of its master, where it is trained."""
        ...

    def write(self, parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
        """Set parameters of the adapters everywhere they live: the masters and the copies that compute."""
        ...

    def holds(self, parameter: nn.Parameter, value: Tensor) -> bool:
        """Whether a parameter of the adapters is `value` everywhere this process keeps it."""
        ...

    def empty_optimizer(self, parameters: Sequence[nn.Parameter]) -> None:
        """Their moments and step counts as before the first step, in place; those of others stay.

        Raises:
            ConfigError: the optimizer counts the steps of one of them together with those of another parameter.
        """
        ...

    def optimizer_is_empty(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether `empty_optimizer` has just been called, read from the state itself."""
        ...

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Copies of the moments of a trained parameter, whole, by the optimizer's names; {} before a step."""
        ...

    def write_moments(self, parameter: nn.Parameter, moments: Mapping[str, Tensor]) -> None:
        """Set what `moments` gives."""
        ...

    def begin_optimizer(self) -> None:
        """Make the optimizer's state, empty, where no step has made it yet."""
        ...

    def step_counts(self, parameters: Sequence[nn.Parameter]) -> list[int]:
        """How many steps the optimizer has counted for each trained parameter."""
        ...

    def write_step_counts(self, parameters: Sequence[nn.Parameter], counts: Sequence[int]) -> None:
        """Set what `step_counts` gives."""
        ...

    def bit_sums(self, weights: Sequence[nn.Parameter]) -> list[int]:
        """A checksum of each frozen weight, the same however it is cut up: its bits, as integers, added modulo 2⁶⁴."""
        ...

    def differing_replicas(self, weights: Sequence[nn.Parameter]) -> list[int]:
        """Which of the frozen weights are not the same bits on all processes that hold them whole."""
        ...
