"""LoRA against the rows of the cascade on images, without a download: `python tests/vit_study.py DIR`.

The vision transformer in the package, which reads upright digits, is adapted to mirrored ones. A row's learning rate
is the one with the highest mean dev accuracy over the seeds, and it is that rate's runs that are reported on test.
Writes DIR/study.md and DIR/study.json, which holds the whole grid; runs that are finished are not run again. The
120 runs take some 17 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from itertools import product
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parents[1] / "launch" / "recipes" / "vit-digits.yaml"
ROWS = {  # of the paper's Table 3, and COLA
    "LoRA": ("lora",),
    "COLA": ("cola",),
    "+ Cascade": ("cascade",),
    "++ Slow LoRA": ("slow",),
    "+++ Noise Tuning": ("lorasc",),
}
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
CONDITIONS = {
    "197 images, right labels": {"task.train_examples": 197, "task.label_noise": 0.0, "training.batch_size": 16},
    "100 images, 30 % wrong labels": {"task.train_examples": 100, "task.label_noise": 0.3, "training.batch_size": 8},
}
SPLITS = {"new_domain": "new domain", "new_domain_corrupted": "corrupted", "old_domain": "old domain"}
COMMON = {
    "task.dev_examples": 100,
    "training.epochs": 20,
    "training.evaluate": "end",
    "training.data_workers": 0,
    "training.save_model": "false",
    "training.checkpoint_steps": "null",
    "tracking.tensorboard": "false",
}
Scores = dict[str, dict[str, float]]


def directory_of(root: Path, condition: str, row: str, rate: float, seed: int) -> Path:
    return root / "runs" / f"{list(CONDITIONS).index(condition)}-{ROWS[row][0]}-{rate:g}-{seed}"


def carry_out(root: Path, runs: list[tuple[str, str, float, int]], at_once: int) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import forking

    jobs = []
    for condition, row, rate, seed in runs:
        directory = directory_of(root, condition, row, rate, seed)
        if (directory / "summary.json").exists():
            continue
        flags = COMMON | CONDITIONS[condition] | {"cascade.strategy": ROWS[row][0]}
        flags |= {"training.learning_rate": rate, "training.seed": seed}
        arguments = ["--config", str(RECIPE), "--output_dir", str(directory), "--resume", "never"]
        arguments += [f"--{key}={value}" for key, value in flags.items()]
        directory.parent.mkdir(parents=True, exist_ok=True)
        jobs.append(forking.Job("lorasc_ds.train:main", [arguments, str(RECIPE)], f"{directory}.log", 600))
    for first in range(0, len(jobs), 12):
        for ended in forking.run(*jobs[first : first + 12], at_once=at_once):
            if ended.codes != [0]:
                raise SystemExit(f"a run ended with {ended.codes}: {ended.err[0][-2000:]}")
        print(f"{min(first + 12, len(jobs))}/{len(jobs)} runs", flush=True)


def spread(values: list[float]) -> str:
    """Mean and standard deviation of accuracies over seeds, in per cent."""
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def on_dev(seeds: list[Scores]) -> tuple[float, float]:
    """What a rate is chosen by: mean accuracy, then the lower mean loss."""
    dev = [scores["dev"] for scores in seeds]
    return statistics.mean(one["accuracy"] for one in dev), -statistics.mean(one["loss"] for one in dev)


def table(condition: str, grid: dict[str, dict[float, list[Scores]]], before: Scores) -> list[str]:
    """
    Args:
        grid: row -> learning rate -> the scores of every seed.
    """
    lines = ["| row | rate | dev | " + " | ".join(SPLITS.values()) + " |", "|---|---|---|---|---|---|"]
    untrained = [f"{100 * before[split]['accuracy']:.1f}" for split in ("dev", *SPLITS)]
    lines.append(f"| before | | {' | '.join(untrained)} |")
    for row, by_rate in grid.items():
        rate, chosen = max(by_rate.items(), key=lambda one: on_dev(one[1]))
        cells = [spread([scores[split]["accuracy"] for scores in chosen]) for split in ("dev", *SPLITS)]
        lines.append(f"| {row} | {rate:g} | {' | '.join(cells)} |")
    return [f"{condition}:", "", *lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="from 0 on (default: 3)")
    parser.add_argument("--at_once", type=int, default=1, help="runs at a time, a core each (default: 1)")
    options = parser.parse_args()
    root, seeds = options.directory, range(options.seeds)
    began = time.monotonic()
    carry_out(root, list(product(CONDITIONS, ROWS, RATES, seeds)), options.at_once)

    text: list[str] = []
    whole: dict[str, Any] = {}
    for condition in CONDITIONS:
        grid: dict[str, dict[float, list[Scores]]] = {row: {} for row in ROWS}
        before: Scores = {}
        for row, rate, seed in product(ROWS, RATES, seeds):
            summary = json.loads((directory_of(root, condition, row, rate, seed) / "summary.json").read_text())
            grid[row].setdefault(rate, []).append(summary["eval"])
            before = summary["eval_before"]
        text += table(condition, grid, before)
        whole[condition] = {"before": before, "grid": grid}
    (root / "study.json").write_text(json.dumps(whole, indent=1))
    (root / "study.md").write_text("\n".join(text))
    print("\n".join(text))
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
