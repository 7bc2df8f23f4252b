"""What a run may go on from: settings, data and files that changed in between, damage, other layouts of the batch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RECIPE, RESUMED, Command, digest_of_run, flip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorasc_ds import resuming
from lorasc_ds.algorithm.plan import Plan
from lorasc_ds.checkpoint import Checkpoints
from lorasc_ds.cli import parse_command_line
from lorasc_ds.contract import check_contract, completed
from lorasc_ds.errors import CheckpointError, ConfigError
from lorasc_ds.train import main


@pytest.mark.parametrize(
    "changed",
    [
        {"adapter.method": "dora", "adapter.dropout": 0.1},
        {"adapter.method": "lora+"},
        {"adapter.method": "lora-fa"},
        {"cascade.strategy": "relora"},
        {"cascade.strategy": "noisytune", "cascade.noise_on": "all"},
        {"model.dtype": "bfloat16", "training.select": "best_dev", "adapter.method": "dora"},
        {"cascade.slow_retention": "auto", "cascade.noise_intensity": "auto"},
    ],
    ids=lambda changed: " ".join(map(str, changed.values())),
)
def test_every_method_goes_on_to_the_same_bits(
    changed: dict[str, Any], stopped: Callable[..., Path], command: Command, tmp_path: Path
) -> None:
    """Stopped inside the second expert; what is trained on across experts (magnitudes, pruned moments) is kept too."""
    assert command(tmp_path / "whole", **changed)[0] == 0
    directory = stopped(4, **changed)
    code, said = command(directory, **changed)
    assert code == 0, said
    assert "resume    resuming  after step 4 (training)" in said
    first, second = (json.loads((d / "summary.json").read_text()) for d in (tmp_path / "whole", directory))
    assert first | {"timing": 0, "auto": 0} == second | {"timing": 0, "auto": 0}
    assert first["shipped_sha256"] == second["shipped_sha256"]


def test_moments_and_counts_go_on_and_without_them_the_bits_differ(
    stopped: Callable[..., Path], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(tmp_path / "whole")[0] == 0
    for number, method in enumerate(("write_moments", "write_step_counts")):
        directory = stopped(5, f"run{number}")
        with monkeypatch.context() as patch:
            patch.setattr(f"lorasc_ds.sharding.replicated.ReplicatedBackend.{method}", lambda *_: None)
            assert command(directory)[0] == 0
        assert digest_of_run(directory) != digest_of_run(tmp_path / "whole"), method


@pytest.mark.parametrize(
    ("changed", "code", "said"),
    [
        ({"adapter.rank": 4}, 2, "adapter.rank 8 -> 4: the run was begun otherwise, and that cannot change"),
        ({"adapter.target_modules": "q_proj"}, 2, "adapter.target_modules ['q_proj', 'v_proj'] -> ['q_proj']: "),
        ({"cascade.slow_retention": 0.9}, 2, "cascade.slow_retention 0.5 -> 0.9: "),
        ({"cascade.noise_intensity": 2}, 2, "cascade.noise_intensity 1.0 -> 2.0: "),
        ({"model.dtype": "bfloat16"}, 2, "model.dtype float32 -> bfloat16: "),
        ({"task.domain": "rotated"}, 2, "task.domain mirrored -> rotated: "),
        ({"training.seed": 1}, 2, "training.seed 0 -> 1: "),
        ({"training.batch_size": 2}, 2, "training.batch_size 4 -> 2: "),
        ({"training.learning_rate": 0.02}, 2, "training.learning_rate 0.01 -> 0.02: the run was begun otherwise; to apply it from the checkpoint on add --resume_override training.learning_rate"),
        ({"training.epochs": 3}, 2, "training.epochs 2.0 -> 3.0: "),
        ({"training.micro_batch_size": 2, "training.eval_batch_size": 3}, 0, "changed: training.micro_batch_size None -> 2"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_settings_that_changed(
    changed: dict[str, Any], code: int, said: str, stopped: Callable[..., Path], command: Command
) -> None:
    directory = stopped()
    before = sorted((p, p.stat().st_mtime_ns) for p in directory.rglob("*") if p.is_file() and p.name != ".owner")
    found, printed = command(directory, **changed)
    assert found == code
    assert said in printed
    if code:
        assert printed.splitlines()[-1].startswith("error: ")
        after = sorted((p, p.stat().st_mtime_ns) for p in directory.rglob("*") if p.is_file() and p.name != ".owner")
        assert after == before, "a refusal changes nothing"


def test_an_override_is_really_applied(stopped: Callable[..., Path], command: Command, tmp_path: Path) -> None:
    directory = stopped(4)
    assert command(directory, "--resume_override=training.learning_rate", **{"training.learning_rate": 0.02})[0] == 0
    rates = {
        record["step"]: record["lr"]
        for record in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
        if record["event"] == "step"
    }
    assert rates == {3: pytest.approx(0.01 / 3), 6: pytest.approx(0.02 / 3)}
    assert command(tmp_path / "whole")[0] == 0
    assert digest_of_run(directory) != digest_of_run(tmp_path / "whole")
    code, said = command(directory, "--resume_override=adapter.rank")
    assert code == 2
    assert "only cascade.rewarmup_steps, task.train_file, training.early_stopping_patience" in said


def test_what_was_later_than_the_checkpoint_is_gone(
    stopped: Callable[..., Path], command: Command, tmp_path: Path
) -> None:
    """A run goes on from an older checkpoint with another rate, and is stopped where there was a newer one before."""
    changed = {"training.learning_rate": 0.02}
    override = "--resume_override=training.learning_rate"
    directory = stopped(5)
    oldest = directory / "checkpoints" / Checkpoints(directory / "checkpoints", 2).names()[0]
    shutil.copytree(directory, tmp_path / "copy")
    assert (
        command(tmp_path / "copy", f"--resume={tmp_path / 'copy' / 'checkpoints' / oldest.name}", override, **changed)[
            0
        ]
        == 0
    )
    stopped(5, "run", f"--resume={oldest}", override, **changed)
    assert command(directory, override, **changed)[0] == 0
    assert digest_of_run(directory) == digest_of_run(tmp_path / "copy")


def test_a_finished_run_goes_on_for_more_epochs_and_is_the_longer_run(command: Command, tmp_path: Path) -> None:
    assert command(tmp_path / "longer", **{"training.epochs": 3})[0] == 0
    assert command(tmp_path / "run")[0] == 0
    code, said = command(tmp_path / "run", "--resume_override=training.epochs", **{"training.epochs": 3})
    assert code == 0, said
    assert "changed: training.epochs 2.0 -> 3.0" in said
    assert digest_of_run(tmp_path / "run") == digest_of_run(tmp_path / "longer")
    saved = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "longer")]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[1])
    code, said = command(tmp_path / "run", "--resume_override=training.epochs", **{"training.epochs": 2.5})
    assert code == 2
    assert "take so many epochs that no expert that has begun ends elsewhere" in said


def test_changed_data_and_another_base_are_refused(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (shared_data / "gsm8k" / "train.jsonl").read_text().splitlines()[:40]
    data, model = tmp_path / "rows.jsonl", tmp_path / "model"
    data.write_text("\n".join(rows))
    shutil.copytree(shared_data / "models" / "stories260K", model)
    arguments = [
        f"--output_dir={tmp_path / 'out'}", "--task.name=text", f"--task.train_file={data}", "--task.text_field=question",
        "--task.block_size=64", f"--model.name_or_path={model}", "--training.epochs=1", "--training.checkpoint_steps=2",
        "--tracking.tensorboard=false",
    ]  # fmt: skip
    assert main(arguments, RECIPE) == 0
    (tmp_path / "out" / "status.json").write_text("{}")  # as if it had not finished
    data.write_text("\n".join([rows[1], rows[0], *rows[2:]]))
    assert main(arguments, RECIPE) == 2
    assert (
        "error: task: the examples are not those that the run began with (sha256 of train " in capsys.readouterr().err
    )
    data.write_text("\n".join(rows))
    weights = load_file(model / "model.safetensors")
    for part, key in (("q_proj", "the adapted weights have sha256 "), ("down_proj", "its weights have checksum ")):
        name = next(name for name in weights if part in name)
        save_file(weights | {name: weights[name] * 1.5}, model / "model.safetensors", {"format": "pt"})
        assert main(arguments, RECIPE) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: model.name_or_path {model}: {key}")
        assert ", but the run began with " in error
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert main(arguments, RECIPE) == 0


def test_must_never_and_path(stopped: Callable[..., Path], command: Command, tmp_path: Path) -> None:
    code, said = command(tmp_path / "none", "--resume=must")
    assert (code, "holds no run to go on with" in said) == (4, True)
    directory = stopped(5)
    assert command(directory, "--resume=never")[0] == 2
    checkpoints = Checkpoints(directory / "checkpoints", 2)
    oldest = directory / "checkpoints" / checkpoints.names()[0]
    assert command(tmp_path / "whole")[0] == 0
    code, said = command(tmp_path / "whole", f"--resume={oldest}")
    assert (code, "is a checkpoint of another run" in said) == (2, True)
    assert command(directory, f"--resume={oldest}")[0] == 0
    assert digest_of_run(directory) == digest_of_run(tmp_path / "whole")
    code, said = command(tmp_path / "other", f"--resume={tmp_path}")
    assert (code, "manifest.json is missing" in said) == (4, True)


def test_a_fork_goes_on_from_another_run_s_checkpoint_however_often_it_is_stopped(
    stopped: Callable[..., Path], command: Command, tmp_path: Path
) -> None:
    source = stopped(4)
    checkpoint = source / "checkpoints" / Checkpoints(source / "checkpoints", 2).names()[-1]
    changed = {"training.learning_rate": 0.02}
    flags = (f"--resume={checkpoint}", "--resume_override=training.learning_rate")
    assert command(tmp_path / "whole", *flags, **changed)[0] == 0
    fork = stopped(5, "fork", *flags, **changed)
    shutil.rmtree(fork / "checkpoints" / "step_00000005_training")  # as if it had been killed before
    code, said = command(fork, *flags, **changed)
    assert code == 0, said
    assert digest_of_run(fork) == digest_of_run(tmp_path / "whole")
    assert command(source)[0] == 0
    assert digest_of_run(fork) != digest_of_run(source)
    code, said = command(fork, *flags, **changed)
    assert (code, "is finished; its summary" in said) == (0, True)
    shutil.rmtree(fork / "checkpoints")
    (fork / "config.yaml").unlink()
    (fork / "status.json").unlink()
    code, said = command(fork, "--resume_override=training.learning_rate", **changed)
    assert (code, f"was cut short: give --resume {checkpoint} again" in said) == (4, True)
    assert command(fork, *flags, **changed)[0] == 0
    assert digest_of_run(fork) == digest_of_run(tmp_path / "whole")


def test_a_run_without_a_checkpoint_begins_anew_and_says_so(
    stopped: Callable[..., Path], command: Command, tmp_path: Path
) -> None:
    directory = stopped()
    shutil.rmtree(directory / "checkpoints")
    code, said = command(directory, "--resume=must")
    assert (code, "holds no checkpoint" in said) == (4, True)
    code, said = command(directory)
    assert code == 0
    assert "holds a run that ended before its first checkpoint: it begins anew" in said
    assert command(tmp_path / "whole")[0] == 0
    assert digest_of_run(directory) == digest_of_run(tmp_path / "whole")
    events = [json.loads(line)["event"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert events.count("eval") == 3


def test_a_damaged_checkpoint_is_passed_over_by_name(
    stopped: Callable[..., Path], command: Command, tmp_path: Path
) -> None:
    directory = stopped(5)
    newest = directory / "checkpoints" / Checkpoints(directory / "checkpoints", 2).names()[-1]
    flip(newest / "tensors.safetensors", 300)
    code, said = command(directory)
    assert code == 0
    assert f"checkpoint {newest.name} is not used: {newest / 'tensors.safetensors'} is not what was written" in said
    assert "resuming  after step 4" in said
    assert command(tmp_path / "whole")[0] == 0
    assert digest_of_run(directory) == digest_of_run(tmp_path / "whole")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, and one that looks unfinished."""
    folder = tmp_path_factory.mktemp("kept")
    overrides = [f"--{key}={value}" for key, value in RESUMED.items()]
    assert main([f"--output_dir={folder / 'run'}", *overrides, "--training.save_model=false"], RECIPE) == 0
    (folder / "run" / "status.json").write_text(json.dumps({"state": "running"}))
    return folder


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_truncated_or_flipped_file_is_ever_gone_on_from(kept: Path, data: st.DataObject) -> None:
    """Any one file of the run directory: an older checkpoint is taken, or the run ends with code 4 and a name."""
    copy = kept / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(kept / "run", copy)
    files = sorted(path for path in copy.rglob("*") if path.is_file() and path.stat().st_size)
    file = data.draw(st.sampled_from(files))
    size = file.stat().st_size
    if data.draw(st.booleans()):
        os.truncate(file, data.draw(st.integers(0, size - 1)))
    else:
        flip(file, data.draw(st.integers(0, size - 1)))
    overrides = [f"--{key}={value}" for key, value in RESUMED.items()]
    invocation = parse_command_line([f"--output_dir={copy}", *overrides, "--training.save_model=false"], RECIPE)
    assert not isinstance(invocation, str)
    original = Checkpoints(kept / "run" / "checkpoints", 2)
    try:
        chosen, lines = resuming.find(copy, invocation.config, "auto", (), data_of(kept), Plan(6, 2))
    except CheckpointError as error:
        chosen, lines = None, [str(error)]
    if chosen is None:
        assert str(file.parent) in lines[0]
        return
    for name in ("state.json", "tensors.safetensors"):
        expected = (original.directory / chosen.path.name / name).read_bytes()
        assert (chosen.path / name).read_bytes() == expected
    assert [line.split()[1] for line in lines] == [
        name for name in reversed(original.names()) if name > chosen.path.name
    ]
    for record in json.loads((copy / "ledger" / "ledger.json").read_text())["experts"]:
        index = record["index"]
        if index <= chosen.state["ledger"]["experts"]:
            assert (copy / "ledger" / record["file"]).read_bytes() == (
                kept / "run" / "ledger" / record["file"]
            ).read_bytes()


def data_of(kept: Path) -> dict[str, str]:
    newest, _ = Checkpoints(kept / "run" / "checkpoints", 2).newest(lambda checkpoint: None)
    assert newest is not None
    return newest.state["data_sha256"]


def test_refused_means_untouched(command: Command, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert command(directory)[0] == 0
    files = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".owner"}
    oldest = directory / "checkpoints" / Checkpoints(directory / "checkpoints", 2).names()[0]
    code, said = command(directory, f"--resume={oldest}", "--resume_override=training.epochs", **{"training.epochs": 1})
    assert (code, "no expert that has begun ends elsewhere" in said) == (2, True)
    after = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".owner"}
    assert after == files


def test_what_cannot_go_on_is_not_wiped(command: Command, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert command(directory, **{"training.checkpoint_steps": "null"})[0] == 0
    (directory / "status.json").unlink()
    code, said = command(directory, **{"training.checkpoint_steps": "null"})
    assert (code, "holds all 2 experts of the run but no checkpoint" in said) == (4, True)
    assert json.loads((directory / "status.json").read_text())["exit_code"] == 4
    (directory / "ledger" / "expert_0002.safetensors").unlink()
    ledger = json.loads((directory / "ledger" / "ledger.json").read_text())
    ledger["experts"].pop()
    (directory / "ledger" / "ledger.json").write_text(json.dumps(ledger))
    assert command(directory, **{"training.checkpoint_steps": "null"})[0] == 0
    assert (directory / "discarded" / "ledger-001" / "expert_0001.safetensors").exists()


def test_a_planted_pickle_is_never_executed(stopped: Callable[..., Path], command: Command, tmp_path: Path) -> None:
    import pickle

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    directory = stopped(5)
    payload = pickle.dumps(Payload())
    for folder in (directory, directory / "ledger", *(directory / "checkpoints").iterdir()):
        for name in ("optimizer.pt", "random_states_0.pkl", "pytorch_model.bin", "custom_checkpoint_0.pkl"):
            (folder / name).write_bytes(payload)
    newest = sorted((directory / "checkpoints").iterdir())[-1]
    (newest / "tensors.safetensors").write_bytes(payload)
    (newest / "state.json").write_bytes(payload)
    assert command(directory)[0] == 0
    assert not (tmp_path / "executed").exists()
    pickle.loads(payload)
    assert (tmp_path / "executed").exists()  # it would have been seen


def test_a_setting_that_came_with_a_later_version_had_its_default() -> None:
    now = {"task.name": "text", "training.packing": False, "training.group_by_length": False, "task.streaming": False}
    now |= completed(now)
    before = {key: value for key, value in now.items() if not key.endswith(("group_by_length", "streaming"))}
    assert check_contract(before, now, (), "") == []
    for key in ("training.group_by_length", "task.streaming"):
        with pytest.raises(ConfigError, match=f"{key} False -> True: the run was begun otherwise"):
            check_contract(before, now | {key: True}, (), "")
