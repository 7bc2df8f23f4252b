"""What a study would take, from the plans of `--dry_run`: one for all runs that differ in nothing that costs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from statistics import fmean

from lorasc_ds.dry_run import readable as readable_bytes
from lorasc_ds.duration import readable, run_seconds
from lorasc_ds.memory import FREE_SHARE, memory_plan
from lorasc_ds.preparation import prepare
from lorasc_ds.study.plan import Run
from lorasc_ds.study.records import Record

FREE = ("training.learning_rate", "training.seed", "cascade.slow_retention", "cascade.noise_intensity")  # of cost


def estimate(records: Sequence[Record], gpu_memory: int, at_once: int) -> Iterator[str]:
    """Hours and memory of the runs that are not done, by what they cost; and what those that are done took.

    Args:
        gpu_memory: bytes that the GPU has.
        at_once: runs at a time on this machine.
    """
    by_digest = [*{one.run.digest: one for one in records}.values()]
    alike: dict[str, list[Record]] = {}
    for one in by_digest:
        alike.setdefault(cost_of(one.run), []).append(one)
    total, most = 0.0, 0
    taken, planned = 0.0, 0.0  # by the runs that are done: seconds here, and those of the estimate
    known, unknown = 0.0, 0.0  # of those to do: seconds here where like ones are done, else those of the estimate
    yield f"{'runs':>6}  {'to do':>6}  {'each':>8}  {'memory':>8}  like"
    for group in alike.values():
        preparation = prepare(group[0].run.config)
        each, memory = sum(run_seconds(preparation)), memory_plan(preparation, {}).device
        todo = sum(one.state != "done" for one in group)
        seconds = [one.facts["seconds"] for one in group if one.facts and one.kept is None]
        taken, planned = taken + sum(seconds), planned + each * len(seconds)
        known, unknown = (known + todo * fmean(seconds), unknown) if seconds else (known, unknown + todo * each)
        total, most = total + todo * each, max(most, memory)
        yield (
            f"{len(group):>6}  {todo:>6}  {readable(each):>8}  {readable_bytes(memory):>8}  {group[0].run.title}"
            f"{f' ({fmean(seconds):.0f} s measured)' if seconds else ''}"
        )
    fits = "fits" if most <= (1 - FREE_SHARE) * gpu_memory else "too much"
    yield f"time      about {readable(total)} on one H100, one run after the other, an estimate; benchmarks not counted"
    here = f"about {readable((known + unknown * taken / planned) / at_once)}" if taken else "not known"
    done = sum(one.state == "done" for one in by_digest)
    yield f"          {here} here, {at_once} at a time, by the {done} runs done"
    yield f"memory    up to {readable_bytes(most)} of {readable_bytes(gpu_memory)} in one process: {fits}"


def cost_of(run: Run) -> str:
    """Equal for runs that take the same time and memory."""
    kept = sorted(flag for flag in run.flags if flag.removeprefix("--").split("=")[0] not in FREE)
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()
