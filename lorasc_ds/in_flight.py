"""Optimizer steps that the device may still be working on, while the host prepares the next one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from lorasc_ds.reports import StepReport
from lorasc_ds.sharding import Processes

BEHIND = 1  # steps that the device may have left when the next one is prepared: it never waits, and is never far behind


class StepInFlight:
    """A step that was given to the device. Its numbers are copied as soon as they are there; nobody waits for them.

    Args:
        numbers: loss, tokens, processes that were asked to stop and unreadable examples, all summed over the
            processes, and the gradient's norm: (5,) on the device.
        learning_rate: of the run, at this step.
        began: when, by `time.perf_counter`.
        examples: ids of the global batch.
        unreadable: what is wrong with examples of this process's share, a line each.
    """

    def __init__(
        self,
        numbers: Tensor,
        learning_rate: float,
        began: float,
        examples: tuple[str, ...],
        unreadable: list[str],
        processes: Processes,
    ) -> None:
        self.numbers = numbers.to("cpu", non_blocking=True)
        self.copied = torch.cuda.current_stream(numbers.device).record_event() if numbers.is_cuda else None
        self.learning_rate = learning_rate
        self.examples = examples
        self.unreadable = unreadable
        self.processes = processes
        self.seconds = time.perf_counter() - began

    def read(self) -> StepReport:
        """Wait for the numbers. Collective.

        The seconds are those in which the host was busy with the step or waited for it: those of a run of steps add up
        to its wall time.
        """
        began = time.perf_counter()
        if self.copied is not None:
            self.copied.synchronize()
        loss, tokens, asked, unreadable, norm = self.numbers.tolist()
        lines = [line for part in self.processes.gather(self.unreadable) for line in part] if unreadable else []
        seconds = self.seconds + time.perf_counter() - began
        return StepReport(loss, norm, int(tokens), seconds, self.examples, asked > 0, tuple(lines))


class InFlight:
    """The steps that were taken and are not recorded yet.

    Args:
        record: what is done with a step's learning rate and report, in the order of the steps; it may end the run.
    """

    def __init__(self, record: Callable[[float, StepReport], None]) -> None:
        self.record = record
        self.steps: deque[StepInFlight] = deque()
        self.asked_to_stop = False

    def add(self, step: StepInFlight) -> None:
        """A step was taken; one before it is recorded. Collective, as `settle` is."""
        self.steps.append(step)
        self.settle(but=BEHIND)

    def settle(self, but: int = 0) -> None:
        """Record all steps, but so many of the last ones."""
        while len(self.steps) > but:
            step = self.steps.popleft()
            report = step.read()
            self.asked_to_stop |= report.asked_to_stop
            self.record(step.learning_rate, report)
