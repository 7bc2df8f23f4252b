"""What the host waits for between two steps: nothing. And what a trace of the steps holds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RECIPE, digest_of_run
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lorasc_ds import trainer as trainer_module
from lorasc_ds.cli import parse_command_line
from lorasc_ds.in_flight import BEHIND, InFlight, StepInFlight
from lorasc_ds.prefetching import Ahead
from lorasc_ds.sharding import Processes
from lorasc_ds.train import main
from lorasc_ds.trainer import Trainer

SMALL = ["--training.epochs=4", "--cascade.experts=2", "--training.evaluate=end", "--task.train_examples=12", "--task.dev_examples=6", "--task.test_examples=2", "--tracking.tensorboard=false", "--tracking.log_steps=3"]  # fmt: skip


WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)


class Waits(TorchDispatchMode):
    """Counts the operations that bring a number to the host, for which a GPU would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in WAITING
        return func(*args, **kwargs or {})


def unwatched(function: Any) -> Any:
    def called(*arguments: Any) -> Any:
        with _disable_current_modes():
            return function(*arguments)

    return called


def as_on_a_gpu(device: torch.device) -> bool:
    return True


def records(directory: Path, *events: str) -> list[dict[str, Any]]:
    """Without what the clock says."""
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in one.items() if "second" not in k} for one in found if one["event"] in events]


def test_a_step_waits_for_no_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor does its record. Not watched: the making of a batch, which is the host's, and a model's own forward pass."""
    waits, reads = Waits(), []
    training_step, add = Trainer.training_step, InFlight.add

    def watched(self: Trainer, step: int, learning_rate: float) -> StepInFlight:
        with waits:
            return training_step(self, step, learning_rate)

    def added(self: InFlight, step: StepInFlight) -> None:
        with waits:
            add(self, step)
        reads.append(len(self.steps))

    monkeypatch.setattr(Trainer, "training_step", watched)
    monkeypatch.setattr(InFlight, "add", added)
    monkeypatch.setattr(Ahead, "__call__", unwatched(Ahead.__call__))
    monkeypatch.setattr(trainer_module, "fuses_adam", as_on_a_gpu)
    monkeypatch.setattr(trainer_module, "summed_loss", unwatched(trainer_module.summed_loss))
    assert main([f"--output_dir={tmp_path / 'run'}", *SMALL], RECIPE) == 0
    assert (reads, waits.count) == ([BEHIND] * 12, 0)
    with waits:
        float(torch.ones(()))
    assert waits.count == 1  # it would have seen one


def test_steps_are_recorded_in_order_and_one_behind() -> None:
    recorded: list[float] = []
    steps = InFlight(lambda rate, report: recorded.append(report.loss))
    processes = Processes(0, 1, torch.device("cpu"))
    for number in range(4):
        numbers = torch.tensor([number, 1, number == 2, 0, 1], dtype=torch.float64)
        steps.add(StepInFlight(numbers, 0.1, 0.0, (), [], processes))
        assert recorded == list(range(number + 1 - BEHIND))
    assert steps.asked_to_stop
    steps.settle()
    assert recorded == [0, 1, 2, 3]


@pytest.mark.parametrize("on_a_gpu", [True, False])
def test_a_step_that_is_not_finite_leaves_no_trace_though_it_is_known_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, on_a_gpu: bool
) -> None:
    """Known when the next step was taken: pairs, moments and counts after that are those of a run without it."""
    invocation = parse_command_line([f"--output_dir={tmp_path}", *SMALL], RECIPE)
    assert not isinstance(invocation, str)
    summed_loss, factor = trainer_module.summed_loss, 1.0
    states = []

    def loss(*arguments: Any) -> torch.Tensor:
        return summed_loss(*arguments) * factor

    monkeypatch.setattr(trainer_module, "summed_loss", loss)
    if on_a_gpu:
        monkeypatch.setattr(trainer_module, "fuses_adam", as_on_a_gpu)
    for spoilt in ((), (0, 2)):
        trainer = make_trainer(invocation.config, tmp_path)
        trainer.cascade.open_expert(trainer.preparation.plan.expert(1))
        for step in range(3):
            for factor in (torch.nan, 1.0) if step in spoilt else (1.0,):  # noqa: B007 (what loss reads)
                in_flight = trainer.training_step(step, 1e-2)
        assert in_flight.read().finite
        parameters = trainer.live.pair_parameters
        moments = [m for p in parameters for m in trainer.backend.moments(p).values()]
        states.append(([*map(torch.clone, parameters), *moments], trainer.backend.step_counts(parameters)))
    (clean, counts), (spoilt_tensors, spoilt_counts) = states
    assert counts == spoilt_counts == [3] * len(counts)
    assert all(torch.equal(one, two) for one, two in zip(clean, spoilt_tensors, strict=True))


def make_trainer(config: Any, directory: Path) -> Trainer:
    from accelerate import Accelerator

    from lorasc_ds.models import load_model
    from lorasc_ds.preparation import attach_adapters, prepare
    from lorasc_ds.stopping import Stopping

    module = load_model(config.model)
    weights = attach_adapters(config, module)
    return Trainer(prepare(config), module, weights, Accelerator(), directory, Stopping(directory))


def test_a_profile_holds_the_ranges_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*SMALL, "--cascade.noise_intensity=1", "--training.evaluate=epoch"]
    assert main([f"--output_dir={tmp_path / 'plain'}", *flags], RECIPE) == 0
    assert not (tmp_path / "plain" / "profile").exists()
    capsys.readouterr()
    assert main([f"--output_dir={tmp_path / 'profiled'}", *flags, "--profile"], RECIPE) == 0
    (file,) = (tmp_path / "profiled" / "profile").iterdir()
    assert f"profile   from step 4 on, in {file}; open it in https://ui.perfetto.dev" in capsys.readouterr().out
    assert digest_of_run(tmp_path / "plain") == digest_of_run(tmp_path / "profiled")
    assert records(tmp_path / "plain", "step", "close") == records(tmp_path / "profiled", "step", "close")
    trace = json.loads(file.read_text())
    events = [event for event in trace["traceEvents"] if event.get("cat") == "user_annotation" and event["ph"] == "X"]
    counts = Counter(event["name"] for event in events)
    # steps 4 to 9, the boundary after step 6 with the noise of expert 2, the epochs that end after steps 6 and 9
    ranges = {
        "step": 6,
        "forward": 6,
        "backward": 6,
        "update": 6,
        "close expert": 1,
        "open expert": 1,
        "noise": 1,
        "merge": 1,
    }
    assert {name: counts[name] for name in ranges} == ranges
    assert counts["probe"] >= 4
    assert counts["evaluation"] >= 1
    (closing,) = (event for event in events if event["name"] == "close expert")
    (merge,) = (event for event in events if event["name"] == "merge")
    assert closing["ts"] <= merge["ts"] <= merge["ts"] + merge["dur"] <= closing["ts"] + closing["dur"]
