"""What a ledger holds: whether it is whole, and how much room its experts use. No model is built."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lorasc_ds import inspection_figure, run_figure
from lorasc_ds.algorithm.files import write_atomically
from lorasc_ds.algorithm.ledger import Ledger, LedgerError, digest
from lorasc_ds.config import ModelConfig
from lorasc_ds.errors import ConfigError
from lorasc_ds.figure_files import files_of
from lorasc_ds.inspection_rows import Row, inspect, mean_row
from lorasc_ds.models import pretrained_tensors
from lorasc_ds.run_directory import write_json
from lorasc_ds.run_figure import read_events


def verify(ledger: Ledger, run: Path, base: str | None) -> dict[str, str]:
    """Compare the pretrained weights and the replay with what was written down; the files were, when it was loaded.

    Args:
        base: the pretrained model, where it is not under the name that the ledger has.

    Returns:
        `base` and `weights`: what was found, in words.

    Raises:
        LedgerError: the weights are others than those written down.
        ConfigError: `base` was given and cannot be read.
    """
    config = ModelConfig(
        name_or_path=base or ledger.base.name,
        revision=None if base else ledger.base.revision,
        dtype=ledger.base.dtype,  # pyright: ignore[reportArgumentType]
    )
    try:
        tensors = pretrained_tensors(config)
        # first, since no replay is possible on weights of another shape
        ledger.check_base(tensors(name) for name in ledger.weights)
        replayed = digest(weight for _, weight in ledger.replay(tensors))
    except ConfigError as error:
        if base:
            raise
        return {"base": f"not checked: {error} (or give --base)", "weights": "not checked: they need the base"}
    found = {"base": f"{config.name_or_path} has the sha256 that the run began with"}
    summary = run / "summary.json"
    if not summary.exists():
        return found | {"weights": f"replay to {replayed}; there is no summary.json to compare with"}
    try:
        expected = json.loads(summary.read_text())["weights_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{summary} holds no weights_sha256 that can be read: {error!r}") from error
    if replayed != expected:
        raise LedgerError(
            f"{summary} says that the run ended with weights of sha256 {expected}, but {ledger.directory} replays to"
            f" {replayed}: one of the two is of another run"
        )
    return found | {"weights": "replay to the sha256 in summary.json"}


COLUMNS = {  # heading -> format of a row
    "expert": lambda row: f"{row.expert}",
    "‖D‖": lambda row: f"{row.norm:.3g}",
    "‖total‖": lambda row: f"{row.total_norm:.3g}",
    "effective": lambda row: f"{row.effective_rank:.1f}",
    "stable": lambda row: f"{row.stable_rank:.1f}",
    "numerical": lambda row: f"{row.numerical_rank:.4g}",
    "at most": lambda row: f"{row.bound:.4g}",
    "overlap": lambda row: "-" if row.overlap is None else f"{row.overlap:.2f}",
    "columns": lambda row: "-" if row.column_overlap is None else f"{row.column_overlap:.2f}",
    "rows": lambda row: "-" if row.row_overlap is None else f"{row.row_overlap:.2f}",
    "noise/D": lambda row: f"{row.noise:.2f}",
    "noise/total": lambda row: f"{row.total_noise:.2f}",
}


def table(title: str, rows: Sequence[Row]) -> str:
    """The rows under headings, right-aligned."""
    cells = [list(COLUMNS), *([show(row) for show in COLUMNS.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([title, *lines])


def report(ledger: Ledger) -> list[str]:
    """What the ledger is, in words."""
    lines = [
        f"ledger    {ledger.directory}: {len(ledger.experts)} experts of {ledger.strategy}, rank {ledger.adapter.rank},"
        f" on {len(ledger.weights)} weights of {ledger.base.name}, {ledger.size() / 2**20:.1f} MiB",
        f"files     {len(ledger.files())} of {len(ledger.files())} have the sha256 that was written down",
    ]
    if ledger.compacted > 1:
        lines.append(
            f"compacted experts 1 to {ledger.compacted - 1} are known only as part of a snapshot: ranks and totals"
            f" below count from expert {ledger.compacted} on"
        )
    return lines


def run(options: Namespace, directory: Path) -> None:
    """Carry out what the command line asks for.

    Args:
        directory: of the ledger.

    Raises:
        LedgerError: something is damaged.
        ConfigError: the command line cannot be used.
    """
    ledger = Ledger.load(directory)
    first, last = max(1, ledger.compacted), len(ledger.experts)
    experts = last if options.experts is None else options.experts
    if options.experts is not None and not first <= experts <= last:
        raise ConfigError(f"--experts is {experts}: {directory} has experts {first} to {last} to inspect")
    print("\n".join(report(ledger)))
    verified = verify(ledger, options.run_dir, options.base)
    print("\n".join(f"{what:<9} {words}" for what, words in verified.items()))
    if not experts:
        print("no expert has closed yet: there is nothing to measure")
        return
    weights = inspect(ledger, experts)
    means = [mean_row(rows) for rows in zip(*weights.values(), strict=True)]
    ends = means[:1] + means[1:][-1:]
    rank = ", ".join(f"{row.effective_rank:.1f} after expert {row.expert}" for row in ends)
    print(f"rank      effective rank {rank} (at most {means[-1].bound:.4g})\n")
    print(table(f"mean of {len(weights)} weights, total update after each expert:", means))
    if options.per_weight:
        print("\n" + "\n\n".join(table(f"{name}:", rows) for name, rows in weights.items()))
    output_dir = options.output_dir or options.run_dir
    records = options.run_dir / "metrics.jsonl"
    events = read_events(records) if records.is_file() else []
    title = f"{ledger.strategy}, rank {ledger.adapter.rank}, mean of {len(weights)} weights of {ledger.base.name}"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        content = {
            "ledger": str(directory),
            "ledger_sha256": ledger.sha256(),
            "strategy": ledger.strategy,
            "adapter": asdict(ledger.adapter),
            "base": asdict(ledger.base),
            "experts": experts,
            "first_expert": first,
            "verified": verified,
            "mean": [asdict(row) for row in means],
            "weights": {name: [asdict(row) for row in rows] for name, rows in weights.items()},
        }
        write_json(output_dir / "inspection.json", content)
        figures = {"inspection": inspection_figure.draw(means, title)}
        if events:
            figures["curves"] = run_figure.draw(events, f"{ledger.strategy}, rank {ledger.adapter.rank}")
        for name, content in files_of(figures).items():
            write_atomically(output_dir / name, content)
    except OSError as error:
        raise ConfigError(f"--output_dir {output_dir}: {error.strerror}; choose another") from error
    drawn = " and ".join(f"{name}.png and .svg" for name in figures)
    print(f"\nwritten   {output_dir / 'inspection.json'} (with all singular values); {drawn} beside it")
