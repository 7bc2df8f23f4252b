"""Opens and closes experts: the only place where the algorithm, the adapters and the backend meet."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorasc_ds.adapters import AdaptedWeight
from lorasc_ds.algorithm import experts
from lorasc_ds.algorithm.experts import Pair
from lorasc_ds.algorithm.ledger import Ledger
from lorasc_ds.algorithm.plan import Expert
from lorasc_ds.errors import DivergedError
from lorasc_ds.live_weights import LiveWeights
from lorasc_ds.method import Method
from lorasc_ds.profiling import span
from lorasc_ds.reports import Closing, Opening

# A bfloat16 logit of 20 has a spacing of 0.125, a twentieth of a usual standard deviation: sound merges of a pretrained
# model were seen to move single logits by 0.067, so that a bound of 0.05 would end healthy runs.
MAX_BOUNDARY_DRIFT = {torch.float32: 1e-3, torch.bfloat16: 2e-1}


def relative_change(before: Tensor, after: Tensor) -> float:
    """max |Δ logit| / std(logits)."""
    return float((after - before).abs().max() / before.std())


@dataclass(slots=True)
class Choice:
    """The value a boundary took; the dev loss of every candidate and the time it took, where there are several."""

    value: float
    losses: dict[float, float] = field(default_factory=dict)
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Noise:
    """What is added before an expert: λ, and c by name."""

    chosen: Choice
    scale: dict[str, float]


def in_order(weights: Sequence[AdaptedWeight], pairs: Mapping[str, Pair]) -> list[Pair]:
    return [pairs[one.name] for one in weights]


class Boundaries:
    """The slow expert and the boundaries of one run.

    Args:
        live: the adapted weights and their pairs.
        ledger: gets every expert that closes, from the main process.
        method: what happens at a boundary.
        probe: logits of a fixed batch in evaluation mode, float32.
        dev_loss: of the model as it is, the same on all processes; needed where `method` has candidates.
        max_boundary_drift: see `CascadeConfig`; None: by dtype.
        checks: whether the probe is asked before and after every change: `cascade.check_boundaries`.
    """

    def __init__(
        self,
        live: LiveWeights,
        ledger: Ledger,
        method: Method,
        *,
        probe: Callable[[], Tensor],
        dev_loss: Callable[[], float] | None = None,
        max_boundary_drift: float | None = None,
        checks: bool = True,
    ) -> None:
        self.live = live
        self.weights = live.weights
        self.processes = live.processes
        self.ledger = ledger
        self.method = method
        self.probe = probe
        self.dev_loss = dev_loss
        self.max_boundary_drift = max_boundary_drift or MAX_BOUNDARY_DRIFT[self.weights[0].weight.dtype]
        self.checks = checks
        self.slow: dict[str, Pair] = {}
        self.noise_intensity = 0.0
        self.noise_scale: dict[str, float] = {}
        self.noised: Noise | None = None
        """What a turn has added for the expert that opens next."""

    @span("open expert")
    def open_expert(self, expert: Expert) -> Opening:
        """W <- W + N (eqs. 7, 8) where the method has noise, a fresh pair, an empty or pruned optimizer.

        Raises:
            DivergedError: the noise is so large that the model computes nothing finite; or, read back, the engine
                holds something else than was written.
        """
        began = time.perf_counter()
        probes = self.checks and self.method.noises(expert.index)
        before = self.probe() if probes else None
        noise, self.noised = self.noised, None
        if noise is None:
            noise = self.noise(expert)
            self.live.add_noise(expert.index, noise.scale)
        chosen, self.noise_scale = noise.chosen, noise.scale
        self.noise_intensity = chosen.value
        pairs = self.live.restart_pairs(expert.index)
        if expert.index == 1:
            self.slow = pairs
        pruned = self.restart_optimizer(expert)
        noise_change = 0.0 if self.checks else None
        if before is not None:
            noise_change = self.change(before, self.probe())
        self.refuse(expert, self.live.differing(pairs))
        self.check_replicas(expert)
        if noise_change is not None and not math.isfinite(noise_change):
            raise DivergedError(
                f"expert {expert.index}: after the noise the probe's logits are not finite; lower"
                f" cascade.noise_intensity ({self.noise_intensity:g}) or training.learning_rate"
            )
        return Opening(
            noise_intensity=chosen.value,
            noise_losses=chosen.losses,
            noise_scale=dict(self.noise_scale),
            noise_norm=math.hypot(*(experts.noise_norm(self.noise_scale[one.name], one.shape) for one in self.weights)),
            noise_change=noise_change,
            pruned=pruned,
            choosing_seconds=chosen.seconds,
            seconds=time.perf_counter() - began,
        )

    def resume(
        self,
        expert: Expert | None,
        noise_intensity: float,
        noise_scale: Mapping[str, float],
        passing: Callable[[int, bool], None] = lambda expert, closed: None,
    ) -> None:
        """Do to the pretrained weights what the run did until now: the closed experts are in the ledger.

        The pairs and the optimizer are as they were.

        Args:
            expert: the one that is open, if any.
            noise_intensity, noise_scale: as `Opening` gave them for `expert`.
            passing: called whenever the weights are those inside an expert, and those after it: with its index, and
                whether it has closed.
        """
        snapshot = self.ledger.snapshot
        if snapshot is not None:
            self.live.write_accumulators(self.ledger.accumulator_slice)
            self.remember(self.ledger.slow(snapshot.experts))
            passing(snapshot.experts, True)
        for record, slow in self.ledger.closed():
            self.live.add_noise(record.index, record.noise_scale)
            passing(record.index, False)
            self.live.add(slow)
            self.remember(slow)
            passing(record.index, True)
        if expert is None:
            return
        fresh = self.live.fresh_pairs(expert.index)
        if expert.index == 1:
            self.slow = fresh
        self.live.write_frozen(fresh)
        self.live.project_gradients(fresh)
        self.noise_intensity, self.noise_scale = noise_intensity, dict(noise_scale)
        self.live.add_noise(expert.index, noise_scale)
        passing(expert.index, False)

    def remember(self, slow: Mapping[str, Pair]) -> None:
        """Take these as the slow pairs."""
        self.slow = {name: pair.to(self.processes.device) for name, pair in slow.items()}

    def noise(self, expert: Expert) -> Noise:
        """λ and c for opening `expert`: in proportion to std(D(slow)), or for NoisyTune to std(W₀)."""
        if not self.method.noises(expert.index):
            return Noise(Choice(0.0), {one.name: 0.0 for one in self.weights})
        stds = self.live.stds() if self.method.noise == "once" else self.stds_of_slow()

        def scales(intensity: float) -> dict[str, float]:
            return {name: experts.noise_scale(std, intensity) for name, std in stds.items()}

        def trial(intensity: float) -> AbstractContextManager[None]:
            return self.live.as_if_noisy(expert.index, scales(intensity))

        chosen = self.choose(self.method.noise_intensity, trial)
        return Noise(chosen, scales(chosen.value))

    def stds_of_slow(self) -> dict[str, float]:
        """By name, as the main process computes them: the others' arithmetic may differ in the last bit."""
        stds = [0.0] * len(self.weights)
        if self.processes.main:
            stds = [of_one.std for of_one in self.statistics(self.slow)]
        return dict(zip((one.name for one in self.weights), self.processes.broadcast(stds), strict=True))

    def statistics(self, pairs: Mapping[str, Pair]) -> list[experts.DeltaStatistics]:
        """Of what these add to each weight."""
        return experts.delta_statistics(in_order(self.weights, pairs), [one.scaling for one in self.weights])

    def restart_optimizer(self, expert: Expert) -> float | None:
        """Empty the optimizer of the pairs, or prune its moments; read back. Returns `Opening.pruned`."""
        if self.method.pruning is not None and expert.index > 1:
            pruned, wrong = self.live.prune_optimizer(expert.index, self.method.pruning)
            self.refuse(expert, wrong)
            return pruned
        self.live.backend.empty_optimizer(self.live.pair_parameters)
        empty = self.live.backend.optimizer_is_empty(self.live.pair_parameters)
        self.refuse(expert, [] if empty else ["the optimizer's state is not empty"])
        return None

    @property
    def can_turn(self) -> bool:
        """Whether nothing here reads the weights between two experts: see `close_expert`."""
        return not self.checks and len(self.method.noise_intensity) == 1

    @span("close expert")
    def close_expert(self, expert: Expert, following: Expert | None = None) -> Closing:
        """slow <- α·slow + (1-α)·fast (eqs. 10, 11), W <- W + D(slow) (eq. 12), B <- 0, and the ledger.

        Args:
            following: the expert that opens next, where nothing reads the weights before it has: its noise is added in
                the same pass over them, and `open_expert` does the rest.

        Raises:
            DivergedError: the merge changed the model's function, or a pair is not finite. The ledger then
                ends with the expert before.
        """
        began = time.perf_counter()
        averaging_change = 0.0
        before = self.probe() if self.checks else None
        fast = self.live.pairs()
        chosen = self.choose_retention(fast)
        slow, merged = self.slow, self.slow_after(fast, chosen.value)
        if before is not None and chosen.value > 0:
            self.live.write_pairs(merged)
            with_fast, before = before, self.probe()
            averaging_change = self.change(with_fast, before)
        self.slow = merged
        if following is None:
            squares = self.live.merge(merged)
        else:
            self.noised = self.noise(following)
            squares = self.live.change(merged, following.index, self.noised.scale)
        drift = None if before is None else self.check_drift(expert, self.change(before, self.probe()))
        meant, lost = self.processes.sum(squares.to(self.processes.device)).tolist()
        if not math.isfinite(meant):
            raise DivergedError(f"expert {expert.index}: what was merged is not finite; lower training.learning_rate")
        if following is None:
            self.check_replicas(expert)
        statistics = self.statistics(merged)
        norm = math.hypot(*(of_one.norm for of_one in statistics))
        overlap = None if expert.index == 1 else self.overlap(merged, slow, norm)
        persistent = self.live.persistent()
        if self.processes.main:
            self.ledger.append(
                index=expert.index,
                steps=(expert.start, expert.stop),
                slow_retention=chosen.value,
                noise_intensity=self.noise_intensity,
                noise_scale=self.noise_scale,
                slow=self.slow,
                persistent=persistent,
            )
        return Closing(
            slow_retention=chosen.value,
            retention_losses=chosen.losses,
            norm=norm,
            std={one.name: of_one.std for one, of_one in zip(self.weights, statistics, strict=True)},
            overlap=overlap,
            lost=math.sqrt(lost / meant) if meant > 0 else 0.0,
            averaging_change=averaging_change if self.checks else None,
            drift=drift,
            choosing_seconds=chosen.seconds,
            seconds=time.perf_counter() - began,
        )

    def check_drift(self, expert: Expert, drift: float) -> float:
        """
        Raises:
            DivergedError: the merge changed the probe's logits by more than rounding does.
        """
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
        return drift

    @contextmanager
    def as_if_closed(self) -> Iterator[dict[str, Pair]]:
        """Inside, the model is what closing the open expert now would ship; after, it is as before, to the bit.

        Yields:
            what closing would merge, by name.
        """
        fast = self.live.pairs()
        merged = self.slow_after(fast, self.choose_retention(fast).value)
        with self.live.as_if_merged(merged, fast):
            yield merged

    def choose_retention(self, fast: Mapping[str, Pair]) -> Choice:
        """α for closing the open expert now."""
        return self.choose(
            self.method.slow_retention, lambda alpha: self.live.as_if_merged(self.slow_after(fast, alpha), fast)
        )

    def choose(self, candidates: Sequence[float], trial: Callable[[float], AbstractContextManager[None]]) -> Choice:
        """The candidate with the lowest dev loss inside `trial`, of equals the first; one alone is not tried."""
        if len(candidates) == 1:
            return Choice(candidates[0])
        assert self.dev_loss is not None
        began = time.perf_counter()
        losses = {}
        for value in candidates:
            with trial(value):
                losses[value] = self.dev_loss()
        best = min(losses, key=lambda value: losses[value] if math.isfinite(losses[value]) else math.inf)
        return Choice(best, losses, time.perf_counter() - began)

    def slow_after(self, fast: Mapping[str, Pair], slow_retention: float) -> dict[str, Pair]:
        """The slow pairs that closing the open expert now would merge, by name."""
        slow = [self.slow[name] for name in fast]
        return dict(zip(fast, experts.slow_updates(slow, list(fast.values()), slow_retention), strict=True))

    def refuse(self, expert: Expert, wrong: Sequence[str]) -> None:
        """Stop all processes where the engine of any, read back, does not hold what was written to it.

        Raises:
            DivergedError: on all of them.
        """
        problems = self.processes.problems("; ".join(wrong[:3]) if wrong else None)
        if problems:
            raise DivergedError(
                f"expert {expert.index}: the restart did not reach the whole engine ({'; '.join(problems)}): this"
                " engine or optimizer keeps copies that are not known here, so do not trust its run"
            )

    def check_replicas(self, expert: Expert) -> None:
        """Stop where processes that each hold the weights whole hold different ones."""
        differing = self.live.backend.differing_replicas([one.weight for one in self.weights])
        if differing:
            names = ", ".join(self.weights[position].name for position in differing[:3])
            raise DivergedError(
                f"expert {expert.index}: {len(differing)} weights differ between processes ({names}): a device computes"
                " wrongly, or the processes are of different kinds"
            )

    def change(self, before: Tensor, after: Tensor) -> float:
        """`relative_change` as the main process sees it, so that all decide alike."""
        return self.processes.broadcast([relative_change(before, after)])[0]

    def overlap(self, merged: dict[str, Pair], slow: dict[str, Pair], norm: float) -> float:
        """Cosine between what this boundary merges, of this norm, and what the one before merged, `slow`."""
        both = in_order(self.weights, merged), in_order(self.weights, slow)
        product = sum(experts.delta_inner_products(*both, [one.scaling for one in self.weights]))
        before = math.hypot(*(of_one.norm for of_one in self.statistics(slow)))
        return product / (norm * before) if norm * before > 0 else 0.0
