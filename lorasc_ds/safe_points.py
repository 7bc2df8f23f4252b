"""Safe points: where a run may be left, and how it is taken up again.

At one, the state of a run is what a checkpoint holds: the pairs and the optimizer's moments by name, whole, whatever
the engine; counters; and the length and digest of the ledger, whose last expert has the slow pairs, and which gives the
weights again from the pretrained ones. No generator has a state to keep: order, dropout, pairs and noise are functions
of the seed and of the step, and so is the position in the data.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lorasc_ds.checkpoint import Checkpoint, Checkpoints
from lorasc_ds.errors import CheckpointError, ConfigError, PeerError, PreemptedError
from lorasc_ds.in_flight import InFlight
from lorasc_ds.progress import Progress
from lorasc_ds.tracking import Tracker
from lorasc_ds.trainer import Trainer


class SafePoints:
    """Saves a run where it is due or where it was asked to stop; `steps` are those that it has taken."""

    def __init__(
        self,
        trainer: Trainer,
        tracker: Tracker,
        checkpoints: Checkpoints,
        steps: InFlight,
    ) -> None:
        self.trainer = trainer
        self.steps = steps
        self.tracker = tracker
        self.checkpoints = checkpoints
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
            raise self.trainer.stopping.request(self.trainer.processes)
        if self.due(progress):
            self.save(progress)

    def due(self, progress: Progress) -> bool:
        """Whether a checkpoint is to be written here."""
        every, preparation = self.training.checkpoint_steps, self.trainer.preparation
        last = progress.step == preparation.plan.steps
        if self.training.early_stopping_patience is not None:  # the run may end here, and it may be asked for more
            last = progress.step in preparation.selection_steps
        return every is not None and progress.phase != "closing" and (progress.step % every == 0 or last)

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
        self.steps.settle()  # what is saved is recorded, and was finite
        began = time.perf_counter()
        state, tensors = state_of(self.trainer, self.tracker, progress)
        problem = None
        if self.trainer.processes.main:
            try:
                self.checkpoints.save(progress.name, state, tensors)
            except OSError as error:
                problem = str(error)
            self.rotate()
        problem = self.trainer.processes.share(problem)
        self.tracker.totals.checkpoint_seconds += time.perf_counter() - began
        if problem is None:
            self.failures = 0
            return
        self.failures += 1
        message = f"the checkpoint after step {progress.step} could not be written: {problem}"
        if self.failures > self.training.save_failures_allowed:
            if not self.trainer.processes.main:
                raise PeerError(message, CheckpointError.exit_code, told=True)
            raise CheckpointError(f"{message}; free some space and run the same command again")
        self.tracker.warn(message)

    def rotate(self) -> None:
        """Remove old checkpoints; one that cannot be removed is no reason to end a run."""
        try:
            self.checkpoints.rotate()
        except OSError as error:
            self.tracker.warn(f"old checkpoints could not be removed: {error}")


def kept_parameters(trainer: Trainer, inside: bool) -> dict[str, nn.Parameter]:
    """The trained parameters whose moments the next step needs, by name: those of pairs only where they go on."""
    kept: dict[str, nn.Parameter] = {}
    for one in trainer.weights:
        if inside or trainer.preparation.method.pruning is not None:
            kept |= {f"{one.name}.{part}": p for part, p in (("A", one.A), ("B", one.B)) if p.requires_grad}
    return kept | trainer.live.outside


def state_of(trainer: Trainer, tracker: Tracker, progress: Progress) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Counters, settings and digests, and tensors by name. Collective; what the main process gets is whole."""
    cascade, live, preparation = trainer.cascade, trainer.live, trainer.preparation
    opened = progress.open_expert(preparation.plan)
    selection, tensors = trainer.selection.state()
    if opened is not None:
        for name, pair in live.pairs().items():
            tensors |= {f"{name}.A": pair.A, f"{name}.B": pair.B}
    tensors |= live.persistent()
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
        "base_checksum": trainer.base_checksum,
        "weights_checksum": checksum,
        "optimizer_steps": dict(zip(kept, counts, strict=True)),
        "selection": selection,
        "patience": trainer.patience.state(),
        "tracker": tracker.state(),
        "config": preparation.config.model_dump(mode="json"),
        "data_sha256": preparation.reading.data_sha256,
        "zero_stage": trainer.engine.zero_stage,
        "world_size": trainer.processes.world_size,
    }
    return state, {key: tensor.detach().cpu() for key, tensor in tensors.items()}


def restore(trainer: Trainer, checkpoint: Checkpoint) -> Progress:
    """Make the live state what it was at a safe point. The trainer has the ledger of then.

    Raises:
        ConfigError: the pretrained model is not the one that the run began with.
        CheckpointError: the weights that come of it are not those of then.
        PreemptedError: the run was asked to stop; the checkpoint stays.
    """
    cascade, live, plan = trainer.cascade, trainer.live, trainer.preparation.plan
    state, tensors = checkpoint.state, checkpoint.tensors
    if trainer.base_checksum != state["base_checksum"]:
        raise ConfigError(
            f"model.name_or_path {trainer.preparation.config.model.name_or_path}: its weights have checksum"
            f" {trainer.base_checksum}, but the run began with {state['base_checksum']}: give the model and revision it"
            " began with, or take another --output_dir"
        )
    progress = Progress(state["step"], state["phase"])
    opened = progress.open_expert(plan)
    trainer.selection.resume(state["selection"], tensors)
    trainer.patience.resume(state["patience"])
    noise = state["expert"]["noise"] if opened is not None else {"intensity": 0.0, "scale": {}}

    def passing(expert: int, closed: bool) -> None:
        trainer.stopping.poll(trainer.processes)
        trainer.selection.passing(expert, closed)

    cascade.resume(opened, noise["intensity"], noise["scale"], passing)
    if state["weights_checksum"] not in (None, live.checksum()):  # None: of a rollback, which loads no weights
        raise CheckpointError(
            f"{checkpoint.path}: the pretrained weights and the ledger give other weights than the run had at step"
            f" {progress.step}: a device computes wrongly, or the software has changed; resume where it was run"
        )
    restore_adapters(trainer, opened is not None, tensors, state["optimizer_steps"])
    return progress


def restore_adapters(trainer: Trainer, inside: bool, tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
    """Write pairs, what is trained outside the cascade and the optimizer's state wherever the engine keeps them.

    Args:
        inside: whether an expert is open.
        tensors: as `state_of` gave them.
        counts: of the optimizer's steps, by the name of the parameter.
    """
    backend, device = trainer.live.backend, trainer.processes.device
    for one in trainer.weights:
        for part, parameter in (("A", one.A), ("B", one.B)):
            if f"{one.name}.{part}" in tensors:
                backend.write([parameter], [tensors[f"{one.name}.{part}"].to(device)])
    trainer.live.write_persistent(tensors)
    if any(counts.values()):
        kept = kept_parameters(trainer, inside)
        backend.begin_optimizer()
        for name, parameter in kept.items():
            moments = {moment: tensors[f"{name}.{moment}"].to(device) for moment in backend.moments(parameter)}
            backend.write_moments(parameter, moments)
        backend.write_step_counts(list(kept.values()), [counts[name] for name in kept])
