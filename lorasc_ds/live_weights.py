"""The adapted weights of a live run and the pairs on them, wherever an engine keeps them: what a boundary does to them.

Everything is in place: the same tensors, the same optimizer object. Nothing is torn down and nothing grows.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorasc_ds.adapters import AdaptedWeight, backbone_items
from lorasc_ds.algorithm import experts, merge
from lorasc_ds.algorithm.dora import shipped_weight
from lorasc_ds.algorithm.experts import Pair
from lorasc_ds.algorithm.ledger import digest
from lorasc_ds.algorithm.merge import Edit
from lorasc_ds.algorithm.noise import Purpose, Stream
from lorasc_ds.algorithm.pruning import pruned_elements
from lorasc_ds.algorithm.restart import fresh_pairs
from lorasc_ds.errors import PreemptedError
from lorasc_ds.method import Pruning
from lorasc_ds.models import read_weights, save_model
from lorasc_ds.profiling import span
from lorasc_ds.sharding import Backend, Processes, Slice

FIRST_MOMENT = "exp_avg"  # as Adam, AdamW and DeepSpeed's call it
PRUNING_STREAMS = 1 << 31  # as the weight index of a `Stream`: weights are fewer, so random pruning meets no noise


class LiveWeights:
    """The adapted weights, their accumulators, their pairs and the optimizer of these.

    Args:
        weights: the adapted weights in ledger order.
        backend: edits them wherever they live.
        processes: those of the run.
        seed: draws the pairs, the noise and ReLoRA's random pruning.
        head: the parts of a task head that are trained, outside the cascade, by name (`weight`, `bias`).
        other_matrices: frozen matrices besides the adapted ones that NoisyTune's noise falls on, in the ledger's order.
        projects_gradients: LoRA-FA's projection of the gradient of `B`.
        accumulator: `device`, or `host` memory, for the float32 sums behind bfloat16 weights.
    """

    def __init__(
        self,
        weights: Sequence[AdaptedWeight],
        backend: Backend,
        processes: Processes,
        *,
        seed: int,
        head: Mapping[str, nn.Parameter] | None = None,
        other_matrices: Mapping[str, nn.Parameter] | None = None,
        projects_gradients: bool = False,
        accumulator: str = "device",
    ) -> None:
        self.weights = weights
        self.backend = backend
        self.processes = processes
        self.seed = seed
        self.other_matrices = other_matrices or {}
        magnitudes = {f"{one.name}.magnitude": one.magnitude for one in weights}
        self.outside = {key: parameter for key, parameter in magnitudes.items() if parameter is not None}
        self.outside |= {f"head.{part}": parameter for part, parameter in (head or {}).items()}
        self.projects_gradients = projects_gradients
        self.projections: dict[str, Tensor] = {}
        if projects_gradients:
            for one in weights:
                one.B.register_hook(lambda gradient, name=one.name: self.projected(gradient, name))
        self.accumulators: dict[str, Tensor] = {}
        for parts in self.slices():
            for one, part in parts:
                if one.weight.dtype != torch.float32:  # a float32 weight is its own accumulator
                    device = part.flat.device if accumulator == "device" else torch.device("cpu")
                    self.accumulators[one.name] = part.flat.to(device, torch.float32)
        self.edit_ = merge.edit_through_host_ if accumulator == "host" and self.accumulators else merge.edit_

    @property
    def pair_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of the pairs, in ledger order."""
        return [parameter for one in self.weights for parameter in one.pair]

    def slices(self) -> Iterator[list[tuple[AdaptedWeight, Slice]]]:
        """The adapted weights and what this process edits of them, as many as the backend has whole at once."""
        weights = iter(self.weights)
        for parts in self.backend.edit([one.weight for one in self.weights]):
            yield [(next(weights), part) for part in parts]

    def accumulator_of(self, one: AdaptedWeight, part: Slice) -> Tensor:
        return self.accumulators.get(one.name, part.flat)

    def noise_stream(self, expert: int, position: int) -> Stream:
        return Stream(self.seed, expert, position, Purpose.NOISE)

    def stds(self) -> dict[str, float]:
        """The standard deviation of every weight that NoisyTune's noise falls on, by name, the main process's."""
        matrices = {one.name: one.weight for one in self.weights} | dict(self.other_matrices)
        stds = []
        for matrix in matrices.values():
            whole = self.backend.full(matrix)
            stds.append(experts.std_of_matrix(whole) if self.processes.main else 0.0)
        return dict(zip(matrices, self.processes.broadcast(stds), strict=True))

    def change(
        self,
        pairs: Mapping[str, Pair] | None = None,
        expert: int = 0,
        noise_scale: Mapping[str, float] | None = None,
        virtual: bool = False,
    ) -> Tensor:
        """W <- W + D (eq. 12), then W <- W + N (eqs. 7, 8), in one pass over the adapted weights.

        Args:
            pairs: what is added, by name; None: nothing.
            expert: the one that the noise is drawn before.
            noise_scale: c, by name; None: there is no noise.
            virtual: the accumulators stay as they are.

        Returns:
            float64 of (2,): what `merge.edit_` returns, over the slices of this process.
        """
        squares = []
        position = itertools.count()
        for parts in self.slices():
            edits = [
                Edit(
                    part.flat,
                    self.accumulator_of(one, part),
                    part.start,
                    None if pairs is None else pairs[one.name].to(self.accumulator_of(one, part).device),
                    one.scaling,
                    self.noise_stream(expert, next(position)),
                    0.0 if noise_scale is None else noise_scale[one.name],
                )
                for one, part in parts
            ]
            squares.append(self.edit_(edits, virtual=virtual))
        return torch.stack(squares).sum(0)

    @span("noise")
    def add_noise(self, expert: int, noise_scale: Mapping[str, float]) -> None:
        """W <- W + N, with c by name; also of the other matrices that have one."""
        if not any(noise_scale.values()):
            return
        self.change(expert=expert, noise_scale=noise_scale)
        noised = {name: matrix for name, matrix in self.other_matrices.items() if name in noise_scale}
        position = itertools.count(len(self.weights))
        names = iter(noised)
        for parts in self.backend.edit(list(noised.values())) if noised else ():
            for part in parts:
                stream, c = self.noise_stream(expert, next(position)), noise_scale[next(names)]
                merge.edit_([Edit(part.flat, part.flat.float(), part.start, stream=stream, noise_scale=c)])

    @span("merge")
    def merge(self, pairs: Mapping[str, Pair]) -> Tensor:
        """W <- W + D and B <- 0. Returns what `change` does."""
        squares = self.change(pairs)
        self.clear_B()
        return squares

    def add(self, pairs: Mapping[str, Pair]) -> None:
        """W <- W + D, to make again what `merge` did once; the pairs that are on the model stay."""
        self.change(pairs)

    def write_accumulators(self, slice_of: Callable[[str, int, int], Tensor]) -> None:
        """Set the float32 sums behind the weights, and the weights.

        Args:
            slice_of: gives the elements [start, stop) of a weight's sums by its name, float32 of (stop - start,).
        """
        for parts in self.slices():
            for one, part in parts:
                accumulator = self.accumulator_of(one, part)
                accumulator.copy_(slice_of(one.name, part.start, part.start + part.flat.numel()))
                merge.round_into_(part.flat, accumulator)

    def as_if_noisy(self, expert: int, noise_scale: Mapping[str, float]) -> AbstractContextManager[None]:
        """Inside, the adapted weights are what `add_noise` would make of them."""
        return self.undone(lambda: self.change(expert=expert, noise_scale=noise_scale, virtual=True))

    @contextmanager
    def as_if_merged(self, pairs: Mapping[str, Pair], fast: Mapping[str, Pair]) -> Iterator[None]:
        """Inside, the model is what `merge` would make of it; `fast` are the pairs that are on it before and after."""

        def restore_B() -> None:
            self.backend.write([one.B for one in self.weights], [fast[one.name].B for one in self.weights])

        with self.as_if_added(pairs, before=self.clear_B, after=restore_B):
            yield

    def as_if_added(
        self,
        pairs: Mapping[str, Pair],
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
    ) -> AbstractContextManager[None]:
        """Inside, the adapted weights are what `add` would make of them; `before` and `after` as in `undone`."""
        return self.undone(lambda: self.change(pairs, virtual=True), before, after)

    @contextmanager
    def undone(
        self,
        write: Callable[[], object],
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
    ) -> Iterator[None]:
        """Inside, the weights in use are what `write` makes of them; after, the accumulators rounded again, to the bit.

        Args:
            write: sets the adapted weights and leaves the accumulators as they are.
            before, after: called besides, when all is written and when all is undone.
        """
        kept: dict[str, Tensor] = {}
        for parts in self.slices():
            kept |= {one.name: part.flat.clone() for one, part in parts if one.name not in self.accumulators}
        write()
        before()

        def undo() -> None:
            for parts in self.slices():
                for one, part in parts:
                    merge.round_into_(part.flat, kept.get(one.name, self.accumulator_of(one, part)))
            after()

        try:
            yield
        except BaseException as error:
            # Of several processes, the others are here to take part only if all were asked to stop.
            if self.processes.world_size == 1 or isinstance(error, PreemptedError):
                undo()
            raise
        undo()

    def clear_B(self) -> None:
        zeros = [torch.zeros((), device=self.processes.device).expand(one.shape[0], one.rank) for one in self.weights]
        self.backend.write([one.B for one in self.weights], zeros)

    def pairs(self) -> dict[str, Pair]:
        """The pairs as they are, whole, by name."""
        return {one.name: Pair(self.backend.read(one.A), self.backend.read(one.B)) for one in self.weights}

    def write_pairs(self, pairs: Mapping[str, Pair]) -> None:
        parameters = [parameter for one in self.weights for parameter in (one.A, one.B)]
        self.backend.write(parameters, [factor for one in self.weights for factor in pairs[one.name]])

    def fresh_pairs(self, expert: int) -> dict[str, Pair]:
        """What `expert` begins with, by name."""
        streams = [Stream(self.seed, expert, position, Purpose.FRESH_A) for position in range(len(self.weights))]
        shapes, ranks = [one.shape for one in self.weights], [one.rank for one in self.weights]
        pairs = fresh_pairs(streams, shapes, ranks, self.processes.device)
        return dict(zip((one.name for one in self.weights), pairs, strict=True))

    def restart_pairs(self, expert: int) -> dict[str, Pair]:
        """Write a fresh pair onto every weight; returned by name."""
        pairs = self.fresh_pairs(expert)
        self.write_pairs(pairs)
        self.project_gradients(pairs)
        return pairs

    def project_gradients(self, pairs: Mapping[str, Pair]) -> None:
        """From now on project the gradients of `B` by these `A`, where the method does."""
        if self.projects_gradients:
            self.projections = {o.name: experts.gradient_projection(pairs[o.name].A, o.scaling) for o in self.weights}

    def projected(self, gradient: Tensor, name: str) -> Tensor:
        """The gradient of a `B`, which an engine may have in bfloat16; as it is, where nothing projects now."""
        projection = self.projections.get(name)
        return gradient if projection is None else (gradient.float() @ projection).to(gradient.dtype)

    def write_frozen(self, pairs: Mapping[str, Pair]) -> None:
        """Write the parts of the pairs that are not trained, which a checkpoint of what is trained lacks (LoRA-FA)."""
        frozen = [one for one in self.weights if not one.A.requires_grad]
        if frozen:
            self.backend.write([one.A for one in frozen], [pairs[one.name].A for one in frozen])

    def prune_optimizer(self, expert: int, pruning: Pruning) -> tuple[float, list[str]]:
        """Set a share of the pairs' moments to zero; step counts stay (ReLoRA).

        Returns:
            the share of their elements that are zero, read back; and which of them are not what was written.
        """
        zeros = elements = 0
        wrong = []
        for position, one in enumerate(self.weights):
            for part, parameter in enumerate((one.A, one.B)):
                moments = self.backend.moments(parameter) if parameter.requires_grad else {}
                if not moments:  # LoRA-FA's A; or no step has been taken
                    continue
                stream = self.noise_stream(expert, PRUNING_STREAMS + 2 * position + part)
                chosen = pruned_elements(moments[FIRST_MOMENT], pruning.method, pruning.fraction, stream)
                for moment in moments.values():
                    moment.view(-1)[chosen] = 0
                self.backend.write_moments(parameter, moments)
                for name, held in self.backend.moments(parameter).items():
                    zeros += int((held == 0).sum())
                    elements += held.numel()
                    if not torch.equal(held, moments[name]):
                        wrong.append(f"{one.name}.{'AB'[part]}: {name} is not what was written")
        return zeros / elements if elements else 1.0, wrong

    def differing(self, pairs: Mapping[str, Pair]) -> list[str]:
        """Where the pairs are not `pairs` in every copy that this process keeps; asking may be collective."""
        held = {
            f"{one.name}.{part}": self.backend.holds(parameter, value)
            for one in self.weights
            for part, parameter, value in zip("AB", (one.A, one.B), pairs[one.name], strict=True)
        }
        return [f"{name} is not what was written" for name, right in held.items() if not right]

    def persistent(self) -> dict[str, Tensor]:
        """What is trained outside the cascade, DoRA's magnitudes and a task head, copies by their ledger keys."""
        return {key: self.backend.read(parameter) for key, parameter in self.outside.items()}

    def head(self) -> dict[str, Tensor]:
        """The parts of the task's head that is trained, copies; {} where none is."""
        return {
            key.removeprefix("head."): self.backend.read(parameter)
            for key, parameter in self.outside.items()
            if key.startswith("head.")
        }

    def write_persistent(self, values: Mapping[str, Tensor]) -> None:
        if self.outside:
            of_each = [values[key].to(self.processes.device) for key in self.outside]
            self.backend.write(list(self.outside.values()), of_each)

    def copies(self) -> dict[str, Tensor]:
        """This process's slices of the adapted weights in use, in host memory, by name."""
        copies = {}
        for parts in self.slices():
            copies |= {one.name: part.flat.to("cpu", copy=True) for one, part in parts}
        return copies

    def write_copies(self, copies: Mapping[str, Tensor]) -> None:
        """Set the adapted weights in use, and not the sums behind them, to what `copies` gave."""
        for parts in self.slices():
            for one, part in parts:
                part.flat.copy_(copies[one.name])

    def checksum(self, tensors: Sequence[nn.Parameter] | None = None) -> str:
        """Of the adapted weights in use, or of other frozen ones: cheaper than a digest, alike under every engine."""
        sums = self.backend.bit_sums([one.weight for one in self.weights] if tensors is None else tensors)
        return hashlib.sha256(" ".join(map(str, sums)).encode()).hexdigest()

    def weights_sha256(self) -> str:
        """Digest of the adapted weights in use, in ledger order, as the main process has them."""
        return self.of_main(digest(self.backend.full(one.weight) for one in self.weights))

    def shipped_sha256(self) -> str:
        """Digest of what `save` writes for the adapted weights: for DoRA `m·W/‖W‖`, else the weights in use."""
        return self.of_main(digest(self.shipped(one) for one in self.weights))

    def of_main(self, sha256: str) -> str:
        return bytes(map(int, self.processes.broadcast(list(bytes.fromhex(sha256))))).hex()

    def shipped(self, one: AdaptedWeight) -> Tensor:
        """What a model without adapters computes alike with: whole on the main process."""
        weight = self.backend.full(one.weight)
        if one.magnitude is None:
            return weight
        magnitude = self.backend.read(one.magnitude)
        return shipped_weight(weight, magnitude) if self.processes.main else weight

    def save(self, model: PreTrainedModel, directory: Path, beside: Sequence[Any], sha256: str) -> None:
        """Write the merged model as a plain Hugging Face one, from the main process.

        Args:
            beside: tokenizer and processors, which are saved with it.
            sha256: what its adapted weights, read back, must have.
        """
        whole = {id(one.weight): self.shipped(one) for one in self.weights}  # by tensor: tied ones are read once
        items = list(backbone_items(model))
        for _, tensor in items:
            if id(tensor) not in whole:
                whole[id(tensor)] = self.backend.full(tensor)
        if not self.processes.main:
            return
        names = [one.name for one in self.weights]

        def check(folder: Path) -> None:
            found = read_weights(folder, names)
            if digest(found[name] for name in names) != sha256:
                raise RuntimeError(f"{folder} holds other weights than the live model")

        save_model(model, {name: whole[id(tensor)] for name, tensor in items}, beside, directory, check)
