"""What a measurement gives: a number with its spread, what it is to be, and whether it is. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Target:
    """What a value is to be: `<=`, `>=` or `==` the bound."""

    sign: Literal["<=", ">=", "=="]
    bound: float

    def met(self, value: float) -> bool:
        if math.isnan(value):
            return False
        return {"<=": value <= self.bound, ">=": value >= self.bound, "==": value == self.bound}[self.sign]

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:,.6g}"


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)


@dataclass(frozen=True, slots=True)
class Result:
    """A line of the table.

    Args:
        row: its id in the catalogue.
        value: in `unit`, `x` for a ratio; None where there is none, and `missing` says why.
        low, high: its quartiles, where it has a spread.
        ours, peer: what a ratio is made of, in words.
        details: whatever else was measured.
        judged: whether `target` is for the shapes that were measured.
    """

    row: str
    measure: str
    value: float | None = None
    unit: str = "x"
    low: float | None = None
    high: float | None = None
    target: Target | None = None
    ours: str = ""
    peer: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    missing: str | None = None
    judged: bool = True

    @property
    def verdict(self) -> str:
        if self.value is None:
            return f"not measured: {self.missing}"
        if self.target is None:
            return ""
        if not self.judged:
            return "not judged: small shapes"
        return "met" if self.target.met(self.value) else "missed"

    def as_json(self) -> dict[str, Any]:
        held = asdict(self)
        return held | {
            "target": None if self.target is None else str(self.target),
            "verdict": self.verdict,
        }


def ratio(
    row: str,
    measure: str,
    seconds: Mapping[str, Sequence[float]],
    over: tuple[str, str],
    target: Target | None = None,
    ours: str = "",
    details: Mapping[str, Any] | None = None,
) -> Result:
    """How many times as long one variant takes as another, turn by turn.

    Args:
        seconds: of every variant, in the order of the turns.
        over: the variants, one over the other; our side's name begins so.
        ours: what is said of our side besides its median.
    """
    above, below = (seconds[name] for name in over)
    spread = Spread.of([one / other for one, other in zip(above, below, strict=True)])
    told = {name.startswith("ours"): f"{name}: {duration(statistics.median(seconds[name]))}" for name in over}
    return Result(
        row,
        measure,
        spread.median,
        low=spread.low,
        high=spread.high,
        target=target,
        ours=told.get(True, "") + ours,
        peer=told.get(False, ""),
        details={"seconds": {name: list(values) for name, values in seconds.items()}} | dict(details or {}),
    )


def duration(seconds: float) -> str:
    """`1.23 s`, `45.6 ms`."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


HEADER = "| row | measure | ours | peer | result | quartiles | target | verdict |"


def table(results: Sequence[Result]) -> str:
    """Markdown, target and result beside each other."""
    lines = [HEADER, "|---|---|---|---|---|---|---|---|"]
    for one in results:
        result = "" if one.value is None else f"{number(one.value)}{'×' if one.unit == 'x' else f' {one.unit}'}".strip()
        quartiles = "" if one.low is None or one.high is None else f"{number(one.low)} to {number(one.high)}"
        cells = (one.row, one.measure, one.ours, one.peer, result, quartiles, one.target or "", one.verdict)
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def number(value: float) -> str:
    """Three digits, and of large numbers all before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
