"""Which output of a classifier stands for which class of a task, by their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClassOrder:
    """
    Args:
        outputs: of every class, the output that stands for it; None: the one at its own place.
        remark: what a user may not expect of that; None: nothing.
    """

    outputs: tuple[int, ...] | None = None
    remark: str | None = None


def class_order(names: Sequence[str], known: Sequence[str]) -> ClassOrder:
    """Match the classes of a task with as many outputs: by name where these are the same, else by position.

    Args:
        names: of the classes.
        known: of the outputs, in their order; empty where these have none.
    """
    if not known:
        return ClassOrder(remark="the classifier's outputs have no names: they are taken in the order of the classes")
    ours, theirs = [compared(name) for name in names], [compared(name) for name in known]
    if ours == theirs:
        return ClassOrder()
    places = {name: at for at, name in enumerate(theirs)}
    if len(places) == len(ours) and places.keys() == set(ours):
        remark = "the classifier's outputs are in another order than the classes: they are matched by name"
        return ClassOrder(tuple(places[name] for name in ours), remark)
    other = [at for at, (mine, its) in enumerate(zip(ours, theirs, strict=True)) if mine != its]
    return ClassOrder(
        remark=f"the classifier's outputs have other names than the classes, {len(other)} of {len(ours)}, and are taken"
        f" by position: output {other[0]}, {known[other[0]]!r}, is class {names[other[0]]!r}"
    )


def compared(name: str) -> str:
    """A name without what folders and spellings add."""
    return name.replace("_", " ").strip().casefold()
