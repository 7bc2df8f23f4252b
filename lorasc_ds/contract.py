"""What may change between the beginning of a run and its continuation, and what may not."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lorasc_ds.errors import ConfigError
from lorasc_ds.fields import fields_of, task_fields

FREE = {
    "cascade.accumulator",
    "cascade.check_boundaries",
    "cascade.max_boundary_drift",
    "cascade.merge_path",
    "training.checkpoint_steps",
    "training.checkpoints_kept",
    "training.compile",
    "training.data_workers",
    "training.ddp_timeout",
    "training.eval_batch_size",
    "training.gradient_checkpointing",
    "training.max_skipped_steps",
    "training.micro_batch_size",
    "training.non_finite",
    "training.packing",
    "training.save_failures_allowed",
    "training.save_model",
    "training.share_prefixes",
    "tracking.backends",
    "tracking.log_steps",
    "tracking.project",
    "tracking.tensorboard",
}
"""They change where and how numbers are computed and kept, the results at most by rounding and dropout's masks."""

BY_OVERRIDE = {
    "cascade.rewarmup_steps",
    "task.train_file",
    "training.early_stopping_patience",
    "training.epochs",
    "training.learning_rate",
    "training.max_grad_norm",
    "training.max_steps",
    "training.schedule",
    "training.schedule_span",
    "training.warmup_steps",
    "training.weight_decay",
}
"""They change the steps to come, and hold from there on."""


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """By dotted key: what it was and what it is now."""
    return {key: (old.get(key), new.get(key)) for key in sorted(old | new) if old.get(key) != new.get(key)}


def completed(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run of an earlier version, with the defaults of those that came later."""
    of_task = task_fields().get(settings.get("task.name", ""), {})
    fields = {key: found[0] for key, found in fields_of().items() if not key.startswith("task.")}
    fields |= {f"task.{key}": field for key, field in of_task.items()}
    return {key: field.default for key, field in fields.items() if not field.is_required()} | settings


def check_contract(old: dict[str, Any], new: dict[str, Any], override: Collection[str], remedy: str) -> list[str]:
    """Compare the settings of a run with those it is to go on with.

    Args:
        old, new: the flattened configurations.
        override: keys that `--resume_override` names.
        remedy: for a setting that cannot change.

    Returns:
        what changes, a line each.

    Raises:
        ConfigError: a setting changes that may not, or not without an override.
    """
    changed = changes(completed(old), new)
    told = {key: f"{key} {before} -> {now}" for key, (before, now) in changed.items()}
    fixed = [line for key, line in told.items() if key not in FREE | BY_OVERRIDE]
    if fixed:
        raise ConfigError(f"{', '.join(fixed)}: the run was begun otherwise, and that cannot change; {remedy}")
    needed = [key for key in changed if key in BY_OVERRIDE and key not in override]
    if needed:
        raise ConfigError(
            f"{', '.join(told[key] for key in needed)}: the run was begun otherwise; to apply it from the checkpoint on"
            f" add --resume_override {','.join(needed)}, or {remedy}"
        )
    return list(told.values())


def check_override(keys: Collection[str]) -> None:
    """
    Raises:
        ConfigError: a key cannot be overridden.
    """
    for key in keys:
        if key in FREE:
            raise ConfigError(f"--resume_override {key}: it may change without; leave it out")
        if key not in BY_OVERRIDE:
            raise ConfigError(f"--resume_override {key}: only {', '.join(sorted(BY_OVERRIDE))} can be overridden")
