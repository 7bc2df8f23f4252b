"""Trackers beside TensorBoard: what they are given, how they end, how a run goes on in them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from conftest import RESUMED, Command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lorasc_ds import train
from lorasc_ds.backends import check_installed
from lorasc_ds.errors import ConfigError

Recorded = list[SimpleNamespace]
FLAGS = {"tracking.backends": "wandb", "tracking.tensorboard": "true", "tracking.log_steps": 1}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Takes wandb's place in Accelerate; what every tracker's run was given, in the order of their starts."""
    runs: Recorded = []

    class Recorder(GeneralTracker):
        name = "wandb"
        requires_logging_directory = False

        def __init__(self, run_name: str, **options: Any) -> None:
            super().__init__(_blank=True)
            self.run = SimpleNamespace(
                project=run_name, options=options, id=options["id"], settings=None, logged=[], exit_code=None,
                finish=self.finish,
            )  # fmt: skip

        @property
        def tracker(self) -> SimpleNamespace:
            return self.run

        def start(self) -> None:
            runs.append(self.run)

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            self.run.settings = values

        def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
            self.run.logged += [(key, step, value) for key, value in values.items()]

        def finish(self, exit_code: int = 0) -> None:
            self.run.exit_code = exit_code

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    monkeypatch.setattr(train, "check_installed", lambda names: None)
    return runs


def scalars_of(directory: Path) -> dict[tuple[str, int], float]:
    events = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {(tag, one.step): one.value for tag in events.Tags()["scalars"] for one in events.Scalars(tag)}


def test_a_tracker_gets_what_tensorboard_gets(tmp_path: Path, command: Command, recorded: Recorded) -> None:
    assert command(tmp_path / "mine", **FLAGS, **{"tracking.project": "digits"})[0] == 0
    (run,) = recorded
    assert (run.project, run.options["name"], run.exit_code) == ("digits", "mine", 0)
    assert run.settings["training.epochs"] == RESUMED["training.epochs"]
    assert run.settings["adapter.target_modules"] == "['q_proj', 'v_proj']"
    given = {(tag, step): value for tag, step, value in run.logged}
    assert len(given) == len(run.logged)  # nothing twice
    assert given == pytest.approx(scalars_of(tmp_path / "mine"), rel=1e-6)
    assert {"train/loss", "eval/digits/dev/loss", "lorasc/close/norm"} < {tag for tag, _ in given}


def test_a_run_goes_on_in_the_tracker_run_it_began(
    command: Command, stopped: Callable[..., Path], recorded: Recorded
) -> None:
    directory = stopped(4, **FLAGS)
    assert command(directory, **FLAGS)[0] == 0
    first, second = recorded
    assert first.id == second.id
    assert (first.options["resume"], first.exit_code, second.exit_code) == ("allow", 75, 0)
    assert second.settings is None  # it has them
    both = [(tag, step) for run in recorded for tag, step, _ in run.logged]
    assert sorted(both) == sorted(scalars_of(directory))
    assert len(set(both)) == len(both)


def test_a_run_that_begins_from_another_begins_its_own_in_the_tracker(
    command: Command, stopped: Callable[..., Path], recorded: Recorded
) -> None:
    directory = stopped(4, **FLAGS)
    (checkpoint,) = (directory / "checkpoints").glob("*4_training")
    assert command(directory.parent / "other", f"--resume={checkpoint}", **FLAGS)[0] == 0
    first, second = recorded
    assert (first.id == second.id, second.options["name"]) == (False, "other")
    assert second.settings == first.settings


def test_a_tracker_that_fails_ends_no_run(
    tmp_path: Path, command: Command, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = LOGGER_TYPE_TO_CLASS["wandb"].log

    def failing(self: Any, values: dict[str, Any], step: int | None = None) -> None:
        if step == 3:
            raise ConnectionError("no route\nto host")
        log(self, values, step)

    monkeypatch.setattr(LOGGER_TYPE_TO_CLASS["wandb"], "log", failing)
    code, said = command(tmp_path / "run", **FLAGS)
    assert code == 0
    lines = [line for line in said.splitlines() if "tracking.backends" in line]
    assert lines == ["warning   tracking.backends wandb: ConnectionError: no route to host; it gets nothing more of this run"]  # fmt: skip
    assert max(step for _, step, _ in recorded[0].logged) == 2
    assert max(step for _, step in scalars_of(tmp_path / "run")) == 6


def test_one_that_does_not_start_is_an_error(
    tmp_path: Path, command: Command, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Any) -> None:
        raise PermissionError("no key")

    monkeypatch.setattr(LOGGER_TYPE_TO_CLASS["wandb"], "start", failing)
    code, said = command(tmp_path / "run", **FLAGS)
    assert code == 2
    assert said.splitlines()[-1].startswith("error: tracking.backends wandb: PermissionError: no key; set it up")
    monkeypatch.undo()
    assert command(tmp_path / "run")[0] == 0  # begins anew


def test_what_is_not_installed_is_named_before_anything_is_loaded(tmp_path: Path, command: Command) -> None:
    missing = [name for name in ("comet_ml", "aim", "clearml") if not find_spec(name)]
    for name in missing:
        package = name.replace("_", "-")
        with pytest.raises(ConfigError, match=f"tracking.backends {name} is not installed: pip install {package}"):
            check_installed([name])
        code, said = command(tmp_path / "run", **{"tracking.backends": name})
        assert (code, len(said.splitlines())) == (2, 1)
        assert not (tmp_path / "run").exists()
    code, said = command(tmp_path / "run", **{"tracking.backends": "wndb"})
    assert code == 2
    assert "tracking.backends" in said


def test_it_may_change_in_between(command: Command, stopped: Callable[..., Path], recorded: Recorded) -> None:
    directory = stopped(4)
    assert command(directory, **FLAGS)[0] == 0
    (run,) = recorded
    assert run.settings is not None  # a new run in the tracker, from here on
    assert min(step for _, step, _ in run.logged) >= 4
    assert json.loads((directory / "status.json").read_text())["state"] == "done"


NOT_INSTALLED = "not installed; .ci/long installs it"


@pytest.mark.filterwarnings("default")  # its own
def test_mlflow_itself_has_what_tensorboard_has(
    tmp_path: Path, command: Command, stopped: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run of it, over an interruption, that ends as finished; and one that failed ends as failed."""
    mlflow = pytest.importorskip("mlflow", reason=f"mlflow is {NOT_INSTALLED}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    flags = FLAGS | {"tracking.backends": "mlflow", "tracking.project": "digits"}
    directory = stopped(4, **flags)
    assert command(directory, **flags)[0] == 0
    client = mlflow.MlflowClient()
    project = client.get_experiment_by_name("digits")
    assert project is not None
    (run,) = client.search_runs([project.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["cascade.strategy"] == "lorasc"
    told = {
        (key, one.step): one.value
        for key in run.data.metrics
        for one in client.get_metric_history(run.info.run_id, key)
    }
    assert told == pytest.approx(scalars_of(directory), rel=1e-6)
    assert command(tmp_path / "failing", **flags, **{"cascade.max_boundary_drift": 1e-12})[0] == 3
    states = {one.info.run_name: one.info.status for one in client.search_runs([project.experiment_id])}
    assert states == {"run": "FINISHED", "failing": "FAILED"}


def leveldb_log(data: bytes, start: int) -> Iterator[bytes]:
    """The records of a log as LevelDB writes it, in blocks of 32 KiB, with parts under a head of checksum, size, kind."""
    whole = b""
    while start + 7 <= len(data):
        if (left := -start % 32768) and left < 7:
            start += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, start)
        whole += data[start + 7 : start + 7 + size]
        start += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield whole
            whole = b""


@pytest.mark.filterwarnings("default")  # its own
def test_wandb_itself_has_what_tensorboard_has(
    command: Command, stopped: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline: what it would send, of both parts of an interrupted run, under one id."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason=f"wandb is {NOT_INSTALLED}")
    monkeypatch.setenv("WANDB_MODE", "offline")
    directory = stopped(4, **FLAGS)
    assert command(directory, **FLAGS)[0] == 0
    told: dict[tuple[str, int], float] = {}
    files = sorted((directory / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1, "they are called by the run's id"
    for file in files:
        for data in leveldb_log(file.read_bytes(), start=7):
            record = messages.Record.FromString(data)
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            told |= {(key, items["_step"]): value for key, value in items.items() if not key.startswith("_")}
    assert told == pytest.approx(scalars_of(directory), rel=1e-6)
