"""Runs that are interrupted at a named point, each in a process of its own, forked from this one.

A point is `NAME#N:before` or `NAME#N:after`: the N-th call of something, counted over the run, where NAME of what is done
to a file has its path in the run directory. `interruptions.py FILE` carries out the list of runs in FILE, one after the
other, and writes what became of them to `FILE.done`.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorasc_ds import evaluation, models
from lorasc_ds.algorithm.ledger import Ledger
from lorasc_ds.cascade import Boundaries
from lorasc_ds.live_weights import LiveWeights
from lorasc_ds.train import main as train
from lorasc_ds.trainer import Trainer

RECIPE = Path(__file__).parents[1] / "launch" / "recipes" / "quickstart.yaml"
POINTS = {
    "load": (models, "load_model"),
    "open": (Boundaries, "open_expert"),
    "step": (Trainer, "training_step"),
    "close": (Boundaries, "close_expert"),
    "noise": (LiveWeights, "add_noise"),
    "merge": (LiveWeights, "merge"),
    "clear": (LiveWeights, "clear_B"),  # between the weights and the pairs
    "replay": (LiveWeights, "add"),
    "append": (Ledger, "append"),
    "evaluate": (evaluation, "token_log_probabilities"),  # each batch
    "ship": (LiveWeights, "save"),
    "fsync": (os, "fsync"),  # each file of everything, and each folder
    "replace": (os, "replace"),
    "rename": (os, "rename"),
    "remove": (shutil, "rmtree"),
}
PATHS: dict[str, Callable[..., Any]] = {
    "fsync": lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"),
    "replace": lambda source, target: target,
    "rename": lambda source, target: target,
    "remove": lambda path, **_: path,
}


def kill(point: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate(point: str) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fill_the_disk(point: str) -> None:
    raise OSError(28, "No space left on device")


def wait(point: str) -> None:
    time.sleep(60)


ACTIONS: dict[str, Callable[[str], None]] = {
    "kill": kill,
    "terminate": terminate,
    "fill the disk": fill_the_disk,
    "wait": wait,
}


def instrument(point: str | None, action: str, passed: Path, directory: Path) -> None:
    """Count the calls of `POINTS`, write each into `passed`, and act at one."""
    counts: Counter[str] = Counter()
    log = passed.open("w", buffering=1)

    def around(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            label = name
            if name in PATHS:
                label += " " + os.path.relpath(PATHS[name](*args, **kwargs), directory)
            counts[label] += 1
            before, after = (f"{label}#{counts[label]}:{when}" for when in ("before", "after"))
            for here in (before, after):
                log.write(f"{here}\n")
                if here == point:
                    ACTIONS[action](here)
                if here == before:
                    result = function(*args, **kwargs)
            return result

        return called

    for name, (owner, attribute) in POINTS.items():
        setattr(owner, attribute, around(name, getattr(owner, attribute)))


def forked(case: dict[str, Any]) -> dict[str, Any]:
    """Carry out one run and wait for its end."""
    directory = Path(case["arguments"][0].partition("=")[2])
    files = {stream: directory.with_name(f"{directory.name}.{stream}") for stream in ("out", "err", "points")}
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for stream, number in (("out", 1), ("err", 2)):
                os.dup2(os.open(files[stream], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            instrument(case.get("point"), case.get("action", "kill"), files["points"], directory)
            code = train(case["arguments"], RECIPE)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    for seconds, signum in case.get("signals", []):  # from when the point was reached, or the signal before
        while case["point"] not in (files["points"].read_text() if files["points"].exists() else ""):
            time.sleep(0.01)
        time.sleep(seconds)
        os.kill(child, signum)
    _, status = os.waitpid(child, 0)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "seconds": time.monotonic() - began,
        **{stream: path.read_text() for stream, path in files.items()},
    }


def asked_to_stop(point: str, *arguments: str) -> int:
    """A run in this process, which gets SIGTERM at a point."""
    instrument(point, "terminate", Path(os.devnull), Path())
    return train(arguments, RECIPE)


def main(file: str) -> None:
    cases = json.loads(Path(file).read_text())
    results = [forked(case) for case in cases]
    Path(f"{file}.done").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
