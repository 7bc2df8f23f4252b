"""The ledger: what was added to the pretrained weights, expert by expert, and their replay.

`W_t` is a pure function of the pretrained `W_0` and the ledger: megabytes, where the model has gigabytes.
A long one is compacted: a snapshot of the accumulators takes the place of its first experts' pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lorasc_ds.algorithm.experts import Pair
from lorasc_ds.algorithm.files import sha256_of_file
from lorasc_ds.algorithm.ledger_files import Adapter, Base, ExpertRecord, LedgerError, LedgerFiles, Snapshot
from lorasc_ds.algorithm.merge import Edit, edit_
from lorasc_ds.algorithm.noise import Purpose, Stream
from lorasc_ds.algorithm.tensor_files import bytes_of, digest, write_tensors

__all__ = ["Adapter", "Base", "ExpertRecord", "Ledger", "LedgerError", "Snapshot", "digest", "read_pair"]


def read_pair(file: Any, name: str) -> Pair:
    """The slow pair of a weight in the open file of an expert (`Ledger.expert_file`)."""
    return Pair(file.get_tensor(f"{name}.slow_A"), file.get_tensor(f"{name}.slow_B"))


@dataclass(slots=True)
class Ledger(LedgerFiles):
    """See the module; the fields are those of `LedgerFiles`."""

    def append(
        self,
        *,
        index: int,
        steps: tuple[int, int],
        slow_retention: float,
        noise_intensity: float,
        noise_scale: Mapping[str, float],
        slow: Mapping[str, Pair],
        persistent: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Record the expert that has just closed: first its file, then the list.

        Args:
            persistent: what is trained outside the cascade, by its key: `NAME.magnitude` of DoRA, `head.PART`.

        Raises:
            LedgerError: `index` is not the next one, or a pair holds a number that is not finite.
        """
        if index != len(self.experts) + 1:
            raise LedgerError(f"{self.directory}: expert {index} cannot follow expert {len(self.experts)}")
        tensors = {f"{name}.slow_A": slow[name].A for name in self.weights}
        tensors |= {f"{name}.slow_B": slow[name].B for name in self.weights}
        tensors |= persistent or {}
        for key, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise LedgerError(f"{self.directory}: {key} of expert {index} holds a number that is not finite")
        path = self.directory / f"expert_{index:04d}.safetensors"
        shapes = {key: (torch.float32, tensor.shape) for key, tensor in tensors.items()}
        write_tensors(path, shapes, lambda key: tensors[key].float())
        scales = {name: noise_scale.get(name, 0.0) for name in (*self.weights, *self.noised)}
        record = ExpertRecord(index, steps, slow_retention, noise_intensity, path.name, sha256_of_file(path), scales)
        self.experts.append(record)
        self.save()

    def compact(self, base_weight: Callable[[str], Tensor], experts: int) -> None:
        """Put a snapshot in the place of the first `experts` experts, about one weight in memory at a time.

        Later replays have the same bits. What comes before the snapshot can no longer be had alone: no rollback
        to it, no adapter of it, no replay without its noise. The records stay, and the last of these experts.

        Args:
            base_weight: as for `replay`; called twice for each name.

        Raises:
            LedgerError: there are fewer experts or none, more are compacted already, or the pretrained weights are
                not those that the run began with; nothing has changed then.
        """
        if not self.still_known(experts):
            raise LedgerError(f"{self.directory}: no experts were asked for, and a snapshot needs one or more")
        seen, sizes = hashlib.sha256(), {}
        for name in self.weights:
            base = base_weight(name)
            seen.update(bytes_of(base))
            sizes[f"{name}.accumulator"] = (torch.float32, (base.numel(),))
        self.compare_base(seen.hexdigest())
        path = self.directory / f"snapshot_{experts:04d}.safetensors"
        with self.opened(experts, noise=True) as files:

            def produce(key: str) -> Tensor:
                name = key.removesuffix(".accumulator")
                return self.accumulator(name, base_weight(name), files, noise=True)

            write_tensors(path, sizes, produce)
        self.snapshot = Snapshot(experts, path.name, sha256_of_file(path))
        self.save()
        for record in self.experts[: experts - 1]:
            (self.directory / record.file).unlink(missing_ok=True)
        for other in self.directory.glob("snapshot_*.safetensors"):
            if other != path:
                other.unlink()

    def closed(self) -> Iterator[tuple[ExpertRecord, dict[str, Pair]]]:
        """Every closed expert with its slow pairs by name; of a compacted ledger, those after the snapshot."""
        for record in self.experts[self.compacted :]:
            yield record, self.slow(record.index)

    def slow(self, experts: int) -> dict[str, Pair]:
        """The slow pairs by name after so many experts: those that the last of them merged.

        Raises:
            LedgerError: there are fewer, or it was compacted away.
        """
        with self.expert_file(experts) as file:
            return {name: read_pair(file, name) for name in self.weights}

    def magnitudes(self, experts: int | None = None) -> dict[str, Tensor]:
        """DoRA's magnitudes by name after so many experts (default: all); {} for other methods or no expert.

        Raises:
            LedgerError: as for `slow`.
        """
        held = self.persistent(experts)
        return {name: held[f"{name}.magnitude"] for name in self.weights if f"{name}.magnitude" in held}

    def head(self, experts: int | None = None) -> dict[str, Tensor]:
        """A trained task head's parts (`weight`, `bias`) after so many experts; {} where none is trained.

        Raises:
            LedgerError: as for `slow`.
        """
        held = self.persistent(experts)
        return {key.removeprefix("head."): tensor for key, tensor in held.items() if key.startswith("head.")}

    def persistent(self, experts: int | None = None) -> dict[str, Tensor]:
        """What was trained outside the cascade, by its key in the expert's file; {} before the first expert closed."""
        count = len(self.first(experts))
        if count == 0:
            return {}
        pairs = {f"{name}.{part}" for name in self.weights for part in ("slow_A", "slow_B")}
        with self.expert_file(count) as file:
            return {key: file.get_tensor(key) for key in sorted(set(file.keys()) - pairs)}

    def expert_file(self, experts: int) -> Any:
        """The open file of the last of so many experts."""
        if not self.still_known(experts):
            raise LedgerError(f"{self.directory}: no expert was asked for; the first has index 1")
        return safe_open(self.directory / self.experts[experts - 1].file, framework="pt")

    def accumulator_slice(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a weight's accumulator in the snapshot, float32 of (stop - start,).

        No more than them is read.

        Raises:
            LedgerError: there is no snapshot.
        """
        if self.snapshot is None:
            raise LedgerError(f"{self.directory} has no snapshot: its accumulators are replayed from expert 1")
        with safe_open(self.directory / self.snapshot.file, framework="pt") as file:
            return file.get_slice(f"{name}.accumulator")[start:stop]

    def replay(
        self, base_weight: Callable[[str], Tensor], experts: int | None = None, noise: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """The adapted weights after the first `experts` experts (default: all), one at a time.

        Args:
            base_weight: gives the pretrained weight of a name, of shape (out, in), in `base.dtype`.
            noise: False leaves the noise out, as the run never had it.

        Yields:
            (name, weight of shape (out, in) in `base.dtype`), the bits of the live run where `noise` is True.

        Raises:
            LedgerError: there are fewer experts, or what is asked for was compacted away; or, after the last weight,
                the pretrained weights were not those the run began with. `check_base` tells before.
        """
        seen = hashlib.sha256()
        with self.opened(experts, noise) as files:
            for name in self.weights:
                base = base_weight(name)
                seen.update(bytes_of(base))
                yield name, self.accumulator(name, base, files, noise).to(base.dtype).view(base.shape)
        self.compare_base(seen.hexdigest())

    @contextmanager
    def opened(self, experts: int | None, noise: bool) -> Iterator[list[tuple[ExpertRecord, Any]]]:
        """The records after the snapshot, up to `experts`, each with its open file."""
        records = self.still_known(experts)[self.compacted :]
        if self.snapshot is not None and not noise:
            raise LedgerError(
                f"{self.directory}: experts 1 to {self.compacted} were compacted with their noise, which can no longer"
                " be left out"
            )
        with ExitStack() as stack:
            yield [
                (record, stack.enter_context(safe_open(self.directory / record.file, framework="pt")))
                for record in records
            ]

    def accumulator(self, name: str, base: Tensor, files: list[tuple[ExpertRecord, Any]], noise: bool) -> Tensor:
        """The accumulator of a weight after the experts of `files`, float32 of (out·in,)."""
        if self.snapshot is None:
            accumulator = base.detach().flatten().to(torch.float32, copy=True)
        else:
            accumulator = self.accumulator_slice(name, 0, base.numel()).clone()  # the file may be mapped
        for record, file in files:
            if noise:
                stream = Stream(self.seed, record.index, self.weights.index(name), Purpose.NOISE)
                edit_([Edit(accumulator, accumulator, stream=stream, noise_scale=record.noise_scale[name])])
            pair, scaling = read_pair(file, name), self.adapter.scaling
            edit_([Edit(accumulator, accumulator, pair=pair, scaling=scaling)])
        return accumulator

    def replay_noised(
        self, base_weight: Callable[[str], Tensor], experts: int | None = None, noise: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """The matrices of `noised` as the run has them from its first expert on, as `replay` gives the adapted ones."""
        records = self.first(experts) if noise else []
        for position, name in enumerate(self.noised, start=len(self.weights)):
            base = base_weight(name)
            noised = base.detach().flatten().to(torch.float32, copy=True)
            for record in records:
                stream = Stream(self.seed, record.index, position, Purpose.NOISE)
                edit_([Edit(noised, noised, stream=stream, noise_scale=record.noise_scale[name])])
            yield name, noised.to(base.dtype).view(base.shape)
