"""When a run ends: after so many steps (`max_steps`), or because the dev loss falls no more; each exact on resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import RECIPE, Command, Start, digest_of_run

from lorasc_ds import loop
from lorasc_ds.cli import build_config, parse_command_line
from lorasc_ds.errors import ConfigError
from lorasc_ds.export import main as export
from lorasc_ds.ledger_commands import inspect
from lorasc_ds.ledger_commands import roll_back as rollback
from lorasc_ds.preparation import prepare
from lorasc_ds.selection import Patience

# Three steps an epoch; the dev loss is lowest after the third epoch and then rises.
OVERFITS = {"training.epochs": 8, "training.early_stopping_patience": 2, "training.checkpoint_steps": 50}
INSIDE = OVERFITS | {"cascade.restart_interval": 5, "training.schedule": "constant"}


def summary_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())


def events(directory: Path, *kinds: str) -> list[tuple[str, int]]:
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [(record["event"], record["step"]) for record in records if record["event"] in kinds]


@pytest.mark.parametrize(
    ("losses", "over"),
    [
        ([3, 2, 1], False),
        ([3, 2, 2.5], False),
        ([3, 2, 2.5, 2], True),  # as low is not lower
        ([3, 2, 2.5, 1.9, 4], False),
        ([1, 2, 3], True),
        ([float("nan"), 5, float("nan"), float("inf")], True),
        ([], False),
    ],
)
def test_patience_counts_the_evaluations_since_the_lowest(losses: list[float], over: bool) -> None:
    patience = Patience(2)
    for step, loss in enumerate(losses, start=1):
        for _ in range(2):  # one that is measured again counts once
            patience.consider(step, {"dev": {"loss": loss}})
    assert patience.over == over
    again = Patience(2)
    again.resume(json.loads(json.dumps(patience.state())))
    assert again.over == over
    assert not Patience(None).over


def test_a_run_that_ends_early_is_the_shorter_run(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    early = tmp_path / "early"
    code, said = command(early, **OVERFITS)
    assert code == 0, said
    assert "stopping  after 2 epochs without a new lowest dev loss" in said
    assert "stopped   after step 15 of 24: no dev loss below 2.214, that of step 9, in 2 epochs" in said
    summary = summary_of(early)
    assert (summary["stopped_early"], summary["steps"], summary["experts"]) == (15, 15, 5)
    assert summary["shipped"]["step"] == 15
    assert events(early, "close", "eval", "stopped_early") == [
        ("eval", 0), *((event, 3 * epoch) for epoch in range(1, 6) for event in ("close", "eval")), ("stopped_early", 15)
    ]  # fmt: skip
    shorter = tmp_path / "shorter"
    assert command(shorter, **OVERFITS | {"training.epochs": 5})[0] == 0
    assert summary_of(shorter)["stopped_early"] is None
    assert digest_of_run(shorter) == digest_of_run(early)
    assert summary_of(shorter)["eval"] == summary["eval"]
    code, said = command(early, **OVERFITS)
    assert (code, "is finished; its summary" in said) == (0, True)
    assert export([str(early), f"--output_dir={tmp_path / 'exported'}"]) == 0
    assert inspect([str(early)]) == 0
    assert "5 experts" in capsys.readouterr().out
    assert rollback([str(early), "--expert=2"]) == 0
    code, said = command(early, **OVERFITS)
    assert code == 0, said
    assert summary_of(early) | {"timing": 0} == summary | {"timing": 0}

    patient = OVERFITS | {"training.early_stopping_patience": 4}
    code, said = command(early, **patient)
    assert code == 2
    assert "add --resume_override training.early_stopping_patience" in said
    code, said = command(early, "--resume_override=training.early_stopping_patience", **patient)
    assert code == 0, said
    whole = tmp_path / "whole"
    assert command(whole, **patient)[0] == 0
    assert summary_of(early) | {"timing": 0} == summary_of(whole) | {"timing": 0}
    assert summary_of(whole)["stopped_early"] == 21


def test_the_best_ships(command: Command, tmp_path: Path) -> None:
    early, best = tmp_path / "early", tmp_path / "best"
    assert command(early, **OVERFITS | {"training.select": "best_dev"})[0] == 0
    assert command(best, **{"training.epochs": 3})[0] == 0
    shipped = summary_of(early)["shipped"]
    assert shipped == {"select": "best_dev", "step": 9, "weights_sha256": digest_of_run(best)}


def test_inside_an_expert_it_closes_there(
    command: Command, stopped: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five steps an expert, three an epoch. It ends as a run would that was to end there."""
    early, shorter = tmp_path / "early", tmp_path / "shorter"
    code, said = command(early, **INSIDE)
    assert code == 0, said
    summary = summary_of(early)
    step = summary["stopped_early"]
    assert step in (9, 12, 18)
    assert summary["experts"] == step // 5 + 1
    assert command(shorter, **INSIDE | {"training.max_steps": step, "training.early_stopping_patience": "null"})[0] == 0
    assert digest_of_run(shorter) == digest_of_run(early)
    assert summary_of(shorter)["eval"] == summary["eval"]
    ledger = json.loads((early / "ledger" / "ledger.json").read_text())
    assert [record["steps"] for record in ledger["experts"]][-1] == [step // 5 * 5, step]

    interrupted = stopped(step - 1, **INSIDE)
    assert command(interrupted, **INSIDE)[0] == 0

    killed = tmp_path / "killed"
    with monkeypatch.context() as patch:  # after the expert was closed there, before anything else was written

        def fail(*_: object) -> None:
            raise OSError("the test")

        patch.setattr(loop, "ship", fail)
        assert command(killed, **INSIDE)[0] == 1
    code, said = command(killed, **INSIDE)
    assert code == 0, said
    for directory in (interrupted, killed):
        assert summary_of(directory) | {"timing": 0} == summary | {"timing": 0}
        assert events(directory, "step", "eval", "stopped_early") == events(early, "step", "eval", "stopped_early")
        assert (directory / "ledger" / "ledger.json").read_bytes() == (early / "ledger" / "ledger.json").read_bytes()


def test_one_expert_ends_early_too(command: Command, tmp_path: Path) -> None:
    directory = tmp_path / "lora"
    assert command(directory, **OVERFITS | {"cascade.strategy": "lora", "training.learning_rate": 0.02})[0] == 0
    summary = summary_of(directory)
    assert summary["stopped_early"] < 24
    assert summary["experts"] == 1


def test_early_stopping_needs_the_epochs_scores() -> None:
    with pytest.raises(
        ConfigError, match=r"early_stopping_patience 2 needs every epoch's dev loss, but training.evalua"
    ):
        build_config({"training": {"early_stopping_patience": 2, "evaluate": "end"}}, {}, {})


def test_max_steps_is_the_run_of_so_many_epochs(run: Start) -> None:
    steps = run(**{"training.max_steps": 4})
    epochs = run(**{"training.epochs": 4 / 3})
    assert (steps.summary["steps"], steps.summary["experts"], len(steps.closed)) == (4, 2, 2)
    assert steps.summary["weights_sha256"] == epochs.summary["weights_sha256"]
    assert [record["step"] for record in steps.metrics("eval")] == [0, 2, 3, 4]


def test_max_steps_wins_and_says_so() -> None:
    def derived(*arguments: str) -> str:
        invocation = parse_command_line(["--training.max_steps=7", *arguments], RECIPE)
        assert not isinstance(invocation, str)
        return "\n".join(prepare(invocation.config).derived_numbers())

    told = derived("--training.epochs=3")
    assert "steps     7 = 0.28 epochs x 25 (training.max_steps; epochs 3 is not used); 1 expert" in told


def test_more_steps_than_were_asked_for_at_first(command: Command, tmp_path: Path) -> None:
    longer, directory = tmp_path / "longer", tmp_path / "run"
    assert command(longer, **{"training.max_steps": 9})[0] == 0
    assert command(directory, **{"training.max_steps": 6})[0] == 0
    code, said = command(directory, **{"training.max_steps": 9})
    assert code == 2
    assert "training.max_steps 6 -> 9: " in said
    code, said = command(directory, "--resume_override=training.max_steps", **{"training.max_steps": 9})
    assert code == 0, said
    assert digest_of_run(directory) == digest_of_run(longer)
