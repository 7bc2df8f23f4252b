"""Processes that begin with everything imported: forked from one server, which loads torch and DeepSpeed once for all tests.

As a program this is the server: a line with jobs on its stdin, a line with what became of them on its stdout.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

IMPORTED = (
    "engine_cases",
    "faulty_run",
    "image_text_model",
    "interruptions",
    "plugin_cases",
    "sklearn.datasets",
    "transformers.models.llama.modeling_llama",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)


@dataclass(frozen=True)
class Job:
    """`function` is MODULE:NAME; streams of process N are `log`.outN and `log`.errN; after `seconds` all are killed."""

    function: str
    arguments: list[Any]
    log: str
    seconds: float
    environments: list[dict[str, str]] = field(default_factory=lambda: [{}])


@dataclass(frozen=True)
class Ended:
    codes: list[int]
    seconds: float
    out: list[str]
    err: list[str]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def group(world_size: int) -> list[dict[str, str]]:
    """What a launcher sets, for every process."""
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


@cache
def server() -> subprocess.Popen[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [sys.executable, __file__],
        cwd=Path(__file__).parents[1],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(*jobs: Job, at_once: int = 1) -> list[Ended]:
    """Carry out jobs, in their order."""
    process = server()
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        print(json.dumps([at_once, [asdict(job) for job in jobs]]), file=process.stdin, flush=True)
        answer = json.loads(process.stdout.readline())
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        server.cache_clear()
        raise
    return [
        Ended(codes, seconds, *([Path(f"{job.log}.{s}{n}").read_text() for n in range(len(codes))] for s in ("out", "err")))
        for job, (codes, seconds) in zip(jobs, answer, strict=True)
    ]  # fmt: skip


class Running:
    def __init__(self, number: int, job: Job, ids: list[int]) -> None:
        self.number, self.job, self.ids = number, job, ids
        self.began = time.monotonic()
        self.codes: dict[int, int] = {}
        self.seconds = 0.0

    def has_ended(self) -> bool:
        late = time.monotonic() - self.began > self.job.seconds
        for process in [process for process in self.ids if process not in self.codes]:
            if late:
                os.kill(process, signal.SIGKILL)
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                self.codes[process] = os.waitstatus_to_exitcode(status)
                self.seconds = time.monotonic() - self.began
        return len(self.codes) == len(self.ids)


def started(number: int, job: Job) -> Running | None:
    """None in the new processes."""
    ids: list[int] = []
    for rank, environment in enumerate(job.environments):
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for descriptor, stream in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{job.log}.{stream}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            os.environ.update(environment)
            return None
        ids.append(child)
    return Running(number, job, ids)


def serve() -> Job | None:
    """Until stdin ends; in a new process, what it has to do."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed by an import is no answer
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    while line := sys.stdin.readline():
        at_once, jobs = json.loads(line)
        waiting = list(enumerate(Job(**job) for job in jobs))
        running: list[Running] = []
        done: dict[int, Any] = {}
        while waiting or running:
            while waiting and len(running) < at_once:
                number, job = waiting.pop(0)
                new = started(number, job)
                if new is None:
                    return job
                running.append(new)
            for one in [one for one in running if one.has_ended()]:
                running.remove(one)
                done[one.number] = [[one.codes[process] for process in one.ids], one.seconds]
            time.sleep(0.02)
        print(json.dumps([done[number] for number in range(len(jobs))]), file=answers, flush=True)
    return None


if __name__ == "__main__":
    job = serve()
    if job is not None:
        module, name = job.function.split(":")
        sys.exit(getattr(importlib.import_module(module), name)(*job.arguments))
