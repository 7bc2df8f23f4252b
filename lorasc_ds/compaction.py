"""A long ledger made short: a snapshot of the float32 sums takes the place of early experts."""

from __future__ import annotations

from pathlib import Path

from lorasc_ds import run_directory
from lorasc_ds.algorithm.ledger import Ledger, LedgerError
from lorasc_ds.checkpoint import Checkpoints, problem_of, read
from lorasc_ds.config import ModelConfig
from lorasc_ds.errors import CheckpointError
from lorasc_ds.models import pretrained_tensors

GIB = 1 << 30


def compact(directory: Path, above: float) -> str:
    """Compact the ledger of a run that is not going on, where it is larger than that.

    Args:
        above: GiB of experts' files.

    Returns:
        what was done, in a line.

    Raises:
        CheckpointError: the ledger is damaged, or the pretrained model is not the one that the run began with.
        ConfigError: there is no run, or one that is going on.
    """
    with run_directory.locked(directory):
        try:
            ledger = Ledger.load(directory / "ledger")
            experts = min([len(ledger.experts), *needed(directory)])
            early = [
                ledger.directory / record.file
                for record in ledger.experts[ledger.compacted : max(ledger.compacted, experts - 1)]
            ]
            size = sum(file.stat().st_size for file in early if file.exists())
            if size <= above * GIB:
                return f"{directory}: {len(early)} experts could be compacted, {size / GIB:.3g} GiB: left as they are"
            model = ModelConfig(
                name_or_path=ledger.base.name,
                revision=ledger.base.revision,
                dtype="bfloat16" if ledger.base.dtype == "bfloat16" else "float32",
            )
            ledger.compact(pretrained_tensors(model), experts)
        except LedgerError as error:
            raise CheckpointError(str(error)) from error
    return f"{directory}: experts 1 to {experts} are one snapshot; the ledger has {ledger.size() / GIB:.3g} GiB now"


def needed(directory: Path) -> list[int]:
    """After how many experts the checkpoints of a run still need the weights, for going on and for what ships."""
    checkpoints = Checkpoints(directory / "checkpoints", kept=1)
    found = []
    for name in checkpoints.names():
        if problem_of(checkpoints.directory / name) is None:
            state = read(checkpoints.directory / name).state
            found.append(state["ledger"]["experts"])
            if state["selection"]:
                found.append(state["selection"]["expert"] - (not state["selection"]["closed"]))
    return found
