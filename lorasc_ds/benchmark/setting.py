"""Where a measurement takes place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorasc_ds.benchmark.options import Options
from lorasc_ds.benchmark.results import Result
from lorasc_ds.benchmark.timing import in_turns


@dataclass(frozen=True, slots=True)
class Setting:
    """
    Args:
        folder: a temporary one, for models and data.
        device: what is measured.
        ceilings: as in `timing.ceilings`.
    """

    options: Options
    folder: Path
    device: torch.device
    ceilings: Mapping[str, float]

    @property
    def quick(self) -> bool:
        return self.options.quick

    @property
    def compiler(self) -> str:
        """What compiles layers: on a CPU and in haste torch's tracer alone, whose guards are the same."""
        return "eager" if self.quick and self.device.type == "cpu" else "inductor"

    def in_turns(self, variants: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of every variant in every turn."""
        repetitions, warm_up = self.options.repetitions, self.options.warm_up
        return in_turns(variants, repetitions=repetitions, warm_up=warm_up, device=self.device)

    def judged(self, result: Result) -> Result:
        """The result, of shapes that its target is for, or not."""
        return replace(result, judged=not self.quick)

    def fresh(self, name: str) -> Path:
        """A new folder."""
        folder = self.folder / f"{name}-{sum(1 for _ in self.folder.iterdir())}"
        folder.mkdir()
        return folder
