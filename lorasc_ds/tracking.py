"""The record of a run: every event goes to `metrics.jsonl`, trackers, `status.json` and the console, as fits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any

from lorasc_ds import run_directory
from lorasc_ds.backends import Backend
from lorasc_ds.console import Console
from lorasc_ds.errors import PreemptedError, RunError
from lorasc_ds.records import Records
from lorasc_ds.reports import StepReport
from lorasc_ds.tasks import Scores
from lorasc_ds.tensorboard import TensorBoard
from lorasc_ds.totals import Totals
from lorasc_ds.warning_signs import Sign
from lorasc_ds.watch import LossWatch, SignWatch


class Tracker:
    """Writes every event to all places; the x of every curve is the optimizer step.

    Args:
        directory: the run directory.
        task: name of the task, in the tags of its scores.
        headline: the metric that the lines of an evaluation show.
        counted: what the speed is counted in, `tokens` or `images`.
        steps: optimizer steps of the run.
        steps_per_epoch: of them, those of one pass over the training examples.
        experts: experts of the run.
        log_steps: steps between two records of the loss.
        signs: what is going wrong.
        tensorboard, backends: where the curves go; of the main process.
        main: whether this process writes and prints; the others only count.
        resumed: what `state` gave, where the run goes on; None where it begins.
    """

    def __init__(
        self,
        directory: Path,
        *,
        task: str,
        headline: str,
        counted: str,
        steps: int,
        steps_per_epoch: int,
        experts: int,
        log_steps: int,
        signs: SignWatch,
        tensorboard: TensorBoard | None = None,
        backends: Sequence[Backend] = (),
        main: bool = True,
        resumed: dict[str, Any] | None = None,
    ) -> None:
        self.directory = directory
        self.task = task
        self.headline = headline
        self.counted = counted
        self.steps_per_epoch = steps_per_epoch
        self.experts = experts
        self.log_steps = log_steps
        self.main = main
        self.records = Records(directory / "metrics.jsonl" if main else None)
        step = 0 if resumed is None else resumed["step"]
        self.tensorboard = tensorboard
        self.backends = backends
        self.console = Console(steps, step, headline, main)
        self.step = step
        self.expert = 0
        self.window: list[StepReport] = []
        self.learning_rate = 0.0
        self.lr_ratios = {"pairs": 1.0}
        self.totals = Totals() if resumed is None else Totals.of(resumed)
        self.metrics_bytes = 0
        self.before: Scores = {}
        self.after: Scores = {}
        self.watch = LossWatch()
        self.signs = signs
        if resumed is not None:
            self.resume(resumed)
        self.status("running", "loading")

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # a full disk is told by the error that is on its way
            if isinstance(error, PreemptedError):
                self.status("preempted", str(error), error.exit_code)
            elif error is not None:
                self.failed(" ".join(f"{type(error).__name__}: {error}".split()), exit_code_of(error))
            self.records.close()
        self.console.bar.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        code = 0 if error is None else exit_code_of(error)
        for backend in self.backends:
            backend.end(code)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: totals, scores, and how far the records go."""
        return {
            "step": self.step,
            "expert": self.expert,
            "learning_rate": self.learning_rate,
            "watched": {"losses": list(self.watch.losses), "high": self.watch.high},
            "window": [one._replace(examples=())._asdict() for one in self.window],
            **asdict(self.totals),
            "before": self.before,
            "after": self.after,
            "signs": self.signs.state(),
            "backends": {one.name: one.identity for one in self.backends},
            "metrics_bytes": self.records.bytes,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Count on from `state`."""
        self.expert, self.learning_rate = state["expert"], state["learning_rate"]
        self.watch.losses.extend(state["watched"]["losses"])
        self.watch.high = state["watched"]["high"]
        self.window = [StepReport(**one | {"examples": tuple(one["examples"])}) for one in state["window"]]
        self.before, self.after = state["before"], state["after"]
        if "signs" in state:  # of a run of an earlier version they are not known
            self.signs.resume(state["signs"])
        self.metrics_bytes = state["metrics_bytes"]

    @property
    def epoch(self) -> float:
        return self.step / self.steps_per_epoch

    def status(self, state: run_directory.State, message: str, exit_code: int | None = None) -> None:
        if self.main:
            run_directory.write_status(self.directory, state, self.step, self.expert, message, exit_code)

    def failed(self, message: str, exit_code: int) -> None:
        self.status("failed", message, exit_code)

    def say(self, line: str) -> None:
        self.console.say(line)

    def warn(self, line: str) -> None:
        """A line that is also a record."""
        self.record("warning", {"message": line})
        self.say(f"warning   {line}")

    def tell(self, signs: Iterable[Sign]) -> None:
        """What is going wrong, each a line and a record."""
        for sign in signs:
            line = f"expert {self.expert}, step {self.step}: {sign.message}"
            self.record("warning", {"sign": sign.name, "message": line})
            self.say(f"warning   {line}")

    def record(self, event: str, values: dict[str, Any]) -> None:
        """One object of `metrics.jsonl`."""
        place = {"event": event, "step": self.step, "expert": self.expert, "epoch": round(self.epoch, 4)}
        self.records.write(place | values)

    def scalars(self, values: dict[str, float]) -> None:
        if self.tensorboard is not None:
            self.tensorboard.scalars(values, self.step)
        for problem in [backend.scalars(values, self.step) for backend in self.backends]:
            if problem is not None:
                self.warn(problem)

    def configuration(self, text: str, settings: dict[str, Any]) -> None:
        """The resolved configuration, as text and flattened; backends have it from their start."""
        if self.tensorboard is not None:
            metrics = [f"eval/{self.task}/dev/{metric}" for metric in (self.headline, "loss")]
            self.tensorboard.configuration(text, settings, metrics)

    def goes_on(self, checkpoint: Path, environment: dict[str, Any]) -> None:
        """The run was taken up again, by this command and with these versions.

        What `metrics.jsonl` holds beyond the checkpoint is cut off, since it will happen again.
        """
        self.records.cut(self.metrics_bytes)
        self.record("resumed", {"checkpoint": checkpoint.name, "environment": environment})

    def learning_rates(self, rates: dict[str, float]) -> None:
        """The peak learning rate of every parameter group by its role, the first of which is the run's."""
        first = next(iter(rates.values()))
        self.lr_ratios = {role: rate / first for role, rate in rates.items()}
        self.say(f"rates     {', '.join(f'{role} {rate:g}' for role, rate in rates.items())}, read from the optimizer")

    def trained(self, learning_rate: float, step: StepReport) -> None:
        """An optimizer step was taken. `log_steps` of them make a record, and so does what an expert leaves over."""
        self.count(step)
        strange = self.watch.spike(step.loss)
        if strange is not None:
            self.warn(f"step {self.step}: {strange}; its examples: {', '.join(step.examples)}")
        self.window.append(step)
        self.learning_rate = learning_rate
        if self.step % self.log_steps == 0:
            self.record_window()
        self.tell(self.signs.step(self.step, self.expert, step.loss))

    def left_out(self, step: StepReport, reason: str) -> None:
        """The step is not taken, since its numbers are not finite."""
        self.count(step)
        self.totals.skipped += 1
        self.warn(f"{reason}; left out, number {self.totals.skipped}")
        self.tell(self.signs.step(self.step, self.expert, None))

    def count(self, step: StepReport) -> None:
        self.step += 1
        self.totals.seconds += step.seconds
        self.totals.tokens += step.tokens
        for line in step.unreadable:
            self.totals.unreadable += 1
            self.warn(f"step {self.step}: {line}; left out, number {self.totals.unreadable}")
        self.console.bar.update()

    def record_window(self) -> None:
        """The steps since the last record: means, and the learning rate of the last of them."""
        window, self.window = self.window, []
        if not window:
            return
        per_second = f"{self.counted}_per_second"
        values = {
            "loss": sum(one.loss for one in window) / len(window),
            "lr": self.learning_rate,
            "grad_norm": sum(one.grad_norm for one in window) / len(window),
            per_second: sum(one.tokens for one in window) / sum(one.seconds for one in window),
        }
        self.record("step", values)
        tags = {"loss": "train/loss", "grad_norm": "train/grad_norm", per_second: f"perf/{per_second}"}
        self.scalars({tag: values[key] for key, tag in tags.items()})
        self.scalars({f"train/lr/{role}": self.learning_rate * ratio for role, ratio in self.lr_ratios.items()})
        state = f"loss {values['loss']:.4f}, {values[per_second]:,.0f} {self.counted}/s"
        self.console.doing(self.step, f"expert {self.expert}/{self.experts}", state)

    def opened(self, expert: int, values: dict[str, Any]) -> None:
        """An expert begins; `values` say what that did, its `seconds` among them."""
        self.expert = expert
        self.totals.boundary_seconds.append(values["seconds"])
        self.totals.choosing_seconds += values["choosing_seconds"] or 0.0
        self.signs.noise = values["noise_norm"]
        self.boundary("open", values)

    def closed(self, values: dict[str, Any]) -> None:
        """The expert has been merged."""
        self.record_window()
        self.totals.boundary_seconds[-1] += values["seconds"]
        self.totals.choosing_seconds += values["choosing_seconds"] or 0.0
        self.tell(self.signs.closed(self.step, self.expert, values["norm"]))
        self.boundary("close", values)
        if values["norm"] > 0:
            self.scalars({"lorasc/close/noise_to_update": self.signs.noise / values["norm"]})

    def boundary(self, event: str, values: dict[str, Any]) -> None:
        """Records a boundary; a mapping of values by weight becomes its mean and a histogram.

        The dev losses of candidates are scalars, one for each.
        """
        self.record(event, values)
        self.status("running", "training")
        for key, value in values.items():
            tag = f"lorasc/{event}/{key}"
            if key.endswith("_losses"):
                self.scalars({f"{tag}/{candidate:g}": loss for candidate, loss in value.items()})
            elif isinstance(value, dict):
                by_weight = list(value.values())
                self.scalars({tag: fmean(by_weight)})
                if self.tensorboard is not None:
                    self.tensorboard.histogram(f"{tag}_by_weight", by_weight, self.step)
            elif value is not None:
                self.scalars({tag: value})

    def evaluated(self, when: str, scores: Scores) -> None:
        """Every split has been scored."""
        self.before, self.after = self.before or scores, scores
        self.record("eval", {"scores": scores})
        self.scalars(
            {
                f"eval/{self.task}/{split}/{metric}": value
                for split, of_split in scores.items()
                for metric, value in of_split.items()
            }
        )
        self.console.scored(when, scores)
        self.tell(self.signs.scored(self.step, scores["dev"]["loss"] if "dev" in scores else None))
        self.scalars(self.signs.gap(self.step))

    def stopped_early(self, steps: int, reason: str) -> None:
        """The run ends before its `steps` optimizer steps."""
        self.record("stopped_early", {"message": reason})
        self.say(f"stopped   after step {self.step} of {steps}: {reason}")

    def choosing(self, examples: int) -> dict[str, float]:
        """What it cost to choose α and λ, said and returned."""
        cost = self.totals.choosing(examples)
        spent = f"{cost['seconds']:.1f} s to choose on {examples} dev examples"
        self.say(f"auto      {spent}, {cost['share']:.1%} of the training")
        return cost


def exit_code_of(error: BaseException) -> int:
    return error.exit_code if isinstance(error, RunError) else 1
