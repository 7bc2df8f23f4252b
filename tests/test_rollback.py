"""Runs that go back to an earlier expert, and ledgers that are made short: both go on to the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, digest_of_run, flip

from lorasc_ds.ledger_commands import compact
from lorasc_ds.ledger_commands import roll_back as rollback
from lorasc_ds.selection import Selection


def test_rolled_back_to_an_expert_the_run_goes_on_to_the_same_bits(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    changed = {"training.epochs": 4, "training.checkpoint_steps": 5}
    assert command(directory, **changed)[0] == 0
    before = digest_of_run(directory)
    assert rollback([str(directory), "--expert=2"]) == 0
    assert "as it was after expert 2, step 6" in capsys.readouterr().out
    assert sorted(path.name for path in (directory / "ledger").glob("*.safetensors")) == ["expert_0001.safetensors", "expert_0002.safetensors"]  # fmt: skip
    kept = sorted(path.name for path in (directory / "ledger" / "discarded" / "001").iterdir())
    assert kept == ["expert_0003.safetensors", "expert_0004.safetensors", "ledger.json"]
    code, said = command(directory, **changed)
    assert code == 0, said
    assert "resuming  after step 6 (merged)" in said
    assert digest_of_run(directory) == before
    events = [json.loads(line)["event"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert (events.count("close"), events.count("eval")) == (4, 5)
    assert rollback([str(directory), "--expert=9"]) == 4
    assert rollback([str(tmp_path), "--expert=1"]) == 2


def test_a_rollback_trusts_nothing_that_is_damaged(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    changed = {"training.epochs": 4, "training.checkpoint_steps": 6}
    assert command(directory, **changed)[0] == 0
    before = digest_of_run(directory)
    ledger = directory / "ledger" / "ledger.json"
    whole = ledger.read_text()
    ledger.write_text(whole.replace('"noise_intensity": 1.0', '"noise_intensity": 2.0'))
    assert rollback([str(directory), "--expert=2"]) == 4
    assert "ledger.json is not what was written (sha256 differs)" in capsys.readouterr().err
    ledger.write_text(whole)
    flip(directory / "checkpoints" / "step_00000006_merged" / "state.json", 100)
    assert rollback([str(directory), "--expert=2"]) == 0  # the ledger has what the damaged checkpoint had
    assert command(directory, **changed)[0] == 0
    assert digest_of_run(directory) == before
    assert rollback([str(directory), "--expert=-1"]) == 2


@pytest.mark.parametrize("changed", [{"adapter.method": "dora"}, {"cascade.strategy": "relora"}])
def test_moments_that_go_on_are_not_made_up_by_a_rollback(
    changed: dict[str, Any], command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a checkpoint at the expert's end they are there; without, the rollback is refused."""
    directory = tmp_path / "run"
    assert command(directory, **changed, **{"training.checkpoint_steps": 3, "training.checkpoints_kept": 9})[0] == 0
    before = json.loads((directory / "summary.json").read_text())["shipped_sha256"]
    assert rollback([str(directory), "--expert=1"]) == 0
    assert command(directory, **changed, **{"training.checkpoint_steps": 3, "training.checkpoints_kept": 1})[0] == 0
    assert json.loads((directory / "summary.json").read_text())["shipped_sha256"] == before
    assert rollback([str(directory), "--expert=1"]) == 2
    assert "only a checkpoint at the end of one has them" in capsys.readouterr().err


def test_a_compacted_ledger_goes_on_to_the_same_bits(
    stopped: Callable[..., Path], command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {"training.epochs": 5, "model.dtype": "bfloat16"}
    assert command(tmp_path / "whole", **changed)[0] == 0
    directory = stopped(13, **changed)
    assert compact([str(directory)]) == 0
    assert "left as they are" in capsys.readouterr().out  # less than 16 GiB
    assert compact([str(directory), "--above=0"]) == 0
    assert "experts 1 to 4 are one snapshot" in capsys.readouterr().out  # what the older of two checkpoints needs
    assert not (directory / "ledger" / "expert_0001.safetensors").exists()
    code, said = command(directory, **changed)
    assert code == 0, said
    assert digest_of_run(directory) == digest_of_run(tmp_path / "whole")
    assert rollback([str(directory), "--expert=2"]) == 4
    assert "experts 1 to 4 were compacted into one snapshot" in capsys.readouterr().err


def test_compacting_leaves_what_best_dev_would_ship(
    stopped: Callable[..., Path],
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The best weights are some inside expert 5, so the first four are compacted, though a checkpoint needs five."""
    consider = Selection.consider

    def step_9(self: Selection, step: int, *rest: Any) -> None:
        if step == 9:
            consider(self, step, *rest)

    monkeypatch.setattr(Selection, "consider", step_9)
    changed = {"training.epochs": 4, "training.select": "best_dev", "cascade.experts": 6}
    assert command(tmp_path / "whole", **changed)[0] == 0
    directory = stopped(11, **changed)
    assert compact([str(directory), "--above=0"]) == 0
    assert "experts 1 to 4 are one snapshot" in capsys.readouterr().out
    assert command(directory, **changed)[0] == 0
    shipped = [json.loads((d / "summary.json").read_text())["shipped"] for d in (tmp_path / "whole", directory)]
    assert shipped[0] == shipped[1]
    assert shipped[0]["step"] == 9
    assert shipped[0]["weights_sha256"] != digest_of_run(directory)
