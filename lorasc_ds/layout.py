"""How sequences stand in the rows of a batch: alone, several in a row, or read together where they begin alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorasc_ds.encoded import ScoredTokens, Visuals
from lorasc_ds.visuals import Pixels


@dataclass(frozen=True, slots=True)
class Layout:
    """How sequences become the rows of a batch. The model computes the same, up to rounding.

    Args:
        pad_id: fills rows up.
        share_prefixes: what the candidates of an example begin with is read once, in one row with what each goes on
            with; a token sees its own candidate alone.
        pack: several sequences stand in one row, instead of padding, wherever they fit; none sees another.
        flat: all of them stand in one row where nothing speaks against it, see `flattens`. The model's attention has to
            be told where each begins.
        pixels: makes the images of a batch's rows, in their order, what the model takes of them, by name; None: there
            are none. A row with images is one sequence.
    """

    pad_id: int
    share_prefixes: bool = False
    pack: bool = False
    flat: bool = False
    pixels: Pixels | None = None

    def flattens(self, trees: Sequence[Tree]) -> bool:
        """Whether the sequences all stand in one row, each attended to by itself.

        Not where some share a beginning, which needs a bias that says of every two tokens whether one sees the other;
        nor where all have one length, since rows of their own pad nothing either.
        """
        unlike = len({tree.size for tree in trees}) > 1
        return self.flat and unlike and not any(tree.branches for tree in trees)


@dataclass(frozen=True, slots=True)
class Tree:
    """Sequences that begin alike, to be read together.

    Args:
        common: what they all begin with.
        branches: what each goes on with; those that end there have none.
        visuals: of a single sequence. Sequences with other images are others, be their tokens the same.
    """

    common: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...] = ()
    visuals: Visuals | None = None

    @property
    def size(self) -> int:
        """Tokens that the model reads."""
        return len(self.common) + sum(map(len, self.branches))

    @property
    def ids(self) -> list[int]:
        return [*self.common, *(id for branch in self.branches for id in branch)]

    def segments(self, number: int) -> list[list[int]]:
        """Position, tree and branch of every token."""
        start = len(self.common)
        parts = [(0, len(self.common)), *((start, len(branch)) for branch in self.branches)]
        positions = [first + at for first, length in parts for at in range(length)]
        branches = [branch for branch, (_, length) in enumerate(parts) for _ in range(length)]
        return [positions, [number] * self.size, branches]

    def offset(self, inputs: tuple[int, ...]) -> int:
        """What the position of a token of `inputs` after the common part is less than its place in the tree."""
        rest = inputs[len(self.common) :]
        if not rest:
            return 0
        return sum(len(branch) for branch in self.branches[: self.branches.index(rest)])


def common_length(sequences: Iterable[tuple[int, ...]]) -> int:
    """Tokens that all begin with, where at least one of each is left."""
    sequences = list(sequences)
    first, last, most = min(sequences), max(sequences), min(map(len, sequences)) - 1
    return next((at for at in range(most) if first[at] != last[at]), most)


def trees_of(candidates: Sequence[ScoredTokens], share_prefixes: bool) -> dict[tuple[int, ...], Tree]:
    """For each input of an example's candidates the tree that it is read in; its own, where little is common."""
    inputs = list(dict.fromkeys(candidate.ids[:-1] for candidate in candidates))
    common = common_length(candidate.ids for candidate in candidates)
    visuals = candidates[0].visuals
    if not share_prefixes or visuals or len(inputs) == 1 or 4 * common < min(map(len, inputs)):
        return {one: Tree(one, visuals=visuals) for one in inputs}
    tree = Tree(inputs[0][:common], tuple(one[common:] for one in inputs if len(one) > common))
    return dict.fromkeys(inputs, tree)


def rows_of(trees: Sequence[Tree], layout: Layout) -> list[list[int]]:
    """The numbers of the trees of every row: one; all; or what fits beside the longest (best fit, longest first)."""
    if layout.flattens(trees):
        return [list(range(len(trees)))]
    if not layout.pack:
        return [[number] for number in range(len(trees))]
    capacity = max(tree.size for tree in trees)
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(trees)), key=lambda number: -trees[number].size):
        size = trees[number].size
        best = min((row for row, left in enumerate(room) if left >= size), key=room.__getitem__, default=None)
        if best is None:
            best = len(rows)
            rows.append([])
            room.append(capacity)
        rows[best].append(number)
        room[best] -= size
    return rows
