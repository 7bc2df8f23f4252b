"""What the ledger's files are: the records, the list of them, what is checked when they are read.

`ledger.json` lists the experts, `expert_0001.safetensors` and so on hold their slow pairs in float32, and
`snapshot_0007.safetensors` the accumulators after the first seven experts, where those were compacted. A
crash leaves a ledger as it was before or after what was being done: a file is written before it is listed,
and deleted when it no longer is. Files that are not listed are leftovers, and ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from lorasc_ds.algorithm.files import sha256_of_file, write_atomically
from lorasc_ds.algorithm.tensor_files import digest

FORMAT = 1


class LedgerError(ValueError):
    """The ledger is damaged, or does not belong to the weights it is replayed on."""

    exit_code = 4  # of the command that meets it


@dataclass(frozen=True, slots=True)
class Base:
    """The pretrained weights: `sha256` is the digest of the adapted ones, in `dtype`, in ledger order."""

    name: str
    revision: str | None
    dtype: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Adapter:
    """The LoRA variant; `scaling` is s in `D = s·B·A`."""

    method: str
    rank: int
    scaling: float


@dataclass(frozen=True, slots=True)
class ExpertRecord:
    """A closed expert: the optimizer steps [start, stop) it trained on, and what it added.

    `noise_scale` is c by name, as drawn before it was trained; `sha256` is that of `file`.
    """

    index: int
    steps: tuple[int, int]
    slow_retention: float
    noise_intensity: float
    file: str
    sha256: str
    noise_scale: dict[str, float]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The accumulators after the first `experts` experts: `file` holds `NAME.accumulator`, float32 of (out·in,)."""

    experts: int
    file: str
    sha256: str


@dataclass(slots=True)
class LedgerFiles:
    """The part of a ledger that needs no arithmetic. `weights` are the names of the adapted weights, sorted as strings.

    A name is the key under which `save_pretrained` writes the weight. `slow_retention` and `noise_intensity` are as
    asked for, `auto` too; the experts' are as used. `noised` are the names of matrices that are not adapted and had
    noise all the same, before the first expert (NoisyTune); their streams are counted on from the adapted ones'.
    `classes` are the names of the classes that the outputs of a task's head stand for, in their order; of other
    heads, and without one, there are none.
    """

    directory: Path
    strategy: str
    base: Base
    adapter: Adapter
    seed: int
    slow_retention: float | str
    noise_intensity: float | str
    weights: tuple[str, ...]
    noised: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    experts: list[ExpertRecord] = field(default_factory=list)
    snapshot: Snapshot | None = None

    def content(self) -> dict[str, Any]:
        """What `ledger.json` holds."""
        absent = {"directory"} | {key for key in ("noised", "classes", "snapshot") if not getattr(self, key)}
        return {"format": FORMAT} | {key: value for key, value in asdict(self).items() if key not in absent}

    def save(self) -> None:
        """Write `ledger.json`."""
        self.directory.mkdir(exist_ok=True)
        write_atomically(self.directory / "ledger.json", json.dumps(self.content(), indent=1).encode())

    def sha256(self, experts: int | None = None) -> str:
        """Digest of the header and the first `experts` records (default: all), which hold the digests of their files.

        Appending and compacting do not change it.

        Raises:
            LedgerError: there are fewer.
        """
        content = self.content() | {"experts": [asdict(record) for record in self.first(experts)]}
        content.pop("snapshot", None)
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def size(self) -> int:
        """Bytes of the files that the ledger lists."""
        return sum((self.directory / file).stat().st_size for file in self.files())

    def files(self) -> dict[str, str]:
        """The sha256 of the files that must be there, by name: the snapshot, and the experts not lost in it."""
        listed = {self.snapshot.file: self.snapshot.sha256} if self.snapshot else {}
        # the snapshot's last expert stays: its slow pair goes on being averaged
        return listed | {record.file: record.sha256 for record in self.experts[max(0, self.compacted - 1) :]}

    @property
    def compacted(self) -> int:
        """How many experts the snapshot covers; 0 without one."""
        return self.snapshot.experts if self.snapshot else 0

    def first(self, experts: int | None) -> list[ExpertRecord]:
        """The records of the first `experts` experts (default: all).

        Raises:
            LedgerError: there are fewer.
        """
        if experts is not None and not 0 <= experts <= len(self.experts):
            raise LedgerError(f"{self.directory} holds {len(self.experts)} experts, {experts} were asked for")
        return self.experts[:experts]

    def still_known(self, experts: int | None) -> list[ExpertRecord]:
        """As `first`.

        Raises:
            LedgerError: there are fewer, or the state after so many was compacted away.
        """
        records = self.first(experts)
        if len(records) < self.compacted:
            raise LedgerError(
                f"{self.directory}: experts 1 to {self.compacted} were compacted into one snapshot, and what was there"
                f" after {len(records)} of them is gone: ask for {self.compacted} or more"
            )
        return records

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read `ledger.json` alone; the files that it lists may be damaged.

        Raises:
            LedgerError: it is missing or damaged, or the format is another one.
        """
        path = directory / "ledger.json"
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise LedgerError(f"{path} has format {content['format']}, this version reads {FORMAT}")
            ledger = cls(
                directory=directory,
                strategy=content["strategy"],
                base=Base(**content["base"]),
                adapter=Adapter(**content["adapter"]),
                seed=content["seed"],
                slow_retention=content["slow_retention"],
                noise_intensity=content["noise_intensity"],
                weights=tuple(content["weights"]),
                noised=tuple(content.get("noised", ())),
                classes=tuple(content.get("classes", ())),
                experts=[ExpertRecord(**record | {"steps": tuple(record["steps"])}) for record in content["experts"]],
                snapshot=Snapshot(**content["snapshot"]) if "snapshot" in content else None,
            )
        except LedgerError:
            raise
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise LedgerError(f"{path} cannot be read as a ledger: {error!r}") from error
        named = ledger.snapshot is None or ledger.snapshot.file == f"snapshot_{ledger.compacted:04d}.safetensors"
        if not named or not 0 <= ledger.compacted <= len(ledger.experts):
            raise LedgerError(f"{path} lists {len(ledger.experts)} experts and as a snapshot {ledger.snapshot}")
        return ledger

    @classmethod
    def load(cls, directory: Path, experts: int | None = None) -> Self:
        """Read `ledger.json` and check every file that must be there against its sha256.

        Args:
            experts: the first so many alone; later ones may be damaged.

        Raises:
            LedgerError: as for `read`; or a file is missing or damaged, there are fewer experts, or the state after so
                many was compacted away.
        """
        ledger = cls.read(directory)
        ledger.experts = ledger.still_known(experts)
        for name, sha256 in ledger.files().items():
            file = directory / name
            if file.parent != directory or not file.is_file() or sha256_of_file(file) != sha256:
                raise LedgerError(f"{file} is missing or not the file that was written (sha256 differs)")
        return ledger

    def copy(self, directory: Path) -> None:
        """The same ledger at another place."""
        directory.mkdir(parents=True, exist_ok=True)
        for name in self.files():
            write_atomically(directory / name, (self.directory / name).read_bytes())
        replace(self, directory=directory).save()

    def truncate(self, experts: int, keep: bool) -> None:
        """Drop the records after the first `experts`, then the files of experts that are in none.

        Args:
            keep: move the files to `discarded/001` and so on, with the `ledger.json` that lists them, instead of
                deleting them.

        Raises:
            LedgerError: there are fewer, or the state after so many was compacted away.
        """
        self.experts = self.still_known(experts)
        listed = {record.file for record in self.experts}
        dropped = [file for file in self.directory.glob("expert_*.safetensors") if file.name not in listed]
        discarded = self.directory / "discarded"
        if keep and dropped:
            numbers = [int(path.name) for path in discarded.glob("[0-9]*")]
            discarded /= f"{max(numbers, default=0) + 1:03d}"
            discarded.mkdir(parents=True)
            write_atomically(discarded / "ledger.json", (self.directory / "ledger.json").read_bytes())
        self.save()
        for file in dropped:
            if keep:
                file.replace(discarded / file.name)
            else:
                file.unlink()

    def check_base(self, weights: Iterable[Tensor]) -> None:
        """Compare the adapted weights of a pretrained model, in ledger order, with those the run began with.

        Raises:
            LedgerError: they differ.
        """
        self.compare_base(digest(weights))

    def compare_base(self, found: str) -> None:
        if found != self.base.sha256:
            raise LedgerError(
                f"the adapted weights of {self.base.name} have sha256 {found}, but this ledger was written for"
                f" {self.base.sha256}: load the run's revision ({self.base.revision}) and dtype ({self.base.dtype})"
            )
