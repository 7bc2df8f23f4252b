"""Opens and closes experts: the only place where the algorithm, the adapters and the backend meet.

A boundary happens in place, inside the live model: the same tensors, the same optimizer object, the same
ledger. Nothing is torn down and nothing grows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorasc_ds.adapters import AdaptedWeight
from lorasc_ds.algorithm import experts, merge
from lorasc_ds.algorithm.experts import Pair
from lorasc_ds.algorithm.ledger import Ledger
from lorasc_ds.algorithm.noise import Purpose, Stream
from lorasc_ds.algorithm.plan import Expert
from lorasc_ds.errors import DivergedError
from lorasc_ds.sharding import Backend, Processes, Slice

# A bfloat16 logit of 20 has a spacing of 0.125, a twentieth of a usual standard deviation: sound merges of a pretrained
# model were seen to move single logits by 0.067, so that a bound of 0.05 would end healthy runs.
MAX_BOUNDARY_DRIFT = {torch.float32: 1e-3, torch.bfloat16: 2e-1}


@dataclass(frozen=True, slots=True)
class Opening:
    """What opening an expert did.

    Args:
        noise_scale: c by name; 0 without noise.
        noise_change: change of the probe's logits by the noise, as `relative_change`.
        seconds: wall time, probes included.
    """

    noise_scale: dict[str, float]
    noise_change: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Closing:
    """What closing an expert did, over all adapted weights.

    Args:
        norm: Frobenius norm of what was merged, D(slow).
        std: its standard deviation, by name.
        overlap: cosine between D(slow) and the D(slow) merged before; None at the first expert.
        lost: share of D(slow), in norm, that the weights in use do not show, by rounding.
        averaging_change: change of the probe's logits as fast becomes slow; 0 with α = 0.
        drift: change of the probe's logits by the merge alone; bounded.
        seconds: wall time, probes included.
    """

    norm: float
    std: dict[str, float]
    overlap: float | None
    lost: float
    averaging_change: float
    drift: float
    seconds: float


def relative_change(before: Tensor, after: Tensor) -> float:
    """max |Δ logit| / std(logits)."""
    return float((after - before).abs().max() / before.std())


class Cascade:
    """The slow expert, the accumulators and the boundaries of one run.

    Args:
        weights: the adapted weights in ledger order.
        backend: edits them wherever they live.
        processes: those of the run.
        ledger: gets every expert that closes, from the main process; its seed draws the pairs and the noise.
        slow_retention: α of eqs. 10 and 11.
        noise_intensity: λ of eq. 8.
        probe: logits of a fixed batch in evaluation mode, float32.
        accumulator: `device`, or `host` memory, for the float32 sums behind bfloat16 weights.
        max_boundary_drift: see `CascadeConfig`; None: by dtype.
    """

    def __init__(
        self,
        weights: Sequence[AdaptedWeight],
        backend: Backend,
        processes: Processes,
        ledger: Ledger,
        *,
        slow_retention: float,
        noise_intensity: float,
        probe: Callable[[], Tensor],
        accumulator: str = "device",
        max_boundary_drift: float | None = None,
    ) -> None:
        self.weights = weights
        self.backend = backend
        self.processes = processes
        self.ledger = ledger
        self.slow_retention = slow_retention
        self.noise_intensity = noise_intensity
        self.probe = probe
        self.max_boundary_drift = max_boundary_drift or MAX_BOUNDARY_DRIFT[weights[0].weight.dtype]
        self.slow: dict[str, Pair] = {}
        self.noise_scale: dict[str, float] = {}
        self.accumulators: dict[str, Tensor] = {}
        for one in weights:
            if one.weight.dtype != torch.float32:  # a float32 weight is its own accumulator
                with backend.edit(one.weight) as part:
                    device = part.flat.device if accumulator == "device" else torch.device("cpu")
                    self.accumulators[one.name] = part.flat.to(device, torch.float32)

    def accumulator_of(self, one: AdaptedWeight, part: Slice) -> Tensor:
        return self.accumulators.get(one.name, part.flat)

    def open_expert(self, expert: Expert) -> Opening:
        """W <- W + N (eqs. 7, 8), a fresh pair, an empty optimizer. The first expert meets no noise.

        Raises:
            DivergedError: the noise is so large that the model computes nothing finite; or, read back, the engine
                holds something else than was written.
        """
        began = time.perf_counter()
        noisy = expert.index > 1 and self.noise_intensity > 0
        before = self.probe() if noisy else None
        self.noise_scale = self.noise_scales() if noisy else {one.name: 0.0 for one in self.weights}
        pairs: dict[str, Pair] = {}
        for position, one in enumerate(self.weights):
            if noisy:
                stream = Stream(self.ledger.seed, expert.index, position, Purpose.NOISE)
                with self.backend.edit(one.weight) as part:
                    accumulator = self.accumulator_of(one, part)
                    merge.add_noise_(accumulator, stream, self.noise_scale[one.name], part.start)
                    merge.round_into_(part.flat, accumulator)
            stream = Stream(self.ledger.seed, expert.index, position, Purpose.FRESH_A)
            pairs[one.name] = experts.fresh_pair(stream, *one.shape, rank=one.rank).to(self.processes.device)
            self.write_pair(one, pairs[one.name])
        if expert.index == 1:
            self.slow = pairs
        self.backend.empty_optimizer()
        noise_change = 0.0 if before is None else self.change(before, self.probe())
        self.read_back(expert, pairs)
        if not math.isfinite(noise_change):
            raise DivergedError(
                f"expert {expert.index}: after the noise the probe's logits are not finite; lower"
                f" cascade.noise_intensity ({self.noise_intensity:g}) or training.learning_rate"
            )
        return Opening(dict(self.noise_scale), noise_change, time.perf_counter() - began)

    def close_expert(self, expert: Expert) -> Closing:
        """slow <- α·slow + (1-α)·fast (eqs. 10, 11), W <- W + D(slow) (eq. 12), B <- 0, and the ledger.

        Raises:
            DivergedError: the merge changed the model's function, or a pair is not finite. The ledger then
                ends with the expert before.
        """
        began = time.perf_counter()
        averaging_change = 0.0
        before = self.probe()
        merged = self.slow_after_closing()
        if self.slow_retention > 0:
            for one in self.weights:
                self.write_pair(one, merged[one.name])
            with_fast, before = before, self.probe()
            averaging_change = self.change(with_fast, before)
        squares = torch.zeros(2, dtype=torch.float64)
        for one in self.weights:
            with self.backend.edit(one.weight) as part:
                accumulator = self.accumulator_of(one, part)
                pair = merged[one.name].to(accumulator.device)
                squares += merge.merge_(part.flat, accumulator, pair, one.scaling, part.start).cpu()
            self.backend.write(one.B, torch.zeros_like(merged[one.name].B))
        drift = self.change(before, self.probe())
        if not math.isfinite(drift):
            raise DivergedError(
                f"expert {expert.index}: merged, the probe's logits are not finite; lower training.learning_rate"
                f" or cascade.noise_intensity ({self.noise_intensity:g})"
            )
        if drift > self.max_boundary_drift:
            raise DivergedError(
                f"expert {expert.index}: merging it changed the probe's logits by {drift:.3g} of their standard"
                f" deviation, more than cascade.max_boundary_drift {self.max_boundary_drift:g}: the numbers have"
                " diverged or the merge is wrong; lower training.learning_rate, or raise the bound if it is rounding"
            )
        self.check_replicas(expert)
        meant, lost = self.processes.sum(squares.to(self.processes.device)).tolist()
        statistics = {one.name: experts.delta_statistics(merged[one.name], one.scaling) for one in self.weights}
        norm = math.hypot(*(of_one.norm for of_one in statistics.values()))
        overlap = None if expert.index == 1 else self.overlap(merged, norm)
        self.slow = merged
        if self.processes.main:
            self.ledger.append(
                index=expert.index,
                steps=(expert.start, expert.stop),
                slow_retention=self.slow_retention,
                noise_intensity=self.noise_intensity,
                noise_scale=self.noise_scale,
                slow=self.slow,
            )
        return Closing(
            norm=norm,
            std={name: of_one.std for name, of_one in statistics.items()},
            overlap=overlap,
            lost=math.sqrt(lost / meant) if meant > 0 else 0.0,
            averaging_change=averaging_change,
            drift=drift,
            seconds=time.perf_counter() - began,
        )

    @contextmanager
    def as_if_closed(self) -> Iterator[None]:
        """Inside, the model is what closing the open expert now would ship; after, it is as before, to the bit."""
        kept: dict[str, Tensor] = {}
        fast_B: dict[str, Tensor] = {}
        slow = self.slow_after_closing()
        for one in self.weights:
            with self.backend.edit(one.weight) as part:
                accumulator = self.accumulator_of(one, part)
                if one.name not in self.accumulators:
                    kept[one.name] = part.flat.clone()
                pair = slow[one.name].to(accumulator.device)
                merge.write_merged_(part.flat, accumulator, pair, one.scaling, part.start)
            fast_B[one.name] = self.backend.read(one.B)
            self.backend.write(one.B, torch.zeros_like(fast_B[one.name]))

        def undo() -> None:
            for one in self.weights:
                with self.backend.edit(one.weight) as part:
                    merge.round_into_(part.flat, kept.get(one.name, self.accumulator_of(one, part)))
                self.backend.write(one.B, fast_B[one.name])

        try:
            yield
        except BaseException:
            if self.processes.world_size == 1:  # else the run is over, and the others are not here to take part
                undo()
            raise
        undo()

    def slow_after_closing(self) -> dict[str, Pair]:
        """The slow pairs that closing the open expert now would merge, by name."""
        return {
            one.name: experts.slow_update(
                self.slow[one.name], Pair(self.backend.read(one.A), self.backend.read(one.B)), self.slow_retention
            )
            for one in self.weights
        }

    def noise_scales(self) -> dict[str, float]:
        """c by name, as the main process computes it: the others' arithmetic may differ in the last bit."""
        scales = [0.0] * len(self.weights)
        if self.processes.main:
            scales = [
                experts.noise_scale(self.slow[one.name], one.scaling, self.noise_intensity) for one in self.weights
            ]
        return dict(zip((one.name for one in self.weights), self.processes.broadcast(scales), strict=True))

    def read_back(self, expert: Expert, pairs: dict[str, Pair]) -> None:
        """Compare the restarted engine with what was written to it.

        Raises:
            DivergedError: on all processes, if on any a parameter, its master, a moment or a weight differs.
        """
        held = {  # all of them are asked: asking may be collective
            f"{one.name}.{part}": self.backend.holds(parameter, value)
            for one in self.weights
            for part, parameter, value in zip("AB", (one.A, one.B), pairs[one.name], strict=True)
        }
        wrong = [f"{name} is not what was written" for name, right in held.items() if not right]
        if not self.backend.optimizer_is_empty():
            wrong.append("the optimizer's state is not empty")
        problems = self.processes.problems("; ".join(wrong[:3]) if wrong else None)
        if problems:
            raise DivergedError(
                f"expert {expert.index}: the restart did not reach the whole engine ({'; '.join(problems)}): this"
                " engine or optimizer keeps copies that are not known here, so do not trust its run"
            )
        self.check_replicas(expert)

    def check_replicas(self, expert: Expert) -> None:
        """Stop where processes that each hold the weights whole hold different ones."""
        differing = self.backend.differing_replicas([one.weight for one in self.weights])
        if differing:
            names = ", ".join(self.weights[position].name for position in differing[:3])
            raise DivergedError(
                f"expert {expert.index}: {len(differing)} weights differ between processes ({names}): a device computes"
                " wrongly, or the processes are of different kinds"
            )

    def change(self, before: Tensor, after: Tensor) -> float:
        """`relative_change` as the main process sees it, so that all decide alike."""
        return self.processes.broadcast([relative_change(before, after)])[0]

    def write_pair(self, one: AdaptedWeight, pair: Pair) -> None:
        self.backend.write(one.A, pair.A)
        self.backend.write(one.B, pair.B)

    def overlap(self, merged: dict[str, Pair], norm: float) -> float:
        """Cosine between what this boundary merges and what the one before merged."""
        product = sum(
            experts.delta_inner_product(merged[one.name], self.slow[one.name], one.scaling) for one in self.weights
        )
        before = math.hypot(*(experts.delta_statistics(self.slow[one.name], one.scaling).norm for one in self.weights))
        return product / (norm * before) if norm * before > 0 else 0.0


def pair_parameters(weights: Sequence[AdaptedWeight]) -> list[nn.Parameter]:
    """The trainable parameters of the pairs, in ledger order."""
    return [parameter for one in weights for parameter in (one.A, one.B)]
