"""The signs that a run goes wrong: thresholds from both sides, runs built to fail, the same ones after an interruption."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RECIPE, Command, Start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_early_stopping import summary_of

from lorasc_ds.algorithm.experts import noise_norm
from lorasc_ds.algorithm.ledger import Ledger
from lorasc_ds.algorithm.merge import Edit, edit_
from lorasc_ds.algorithm.noise import Stream
from lorasc_ds.cli import parse_command_line
from lorasc_ds.inspection_rows import inspect
from lorasc_ds.ledger_commands import roll_back
from lorasc_ds.run_directory import flatten
from lorasc_ds.warning_signs import Epoch, Setting, epoch_signs, noise_sign

# Mean training loss of every epoch and the dev loss after it, of the quickstart (seed 0): wrong labels, no overfitting.
QUICKSTART = (
    [
        3.832, 2.929, 2.203, 2.115, 2.067, 1.963, 2.152, 1.924, 1.981, 1.849, 1.897, 1.866, 1.825, 1.689, 1.699,
        1.692, 1.687, 1.688, 1.618, 1.612, 1.587, 1.713, 1.598, 1.521, 1.516, 1.544, 1.647, 1.477, 1.458, 1.399,
        1.383, 1.457, 1.424, 1.4, 1.405, 1.387, 1.315, 1.381, 1.307, 1.318,
    ],
    [
        3.888, 2.353, 2.109, 1.978, 1.854, 1.791, 1.693, 1.584, 1.59, 1.539, 1.493, 1.421, 1.388, 1.365, 1.327,
        1.32, 1.303, 1.278, 1.265, 1.227, 1.205, 1.162, 1.141, 1.097, 1.058, 1.042, 1.03, 1.032, 1.057, 1.039,
        1.019, 0.982, 0.989, 1.077, 1.072, 1.046, 1.053, 1.019, 0.997, 0.984,
    ],
)  # fmt: skip


def setting(*flags: str, epochs: int = 40, examples: int = 100) -> Setting:
    invocation = parse_command_line(["--output_dir=unused", *flags], RECIPE)
    assert not isinstance(invocation, str)
    return Setting(flatten(invocation.config.model_dump(mode="json")), epochs, examples, examples)


def epochs_of(train: list[float], dev: list[float | None]) -> list[Epoch]:
    return [Epoch(25 * n, n, *losses) for n, losses in enumerate(zip(train, dev, strict=True), start=1)]


def names(start: float | None, train: list[float], dev: list[float | None], of: Setting) -> list[str]:
    """Every sign that is there after some epoch, in the order in which they come."""
    epochs = epochs_of(train, dev)
    found = (sign.name for n in range(1, len(epochs) + 1) for sign in epoch_signs(start, epochs[:n], of))
    return list(dict.fromkeys(found))


def test_a_healthy_run_gives_none() -> None:
    assert names(5.647, *QUICKSTART, setting()) == []


@pytest.mark.parametrize(
    ("start", "train", "dev", "expected"),
    [
        (2.0, [1.0, 0.9], [1.2, 1.1], []),
        # The training loss must be below half of the dev loss, and a tenth of the beginning below it.
        (2.0, [1.0, 0.51], [1.2, 1.0], []),
        (2.0, [1.0, 0.49], [1.2, 1.0], ["gap"]),
        (2.0, [1.0, 0.01], [1.2, 0.20], []),
        (2.0, [1.0, 0.01], [1.2, 0.22], ["gap"]),
        # 100 examples: the dev loss must rise by a fifth, and the training loss fall.
        (2.0, [1.0, 0.9], [1.0, 1.19], []),
        (2.0, [1.0, 0.9], [1.0, 1.21], ["rising_dev"]),
        (2.0, [1.0, 0.9, 1.0], [1.0, 1.0, 1.21], []),
        (2.0, [1.9], [2.41], ["rising_dev"]),  # both losses begin at 2
        (2.0, [2.1], [2.41], []),
        # No loss below what it was, by a thousandth of it, since the beginning; or for a quarter of the epochs.
        (2.0, [1.9], [2.0], []),  # too early
        (2.0, [1.9, 1.9], [2.0, 2.0], ["no_progress"]),
        (2.0, [1.9, 1.8985], [2.0, 1.9985], ["no_progress"]),
        (2.0, [1.9, 1.898], [2.0, 2.0], []),
        (2.0, [1.9, 1.9], [2.0, 1.997], []),
        (2.0, [1.5, 1.5], [2.0, 2.0], []),  # below the beginning by more than chance
        (None, [1.9], [None], []),
        (None, [1.9, 1.9], [None, None], ["no_progress"]),
        (None, [1.9, 1.8], [None, None], []),
        (2.0, [1.5] * 10, [1.5] * 10, []),
        (2.0, [1.5] * 11, [1.5] * 11, ["no_progress"]),
        (2.0, [1.5, math.nan], [1.5, 9.0], []),
    ],
)
def test_thresholds(start: float | None, train: list[float], dev: list[float | None], expected: list[str]) -> None:
    assert names(start, train, dev, setting()) == expected


def test_more_examples_show_a_smaller_rise() -> None:
    losses = 2.0, [1.0, 0.9], [1.0, 1.06]
    assert names(*losses, setting(examples=1000)) == []  # 2/√1000 is 6.3 %
    assert names(*losses, setting(examples=1200)) == ["rising_dev"]
    assert names(2.0, [1.0, 0.9], [1.0, 1.04], setting(examples=10**6)) == []


def test_each_names_the_knob_with_its_value_and_direction() -> None:
    def said(*flags: str, train: tuple[float, ...], dev: tuple[float, ...]) -> str:
        (sign,) = epoch_signs(2.0, epochs_of([*train], [*dev]), setting(*flags))
        return sign.message.split(": ", 1)[1]

    noisy, plain = ("--cascade.noise_intensity=0.3",), ("--cascade.strategy=lora", "--adapter.dropout=0.05")
    gap = {"train": (1.0, 0.3), "dev": (1.0, 0.9)}
    raised = "raise --adapter.dropout (now 0) or lower --adapter.rank (now 8)"
    assert said(*noisy, **gap) == f"raise --cascade.noise_intensity (now 0.3), {raised}"
    (drowned,) = epoch_signs(2.0, epochs_of([1.0, 0.3], [1.0, 0.9]), setting(*noisy), drowned=True)
    assert f": raise --cascade.slow_retention (now 0.5), {raised}" in drowned.message
    assert said("--cascade.strategy=slow", **gap) == f"raise --cascade.slow_retention (now 0.5), {raised}"
    assert said(*plain, **gap) == raised.replace("now 0)", "now 0.05)")
    rising = {"train": (1.0, 0.9), "dev": (1.0, 1.3)}
    assert said(**rising) == (
        "lower --training.epochs (now 40), the best was step 25 or lower --training.learning_rate (now 0.01) or set"
        " --training.select best_dev (now last)"
    )
    assert "lower --training.max_steps (now 50)" in said("--training.max_steps=50", **rising)
    stuck = {"train": (1.9, 1.9), "dev": (2.0, 2.0)}
    assert said("--training.learning_rate=1e-9", **stuck) == (
        "raise --training.learning_rate (now 1e-09) or lower --cascade.slow_retention (now 0.5)"
    )
    assert said(train=(3.0, 3.1), dev=(2.5, 2.6)) == "lower --training.learning_rate (now 0.01)"
    assert said(train=(1.5,) * 11, dev=(1.5,) * 11) == "lower --training.epochs (now 40)"
    loud = noise_sign(3.0, 1.5, setting("--cascade.noise_intensity=10"))
    assert loud is not None
    assert loud.message.endswith("lower --cascade.noise_intensity (now 10), below 5")
    chosen = noise_sign(3.0, 1.5, setting("--cascade.noise_intensity=auto"))
    assert chosen is not None
    assert "leave the largest out of --cascade.noise_intensity_candidates (now [0.1, 1.0, 10.0])" in chosen.message
    assert noise_sign(1.5, 1.5, setting()) is None


def test_noise_has_the_norm_that_is_expected_of_it() -> None:
    noise = torch.zeros(300 * 400)
    edit_([Edit(noise, noise, stream=Stream(1, 2, 3, 0), noise_scale=0.7)])
    assert noise_norm(0.7, (300, 400)) == pytest.approx(float(noise.norm()), rel=5e-3)


FAILING: dict[str, dict[str, Any]] = {
    "gap": {"cascade.strategy": "lora", "training.epochs": 4, "task.dev_examples": 60, "task.label_noise": 0},
    "rising_dev": {"cascade.strategy": "lora", "training.epochs": 4, "task.dev_examples": 60, "task.label_noise": 1},
    "no_progress": {"training.learning_rate": 1e-9},
    "noise": {"cascade.noise_intensity": 10},
}


@pytest.mark.parametrize("sign", FAILING)
def test_a_run_built_to_fail_says_why_and_nothing_else(
    sign: str, run: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(**FAILING[sign])
    (told,) = done.summary["warnings"]
    assert told["sign"] == sign
    (record,) = [one for one in done.metrics("warning") if "sign" in one]
    line = f"expert {told['expert']}, step {told['step']}: {told['message']}"
    assert (record["sign"], record["step"], record["message"]) == (sign, told["step"], line)
    assert capsys.readouterr().out.splitlines().count(f"warning   {line}") == 1
    if sign == "noise":  # what is said is what the ledger holds
        rows = inspect(Ledger.load(done.directory / "ledger"), told["expert"])
        own = [of_weight[told["expert"] - 1] for of_weight in rows.values()]
        norms = math.hypot(*(row.noise * row.norm for row in own)), math.hypot(*(row.norm for row in own))
        assert f"has norm {norms[0]:.3g}, more than its update, which has {norms[1]:.3g}:" in told["message"]


def test_what_cannot_be_judged_is_said(run: Start, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(**{"training.evaluate": "end", "training.learning_rate": 1e-9})
    assert [one["sign"] for one in done.summary["warnings"]] == ["no_progress"]  # by the training loss
    assert done.summary["not_judged"].endswith("before the end, since training.evaluate is end")
    assert f"signs     not judged: {done.summary['not_judged']}" in capsys.readouterr().out
    assert run(**{"training.epochs": 1}).summary["not_judged"] is None


MANY = {
    "training.epochs": 5, "training.learning_rate": 3e-2, "cascade.noise_intensity": 10, "task.dev_examples": 40,
    "task.label_noise": 0, "training.checkpoint_steps": 5, "tracking.tensorboard": "true",
}  # fmt: skip


def warned(directory: Path) -> tuple[Any, list[Any]]:
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return summary_of(directory)["warnings"], [one["message"] for one in records if one["event"] == "warning"]


def test_an_interrupted_run_says_the_same(tmp_path: Path, command: Command, stopped: Any) -> None:
    whole = tmp_path / "whole"
    assert command(whole, **MANY)[0] == 0
    told, messages = warned(whole)
    late = next(one for one in told if one["sign"] != "noise")  # judged at the end of an epoch, by its mean loss
    assert late["step"] < 15
    scalars = EventAccumulator(str(whole / "tensorboard")).Reload()
    ratios = [one.value for one in scalars.Scalars("lorasc/close/noise_to_update")]
    noisy = next(index for index, ratio in enumerate(ratios, start=1) if ratio > 1)
    assert [one["expert"] for one in told if one["sign"] == "noise"] == [noisy]
    assert [one.step for one in scalars.Scalars("train/dev_gap")] == [3, 6, 9, 12, 15]
    directory = stopped(late["step"] - 1, **MANY)  # inside that epoch: its losses so far are kept
    assert command(directory, **MANY)[0] == 0
    assert warned(directory) == (told, messages)
    assert roll_back([str(whole), "--expert", str(late["expert"])]) == 0
    assert command(whole, **MANY)[0] == 0
    assert warned(whole) == (told, messages)
