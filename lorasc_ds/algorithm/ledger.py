"""The ledger: what was added to the pretrained weights, expert by expert, and their replay.

`W_t` is a pure function of the pretrained `W_0` and the ledger. `ledger.json` lists the experts and
`expert_0001.safetensors` and so on hold their slow pairs in float32: megabytes, where the model has
gigabytes. It is append-only, and a crash leaves it as it was before or after an append.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lorasc_ds.algorithm.experts import Pair
from lorasc_ds.algorithm.files import sha256_of_file, write_atomically
from lorasc_ds.algorithm.merge import add_delta_, add_noise_
from lorasc_ds.algorithm.noise import Purpose, Stream

FORMAT = 1


class LedgerError(ValueError):
    """The ledger is damaged, or does not belong to the weights it is replayed on."""


def bytes_of(weight: Tensor) -> memoryview:
    """The little-endian bytes of a tensor, row-major."""
    return weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def digest(weights: Iterable[Tensor]) -> str:
    """sha256 over the little-endian bytes of the weights, one after the other, nothing between them."""
    total = hashlib.sha256()
    for weight in weights:
        total.update(bytes_of(weight))
    return total.hexdigest()


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
class Ledger:
    """See the module. `weights` are the names of the adapted weights, sorted as strings.

    A name is the key under which `save_pretrained` writes the weight. `slow_retention` and `noise_intensity` are as
    asked for, `auto` too; the experts' are as used. `noised` are the names of matrices that are not adapted and had
    noise all the same, before the first expert (NoisyTune); their streams are counted on from the adapted ones'.
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
    experts: list[ExpertRecord] = field(default_factory=list)

    def save(self) -> None:
        """Write `ledger.json`; the files of the experts are written before they are listed."""
        content = {"format": FORMAT} | {key: value for key, value in asdict(self).items() if key != "directory"}
        if not self.noised:
            del content["noised"]
        self.directory.mkdir(exist_ok=True)
        write_atomically(self.directory / "ledger.json", json.dumps(content, indent=1).encode())

    def append(
        self,
        *,
        index: int,
        steps: tuple[int, int],
        slow_retention: float,
        noise_intensity: float,
        noise_scale: Mapping[str, float],
        slow: Mapping[str, Pair],
        magnitudes: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Record the expert that has just closed: first its file, then the list.

        Raises:
            LedgerError: `index` is not the next one, or a pair holds a number that is not finite.
        """
        if index != len(self.experts) + 1:
            raise LedgerError(f"{self.directory}: expert {index} cannot follow expert {len(self.experts)}")
        tensors = {f"{name}.slow_A": slow[name].A for name in self.weights}
        tensors |= {f"{name}.slow_B": slow[name].B for name in self.weights}
        tensors |= {f"{name}.magnitude": magnitude for name, magnitude in (magnitudes or {}).items()}
        for key, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise LedgerError(f"{self.directory}: {key} of expert {index} holds a number that is not finite")
            tensors[key] = tensor.detach().float().cpu().contiguous()
        path = self.directory / f"expert_{index:04d}.safetensors"
        write_atomically(path, save(tensors))
        scales = {name: noise_scale.get(name, 0.0) for name in (*self.weights, *self.noised)}
        record = ExpertRecord(index, steps, slow_retention, noise_intensity, path.name, sha256_of_file(path), scales)
        self.experts.append(record)
        self.save()

    @classmethod
    def load(cls, directory: Path) -> Ledger:
        """Read `ledger.json` and check every expert's file against its sha256.

        Raises:
            LedgerError: a file is missing or damaged, or the format is another one.
        """
        path = directory / "ledger.json"
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise LedgerError(f"{path} has format {content['format']}, this version reads {FORMAT}")
            experts = [ExpertRecord(**record | {"steps": tuple(record["steps"])}) for record in content["experts"]]
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
                experts=experts,
            )
        except LedgerError:
            raise
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise LedgerError(f"{path} cannot be read as a ledger: {error!r}") from error
        for record in experts:
            file = directory / record.file
            if file.parent != directory or not file.is_file() or sha256_of_file(file) != record.sha256:
                raise LedgerError(f"{file} is missing or not the file that was written (sha256 differs)")
        return ledger

    def closed(self) -> Iterator[tuple[ExpertRecord, dict[str, Pair]]]:
        """Every closed expert with its slow pairs by name."""
        for record in self.experts:
            with safe_open(self.directory / record.file, framework="pt") as file:
                pairs = {n: Pair(*(file.get_tensor(f"{n}.slow_{part}") for part in "AB")) for n in self.weights}
            yield record, pairs

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

    def replay(self, base_weight: Callable[[str], Tensor], experts: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """The adapted weights after the first `experts` experts (default: all), one at a time.

        Args:
            base_weight: gives the pretrained weight of a name, of shape (out, in), in `base.dtype`.

        Yields:
            (name, weight of shape (out, in) in `base.dtype`), the bits of the live run.

        Raises:
            LedgerError: there are fewer experts; or, after the last weight, the pretrained weights were not those the
                run began with. `check_base` tells before.
        """
        if experts is not None and not 0 <= experts <= len(self.experts):
            raise LedgerError(f"{self.directory} holds {len(self.experts)} experts, {experts} were asked for")
        records = self.experts[:experts]
        seen = hashlib.sha256()
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(self.directory / record.file, framework="pt")) for record in records]
            for position, name in enumerate(self.weights):
                base = base_weight(name)
                seen.update(bytes_of(base))
                accumulator = base.detach().float().flatten().clone()
                for record, file in zip(records, files, strict=True):
                    stream = Stream(self.seed, record.index, position, Purpose.NOISE)
                    add_noise_(accumulator, stream, record.noise_scale[name])
                    pair = Pair(file.get_tensor(f"{name}.slow_A"), file.get_tensor(f"{name}.slow_B"))
                    add_delta_(accumulator, pair, self.adapter.scaling)
                yield name, accumulator.to(base.dtype).view(base.shape)
        self.compare_base(seen.hexdigest())

    def replay_noised(self, base_weight: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The matrices of `noised` as the run has them from its first expert on, as `replay` gives the adapted ones."""
        for position, name in enumerate(self.noised, start=len(self.weights)):
            base = base_weight(name)
            noised = base.detach().float().flatten().clone()
            for record in self.experts:
                add_noise_(noised, Stream(self.seed, record.index, position, Purpose.NOISE), record.noise_scale[name])
            yield name, noised.to(base.dtype).view(base.shape)
