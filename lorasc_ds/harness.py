"""Scores of a live model on tasks of lm-evaluation-harness (the `[eval]` extra), by its prompts and its metrics.

Seeds, few-shot examples and rounding are those of its command, so that numbers compare with published ones.
"""

from __future__ import annotations

import copy
import difflib
import io
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorasc_ds.errors import ConfigError
from lorasc_ds.evaluation import evaluation_mode
from lorasc_ds.sharding import Processes
from lorasc_ds.tasks import Scores

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

T = TypeVar("T")

OWN_TASKS = Path(__file__).parent / "harness_tasks"
PYTHON_SEED, OTHER_SEED = 0, 1234  # of the command `lm_eval`


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    processes: Processes,
    batch_size: int,
    include_path: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    sharded: bool = False,
    say: Callable[[str], None] = lambda line: None,
    record: Callable[[str, dict[str, Any]], None] | None = None,
) -> Scores:
    """Metrics by task and group, each with its standard error as `METRIC_stderr` where it has one.

    A metric of a filter other than `none` is named as in the harness, `exact_match,strict-match`. Mode, generators
    and tokenizer are left as they were. The processes share the questions out, and all get the same scores; a question
    stands in other batches than with one process, so a log-probability differs by rounding, as with `batch_size`.

    Args:
        model: the module itself, on its device, not what an engine wraps around it.
        tasks: names or patterns (`mmlu_*`) of tasks, groups and tags.
        include_path: a folder with task files of one's own, searched first. Code that they name is run.
        shots: solved questions before each; None: as many as the task says. A task that says 0 keeps to it.
        limit: questions of each task; None: all.
        sharded: the weights are cut up over the processes (ZeRO-3), so all answer every question together.
        say: takes a line for the user, on the main process.
        record: takes a task's name and one question's record, on the main process.

    Raises:
        ConfigError: the harness is not installed, a task is unknown, its data cannot be loaded, its answers do not
            fit the model's positions, or it would run programs that the model wrote.
    """
    try:
        from lm_eval.evaluator import evaluate
    except ImportError as error:
        raise ConfigError(f"--harness_tasks needs lm-evaluation-harness ({error}): pip install -e '.[eval]'") from error
    os.environ["DISABLE_MULTIPROC"] = "1"  # or resampling would fork a process that may hold a GPU and collectives

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(seeded(model.device))
        stack.enter_context(quiet(bars=processes.main and sys.stderr.isatty()))
        warnings = stack.enter_context(heard("lm_eval"))
        chosen = load(tasks, include_path, shots)
        live = live_model(model, tokenizer, batch_size, processes, sharded)
        check_answers_fit(chosen["tasks"], live)
        results = cast(
            dict[str, Any],
            evaluate(live, cast(Any, chosen), limit=limit, bootstrap_iters=1000, log_samples=record is not None),
        )
    cut = processes.sum(torch.tensor([sum("runcat" in line for line in warnings)], device=processes.device))
    if processes.main:
        if cut:
            say(f"prompts longer than the model's {live.max_length} positions lost their beginning")
        if record is not None:
            for name, samples in results["samples"].items():
                for sample in samples:
                    record(name, readable(sample))
    return {name: found for name, values in results["results"].items() if (found := metrics(values))}


def metrics(values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a task: what is named `METRIC,FILTER`; a standard error that is not known is left out."""
    numbers = {name: value for name, value in values.items() if "," in name and not isinstance(value, str)}
    return {name.removesuffix(",none"): float(value) for name, value in numbers.items()}


def readable(sample: dict[str, Any]) -> dict[str, Any]:
    """One question's record, of plain values."""
    values = {name: sample[name] for name in sample["metrics"]}
    return {
        "id": sample["doc_id"],
        "filter": sample["filter"],
        "prompt": str(sample["arguments"][0][0]),
        "target": str(sample["target"]),
        "answers": [plain(answer) for answer in sample["filtered_resps"]],
        "metrics": {name: plain(value) for name, value in values.items()},
    }


def plain(value: Any) -> Any:
    """What JSON holds: numbers of numpy as Python's, tuples as lists, all else as text."""
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)


def load(names: Sequence[str], include_path: Path | None, shots: int | None) -> dict[str, Any]:
    """The tasks and groups of these names, their data read.

    Raises:
        ConfigError: see `score`.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"--harness_include_path {include_path} is not a folder: give one with task files (*.yaml)")
    folders: list[str | Path] = [OWN_TASKS] if include_path is None else [OWN_TASKS, include_path]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):  # to read the thousands of the package takes many seconds
        manager = TaskManager(include_path=folders)
    found = dict.fromkeys(match for name in names for match in matching(name, manager, include_path))
    with loading(", ".join(found)):
        chosen = cast(dict[str, Any], manager.load(list(found)))
    for name, task in chosen["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(
                f"--harness_tasks {name} runs programs that the model wrote without a sandbox: take the task humaneval"
                " of --tasks, which has one"
            )
        wanted = task.get_config("num_fewshot")
        if wanted is None or (shots is not None and wanted != 0):
            task.set_config("num_fewshot", shots or 0)
        task.set_fewshot_seed(OTHER_SEED)
    return chosen


def matching(name: str, manager: TaskManager, include_path: Path | None) -> list[str]:
    """
    Raises:
        ConfigError: there is no such task.
    """
    found = manager.match_tasks([name])
    if found:
        return sorted(found)
    near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5) or ["none is near"]
    where = "" if include_path is None else f", nor has --harness_include_path {include_path} a task file of it"
    raise ConfigError(
        f"--harness_tasks {name}: lm-evaluation-harness has no such task{where}; nearest: {', '.join(near)}"
    )


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turns whatever is raised over a task file or its data into one line."""
    try:
        yield
    except Exception as error:  # a task file may name code of its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"--harness_tasks {what}: the task or its data cannot be loaded: {reason}; a task of the hub needs the"
            " network once (without HF_HUB_OFFLINE) and data that is no script; or give a task file with local data by"
            " --harness_include_path"
        ) from error


def live_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    processes: Processes,
    sharded: bool,
) -> Any:
    """The model as the harness asks it: each process answers the questions whose turn it is, and all get all answers.

    The harness itself believes one process. Its own way of sharing out fails with a model that is given, and where
    there are fewer questions than processes.
    """
    from lm_eval.models import huggingface

    of_the_harness: Any = huggingface.HFLM

    def shared_out(answer: Callable[..., list[T]], requests: list[Any]) -> list[T]:
        mine = [
            at
            for at, request in enumerate(requests)
            if sharded or request.doc_id % processes.world_size == processes.rank
        ]
        answers = answer([requests[at] for at in mine]) if mine else []
        by_process = processes.gather(list(zip(mine, answers, strict=True)))
        found = dict(pair for answered in by_process for pair in answered)
        return [found[at] for at in range(len(requests))]

    class LiveModel(of_the_harness):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return shared_out(super().loglikelihood, requests)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return shared_out(super().loglikelihood_rolling, requests)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return shared_out(super().generate_until, requests)

    # a copy, since one that lacks a padding token would be given one; of long prompts `score` says what became of them
    own: Any = copy.deepcopy(tokenizer)
    own.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return LiveModel(pretrained=model, tokenizer=own, batch_size=batch_size)


def check_answers_fit(tasks: dict[str, Any], live: Any) -> None:
    """
    Raises:
        ConfigError: an answer may take all positions of the model.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    for name, task in tasks.items():
        if task.OUTPUT_TYPE != "generate_until":
            continue
        settings: Any = normalize_gen_kwargs(task.get_config("generation_kwargs") or {}, live.max_gen_toks)
        longest = settings["max_gen_toks"]
        if longest >= live.max_length:
            raise ConfigError(
                f"--harness_tasks {name} generates up to {longest} tokens, but the model has {live.max_length}"
                " positions: take a model with more, or a task file with smaller generation_kwargs.max_gen_toks"
            )


@contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """Inside, the generators are those of the harness's command; after, as before."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        random.seed(PYTHON_SEED)
        np.random.seed(OTHER_SEED)
        torch.manual_seed(OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


@contextmanager
def quiet(*, bars: bool) -> Iterator[None]:
    """Stdout is kept free; progress bars are drawn where someone looks at them."""
    with redirect_stderr(sys.stderr if bars else io.StringIO()), redirect_stdout(sys.stderr):
        yield


@contextmanager
def heard(name: str) -> Iterator[list[str]]:
    """The warnings of a logger and those below it, in place of being printed."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, listener = logging.getLogger(name), Listener(logging.WARNING)
    propagated = logger.propagate
    logger.addHandler(listener)
    logger.propagate = False
    try:
        yield lines
    finally:
        logger.removeHandler(listener)
        logger.propagate = propagated
