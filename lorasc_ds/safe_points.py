"""Safe points: where a run may be left, and how it is taken up again.

At one, the state of a run is what a checkpoint holds: the pairs and the optimizer's moments by name, whole, whatever
the engine; counters; and the length and digest of the ledger, whose last expert has the slow pairs, and which gives the
weights again from the pretrained ones. No generator has a state to keep: order, dropout, pairs and noise are functions
of the seed and of the step, and so is the position in the data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lorasc_ds.algorithm.ledger import Ledger
from lorasc_ds.algorithm.plan import Expert, Plan
from lorasc_ds.checkpoint import Checkpoint, Checkpoints
from lorasc_ds.errors import CheckpointError, ConfigError, PreemptedError
from lorasc_ds.stopping import Stopping
from lorasc_ds.tracking import Tracker
from lorasc_ds.trainer import Trainer

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: `step` optimizer steps were taken; an evaluation that is due there comes next.

    `training`: inside an expert. `closing`: its last step was taken, its boundary has not begun. `merged`: it is
    closed, or no expert was opened yet.
    """

    step: int = 0
    phase: Literal["training", "closing", "merged"] = "merged"

    @classmethod
    def after(cls, step: int, expert: Expert) -> Progress:
        """Optimizer step `step` of `expert`, counted from 0, was taken."""
        return cls(step + 1, "training" if step + 1 < expert.stop else "closing")

    @property
    def name(self) -> str:
        """Of a checkpoint made here; names sort by age."""
        return f"step_{self.step:08d}_{self.phase}"

    def open_expert(self, plan: Plan) -> Expert | None:
        return None if self.phase == "merged" else plan.expert_at(self.step - 1)

    def remaining(self, plan: Plan) -> Iterator[Expert]:
        """The experts that are not closed; the first of them may be open."""
        closed = plan.experts if self.step == plan.steps else plan.expert_at(self.step).index - 1
        opened = self.open_expert(plan)
        return (plan.expert(index) for index in range(opened.index if opened else closed + 1, plan.experts + 1))


class SafePoints:
    """Saves a run where it is due or where it was asked to stop.

    Args:
        open_base: gives what gives a pretrained weight by its name, for compacting the ledger.
    """

    def __init__(
        self,
        trainer: Trainer,
        tracker: Tracker,
        checkpoints: Checkpoints,
        stopping: Stopping,
        open_base: Callable[[], Callable[[str], Tensor]],
    ) -> None:
        self.trainer = trainer
        self.tracker = tracker
        self.checkpoints = checkpoints
        self.stopping = stopping
        self.open_base = open_base
        self.training = trainer.preparation.config.training
        self.failures = 0

    def reached(self, progress: Progress, asked: bool) -> None:
        """The run is at a safe point.

        Args:
            asked: whether any process was asked to stop; the same in all.

        Raises:
            PreemptedError: so it was; `leave` then saves.
            CheckpointError: too many saves have failed.
        """
        if asked:
            raise self.stopping.request(self.trainer.processes)
        every = self.training.checkpoint_steps
        last = progress.step == self.trainer.preparation.plan.steps
        if every is not None and progress.phase != "closing" and (progress.step % every == 0 or last):
            self.save(progress)

    def leave(self, progress: Progress, reason: PreemptedError) -> PreemptedError:
        """Save, because the run was asked to stop.

        Raises:
            CheckpointError: the checkpoint could not be written.
        """
        self.failures = self.training.save_failures_allowed  # there is no later one
        self.save(progress)
        where = "before the first step" if progress.step == 0 else f"after step {progress.step}"
        return PreemptedError(f"{reason}; left {where}, the same command goes on from there")

    def save(self, progress: Progress) -> None:
        """Collective."""
        began = time.perf_counter()
        state, tensors = state_of(self.trainer, self.tracker, progress)
        problem = None
        if self.trainer.processes.main:
            try:
                self.checkpoints.save(progress.name, state, tensors)
                self.checkpoints.rotate()
                self.compact()
            except OSError as error:
                problem = str(error)
        problem = self.trainer.processes.share(problem)
        self.tracker.checkpoint_seconds += time.perf_counter() - began
        if problem is None:
            self.failures = 0
            return
        self.failures += 1
        message = f"the checkpoint after step {progress.step} could not be written: {problem}"
        if self.failures > self.training.save_failures_allowed:
            raise CheckpointError(f"{message}; free some space and run the same command again")
        self.tracker.warn(message)

    def compact(self) -> None:
        """Where the ledger is too large, put a snapshot in the place of early experts that nothing will ask for."""
        limit = self.trainer.preparation.config.cascade.compact_ledger_above
        ledger = self.trainer.cascade.ledger
        if limit is None or ledger.size() <= limit * GIB:
            return
        needed = [self.checkpoints.state(name)["ledger"]["experts"] for name in self.checkpoints.names()]
        experts = min([*needed, *self.trainer.selection.needed_experts()])
        if experts > ledger.compacted + 1:
            self.tracker.say(f"ledger    more than {limit:g} GiB: experts 1 to {experts} become one snapshot")
            ledger.compact(self.open_base(), experts)


def kept_parameters(trainer: Trainer, inside: bool) -> dict[str, nn.Parameter]:
    """The trained parameters whose moments the next step needs, by name: those of pairs only where they go on."""
    kept: dict[str, nn.Parameter] = {}
    for one in trainer.weights:
        if inside or trainer.preparation.method.pruning is not None:
            kept |= {f"{one.name}.{part}": p for part, p in (("A", one.A), ("B", one.B)) if p.requires_grad}
        if one.magnitude is not None:
            kept[f"{one.name}.magnitude"] = one.magnitude
    return kept


def state_of(trainer: Trainer, tracker: Tracker, progress: Progress) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Counters, settings and digests, and tensors by name. Collective; what the main process gets is whole."""
    cascade, live, preparation = trainer.cascade, trainer.live, trainer.preparation
    opened = progress.open_expert(preparation.plan)
    selection, tensors = trainer.selection.state()
    if opened is not None:
        for name, pair in live.pairs().items():
            tensors |= {f"{name}.A": pair.A, f"{name}.B": pair.B}
    tensors |= {f"{name}.magnitude": magnitude for name, magnitude in live.magnitudes().items()}
    kept = kept_parameters(trainer, opened is not None)
    for name, parameter in kept.items():
        for moment, value in live.backend.moments(parameter).items():
            tensors[f"{name}.{moment}"] = value
    counts = live.backend.step_counts(list(kept.values()))
    checksum = live.checksum()
    if not trainer.processes.main:
        return {}, {}
    noise = {"intensity": cascade.noise_intensity, "scale": cascade.noise_scale}
    ledger = cascade.ledger
    state = {
        "step": progress.step,
        "phase": progress.phase,
        "expert": None if opened is None else {"index": opened.index, "noise": noise},
        "ledger": {"experts": len(ledger.experts), "sha256": ledger.sha256()},
        "weights_checksum": checksum,
        "optimizer_steps": dict(zip(kept, counts, strict=True)),
        "selection": selection,
        "tracker": tracker.state(),
        "config": preparation.config.model_dump(mode="json"),
        "data_sha256": preparation.data_sha256,
        "engine": trainer.engine.name,
        "world_size": trainer.processes.world_size,
    }
    return state, {key: tensor.detach().cpu() for key, tensor in tensors.items()}


def check_plan(plan: Plan, checkpoint: Checkpoint, ledger: Ledger) -> Progress:
    """Where the checkpoint lies in the plan, which may have been overridden.

    Raises:
        ConfigError: in this plan, experts that are in the ledger end elsewhere, or the run is over before.
    """
    progress = Progress(checkpoint.state["step"], checkpoint.state["phase"])
    done = [record.steps for record in ledger.experts]
    expert = checkpoint.state["expert"]
    planned = [(e.start, e.stop) for e in plan][: len(done)]
    fits = done == planned and progress.step <= plan.steps
    if fits and expert is not None:
        opened = plan.expert(expert["index"]) if expert["index"] <= plan.experts else None
        fits = (
            opened is not None
            and progress == Progress.after(progress.step - 1, opened)
            and (opened.start < progress.step <= opened.stop)
        )
    if not fits:
        raise ConfigError(
            f"--resume_override training.epochs: after it the experts of this run end after steps"
            f" {[e.stop for e in plan][:5]}, but until step {progress.step} they ended after"
            f" {[stop for _, stop in done][:5]}: take so many epochs that no expert that has begun ends elsewhere"
        )
    return progress


def restore(trainer: Trainer, checkpoint: Checkpoint) -> Progress:
    """Make the live state what it was at a safe point. The trainer has the ledger of then.

    Raises:
        CheckpointError: the weights that come of it are not those of then.
        ConfigError: see `check_plan`.
    """
    cascade, live, plan = trainer.cascade, trainer.live, trainer.preparation.plan
    state, tensors = checkpoint.state, checkpoint.tensors
    progress = check_plan(plan, checkpoint, cascade.ledger)
    opened = progress.open_expert(plan)
    trainer.selection.resume(state["selection"], tensors)
    noise = state["expert"]["noise"] if opened is not None else {"intensity": 0.0, "scale": {}}
    cascade.resume(opened, noise["intensity"], noise["scale"], trainer.selection.passing)
    if state["weights_checksum"] not in (None, live.checksum()):  # None: of a rollback, which loads no weights
        raise CheckpointError(
            f"{checkpoint.path}: the pretrained weights and the ledger give other weights than the run had at step"
            f" {progress.step}: a device computes wrongly, or the software has changed; resume where it was run"
        )
    for one in trainer.weights:
        parameters = {"A": one.A, "B": one.B, "magnitude": one.magnitude}
        for part, parameter in parameters.items():
            if parameter is not None and f"{one.name}.{part}" in tensors:
                live.backend.write(parameter, tensors[f"{one.name}.{part}"].to(trainer.processes.device))
    counts: dict[str, int] = state["optimizer_steps"]
    if any(counts.values()):
        kept = kept_parameters(trainer, opened is not None)
        live.backend.begin_optimizer()
        for name, parameter in kept.items():
            moments = {key: tensors[f"{name}.{key}"] for key in live.backend.moments(parameter)}
            live.backend.write_moments(parameter, {k: m.to(trainer.processes.device) for k, m in moments.items()})
        live.backend.write_step_counts(list(kept.values()), [counts[name] for name in kept])
    return progress
