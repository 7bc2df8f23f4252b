"""Training examples that are read and tokenised when their step comes.

Any of them can be had by its position, so the order of an epoch, the shares of sources and going on after an
interruption are what they are for examples in memory, and so are the examples themselves.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

import numpy as np

from lorasc_ds.encoded import EncodedExample, ScoredTokens, digest_of
from lorasc_ds.errors import DataError
from lorasc_ds.tasks.base import Example
from lorasc_ds.tasks.streams import Stream

LOOKED_AT = 256  # examples of a stream that stand for all where something is estimated
INDEXED_AT_ONCE = 1024


class EncodedStream(Sequence[EncodedExample]):
    """Examples of a stream as tokens; `LOOKED_AT` of them, evenly spread, are read at once.

    Args:
        groups: of the examples.
        lengths: of the examples, as batches of like length are made by.
        sha256: of what the examples are made of.
    """

    def __init__(self, groups: Sequence[str], lengths: np.ndarray, sha256: str) -> None:
        self.groups = groups
        self.lengths = lengths
        count = min(len(self), LOOKED_AT)
        self.sample = self.take([at * len(self) // count for at in range(count)])
        self.sha256 = hashlib.sha256(f"{len(self)} {sha256} {digest_of(self.sample)}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, at: int) -> EncodedExample: ...
    @overload
    def __getitem__(self, at: slice) -> list[EncodedExample]: ...
    def __getitem__(self, at: int | slice) -> EncodedExample | list[EncodedExample]:
        return (
            self.take(range(*at.indices(len(self)))) if isinstance(at, slice) else self.take([range(len(self))[at]])[0]
        )

    @abstractmethod
    def take(self, positions: Sequence[int]) -> list[EncodedExample]:
        """The examples at these positions.

        Raises:
            DataError: a row cannot be used.
        """

    @abstractmethod
    def about(self) -> str:
        """What is read when, in words."""


class EncodedRows(EncodedStream):
    """One example a row. Of lengths only bytes are known.

    Args:
        encode: makes tokens of rows, without those of which the limit leaves nothing that is scored.
        filler: a token that the model knows, for these: they count nothing, since all positions have to be known.
    """

    def __init__(
        self, encode: Callable[[Sequence[Example]], Sequence[EncodedExample]], stream: Stream, filler: int
    ) -> None:
        self.encode = encode
        self.stream = stream
        self.filler = ScoredTokens((filler, filler), 0)
        super().__init__(stream.groups, stream.sizes, stream.sha256)

    def take(self, positions: Sequence[int]) -> list[EncodedExample]:
        examples = [self.stream[at] for at in positions]
        encoded = {example.id: example for example in self.encode(examples)}
        return [
            encoded.get(one.id) or EncodedExample(one.id, (self.filler,), (0,), group=one.group) for one in examples
        ]

    def about(self) -> str:
        return f"{len(self)} rows are read and tokenised when their step comes; looked at: {len(self.sample)} of them"


class Packer(Protocol):
    """What makes tokens of documents, and blocks of tokens; see `Encoder`."""

    block_size: int

    def documents(self, documents: Sequence[Example]) -> list[list[int]]: ...
    def block(self, ids: Sequence[int], number: int, group: str) -> EncodedExample: ...


@dataclass(frozen=True, slots=True)
class Source:
    """The documents of one file, end to end.

    Args:
        first: position of its first document.
        starts: at which token each document begins, and where the last one ends: int64 of (documents + 1,).
        blocks: how many it is cut into.
    """

    name: str
    first: int
    starts: np.ndarray
    blocks: int

    def read_again(self, size: int) -> int:
        """Tokens of all documents that blocks of `size` tokens are made of, each as often as it is read."""
        begins, ends = self.starts[:-1], self.starts[1:]
        lengths = ends - begins
        return int((lengths * ((np.maximum(ends, 1) - 1) // size - begins // size + 1)).sum())


class EncodedBlocks(EncodedStream):
    """Documents end to end, cut into blocks, as `Encoder.pack` does in memory.

    One pass tokenises every document to count its tokens, 8 bytes each; a block then tokenises the documents that it
    is made of once more, whole.
    """

    def __init__(self, packer: Packer, stream: Stream) -> None:
        self.packer = packer
        self.stream = stream
        size = packer.block_size
        groups = np.array(stream.of_file)
        counts = np.array(
            [
                len(ids)
                for at in range(0, len(stream), INDEXED_AT_ONCE)
                for ids in packer.documents(stream[at : at + INDEXED_AT_ONCE])
            ],
            dtype=np.int64,
        )
        self.sources = []
        for number in dict.fromkeys(groups.tolist()):
            (documents,) = np.nonzero(groups == number)
            starts = np.concatenate([[0], np.cumsum(counts[documents])])
            blocks = len(range(0, int(starts[-1]) - 1, size))
            self.sources.append(Source(stream.names[int(number)], int(documents[0]), starts, blocks))
        self.firsts = np.cumsum([0, *(source.blocks for source in self.sources)])
        names = [source.name for source in self.sources for _ in range(source.blocks)]
        lengths = [min(size, int(s.starts[-1]) - at * size) for s in self.sources for at in range(s.blocks)]
        super().__init__(names, np.array(lengths), stream.sha256)

    def take(self, positions: Sequence[int]) -> list[EncodedExample]:
        size, places = self.packer.block_size, []
        for at in positions:
            number = int(np.searchsorted(self.firsts, at, side="right")) - 1
            source, block = self.sources[number], at - int(self.firsts[number])
            end = min((block + 1) * size, int(source.starts[-1]))
            documents = (
                int(np.searchsorted(source.starts, block * size, side="right")) - 1,
                int(np.searchsorted(source.starts, end, side="left")),
            )
            places.append((source, block, end, documents))
        wanted = sorted({source.first + at for source, _, _, (first, last) in places for at in range(first, last)})
        tokens = dict(zip(wanted, self.packer.documents([self.stream[at] for at in wanted]), strict=True))
        found = []
        for source, block, end, (first, last) in places:
            ids = [id for at in range(first, last) for id in tokens[source.first + at]]
            start = int(source.starts[first])
            if len(ids) != source.starts[last] - start:
                raise DataError(f"task.train_file {source.name}: it has changed while the run read it; give it back")
            found.append(self.packer.block(ids[block * size - start : end - start], block + 1, source.name))
        return found

    def about(self) -> str:
        size = self.packer.block_size
        tokens = sum(int(source.starts[-1]) for source in self.sources)
        again = sum(source.read_again(size) for source in self.sources) / tokens
        return (
            f"{len(self.stream)} documents, {tokens} tokens, are read and tokenised when their step comes; a block"
            f" tokenises {again:.3g} times its tokens; looked at: {len(self.sample)} of {len(self)} blocks"
        )


def looked_at(examples: Sequence[EncodedExample]) -> Sequence[EncodedExample]:
    """The examples, or those that stand for all of a stream."""
    return examples.sample if isinstance(examples, EncodedStream) else examples


def taken(examples: Sequence[EncodedExample], positions: Iterable[int]) -> list[EncodedExample]:
    """Those at these positions; of a stream all at once."""
    if isinstance(examples, EncodedStream):
        return examples.take(list(positions))
    return [examples[at] for at in positions]
