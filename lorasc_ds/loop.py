"""The loop, which reads like Algorithm 1 of the paper; and what ships at its end."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lorasc_ds.algorithm.plan import Expert
from lorasc_ds.config import TrainingConfig
from lorasc_ds.errors import DivergedError, PreemptedError
from lorasc_ds.profiling import Profile
from lorasc_ds.progress import Progress
from lorasc_ds.reports import StepReport
from lorasc_ds.safe_points import SafePoints
from lorasc_ds.tracking import Tracker
from lorasc_ds.trainer import Trainer, peak_memory


def train(
    trainer: Trainer, tracker: Tracker, safe_points: SafePoints, progress: Progress, directory: Path, profile: Profile
) -> dict[str, Any]:
    """Run the cascade from `progress` on, write the model, and return the summary.

    Raises:
        PreemptedError: the run was asked to stop, and a checkpoint was written.
    """
    preparation, plan = trainer.preparation, trainer.preparation.plan
    cascade, selection, patience, steps = trainer.cascade, trainer.selection, trainer.patience, safe_points.steps
    tracker.say(f"engine    {trainer.engine.name}, merges {trainer.backend.merge_path}")
    tracker.learning_rates(trainer.learning_rates)
    if tracker.signs.not_judged:
        tracker.say(f"signs     not judged: {tracker.signs.not_judged}")

    def keep_examples() -> None:
        """Those of the weights that would ship, as far as is known."""
        if trainer.processes.main and selection.step in (0, progress.step):
            trainer.examples.write(directory / "examples.json")

    def evaluate_if_due() -> None:
        if progress.step and (progress.step not in preparation.evaluation_steps or progress.phase == "closing"):
            return
        steps.settle()
        index = plan.expert_at(max(progress.step, 1) - 1).index
        if progress.phase == "training":
            with cascade.as_if_closed() as merged:
                scores = trainer.evaluate()
                selection.consider(progress.step, index, merged, scores)
            patience.consider(progress.step, scores)
            keep_examples()
            tracker.evaluated(f"epoch {tracker.epoch:g}", scores)
            return
        scores = trainer.evaluate()
        tracker.evaluated(f"expert {index}/{plan.experts}" if progress.step else "before training", scores)
        if progress.step in preparation.selection_steps:
            selection.consider(progress.step, index, None, scores)
            patience.consider(progress.step, scores)
        keep_examples()

    def turns_to(closed: Progress, expert: Expert) -> Expert | None:
        """The expert after `expert`, where nothing reads the weights between them."""
        read = closed.step in preparation.evaluation_steps or safe_points.due(closed) or patience.over
        last = expert.index == plan.experts
        return None if last or read or not cascade.can_turn else plan.expert(expert.index + 1)

    try:
        evaluate_if_due()
        for expert in progress.remaining(plan):
            if progress.phase == "merged":
                if patience.over:
                    break
                tracker.opened(expert.index, asdict(cascade.open_expert(expert)))
            for step in range(progress.step, expert.stop):
                if patience.over:  # closing here ships what was scored here
                    break
                profile.before(step, expert)
                steps.add(trainer.training_step(step, preparation.learning_rate(expert, step)))
                progress = Progress.after(step, expert)
                alone = trainer.processes.world_size == 1  # and need not hear it from others, with their numbers
                safe_points.reached(progress, trainer.stopping.asked() if alone else steps.asked_to_stop)
                evaluate_if_due()
            steps.settle()
            closed = Progress(progress.step)
            following = turns_to(closed, expert)
            tracker.closed(asdict(cascade.close_expert(replace(expert, stop=closed.step), following)))
            progress = closed
            if not patience.over and following is None:
                safe_points.reached(progress, trainer.stopping.heard(trainer.processes))
                evaluate_if_due()
    except PreemptedError as reason:
        raise safe_points.leave(progress, reason) from None
    profile.finish()
    if progress.step < plan.steps:
        best = patience.best
        tracker.stopped_early(
            plan.steps,
            f"no dev loss below {patience.losses[best]:.4g}, that of step {best}, in {patience.epochs} epochs",
        )
    return ship(trainer, tracker, directory)


def count(tracker: Tracker, training: TrainingConfig, learning_rate: float, report: StepReport) -> None:
    """Record an optimizer step, or that it was left out.

    Raises:
        DivergedError: its numbers are not finite, and it may not be left out.
    """
    if report.finite:
        tracker.trained(learning_rate, report)
        return
    reason = (
        f"step {tracker.step + 1}: the loss is {report.loss:g} and the gradient's norm {report.grad_norm:g}; its"
        f" examples: {', '.join(report.examples)}"
    )
    if training.non_finite == "stop":
        raise DivergedError(
            f"{reason}; stopped before the update. Lower training.learning_rate, look at these examples, or set"
            " training.non_finite skip"
        )
    tracker.left_out(report, reason)
    if tracker.totals.skipped > training.max_skipped_steps:
        raise DivergedError(
            f"{reason}; more than training.max_skipped_steps {training.max_skipped_steps} steps were left out: lower"
            " training.learning_rate or look at the data"
        )


def ship(trainer: Trainer, tracker: Tracker, directory: Path) -> dict[str, Any]:
    """Write the model that `training.select` chose, and return the summary."""
    preparation, selection = trainer.preparation, trainer.selection
    last_sha256 = trainer.weights_sha256()
    selection.restore()
    selected_sha256, shipped_sha256 = trainer.weights_sha256(), trainer.live.shipped_sha256()
    trainer.save(directory / "model", shipped_sha256)
    trainer.processes.wait()  # the run is done when all are
    config, plan, steps = preparation.config, preparation.plan, tracker.step
    return {
        "strategy": config.cascade.strategy,
        "adapter": config.adapter.model_dump(mode="json") | {"scaling": trainer.weights[0].scaling},
        "model": config.model.model_dump(mode="json"),
        "task": preparation.task.name,
        "engine": trainer.engine.name,
        "merge_path": trainer.backend.merge_path.split(":")[0],
        "device": str(trainer.processes.device),
        "world_size": trainer.processes.world_size,
        "experts": plan.expert_at(steps - 1).index,
        "steps": steps,
        "stopped_early": steps if steps < plan.steps else None,
        "global_batch": config.training.batch_size,
        "learning_rates": trainer.learning_rates,
        "skipped_steps": tracker.totals.skipped,
        "unreadable": tracker.totals.unreadable,
        "warnings": tracker.signs.told,
        "not_judged": tracker.signs.not_judged,
        **({"auto": tracker.choosing(preparation.auto_examples)} if preparation.method.candidates else {}),
        "slow_retention": preparation.asked("slow_retention"),
        "noise_intensity": preparation.asked("noise_intensity"),
        "eval": selection.scores or tracker.after,
        "eval_before": tracker.before,
        "timing": tracker.totals.timing(tracker.counted) | {"peak_memory_bytes": peak_memory(trainer.processes.device)},
        "base_sha256": trainer.base_sha256,
        "weights_sha256": last_sha256,
        "shipped_sha256": shipped_sha256,
        "shipped": {
            "select": config.training.select,
            "step": selection.step or steps,
            "weights_sha256": selected_sha256,
        },
    }
