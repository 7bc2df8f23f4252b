"""Rows that need several processes, C2, Z1 and Z2: starts them, all in one group, and takes what the first found."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorasc_ds.benchmark.results import Result, Target, ratio
from lorasc_ds.benchmark.setting import Setting

SECONDS = 900  # that they may take
LEAST = {"zero2": 40.0, "zero3": 40.0}  # of the issue; ZeRO-1 is reported


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def measured(setting: Setting) -> dict[str, Any]:
    """What `rank.py` found in `--processes` processes of this machine.

    Raises:
        RuntimeError: one of them failed.
    """
    folder, count = setting.fresh("ranks"), setting.options.processes
    job = {
        "folder": str(folder),
        "repetitions": setting.options.repetitions,
        "warm_up": setting.options.warm_up,
        "quick": setting.quick,
    }
    common = os.environ | {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-W", "ignore", "-m", "lorasc_ds.benchmark.rank", json.dumps(job)]
    logs = [folder / f"{rank}.log" for rank in range(count)]
    processes = []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that they end with this one
    try:
        for rank, log in enumerate(logs):
            own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as stream:
                processes.append(subprocess.Popen(command, env=own, stdout=stream, stderr=stream))
        codes = [process.wait(SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
        signal.signal(signal.SIGTERM, before)
    if any(codes):
        told = next(log for log, code in zip(logs, codes, strict=True) if code)
        raise RuntimeError(f"processes of the rows under ZeRO ended with {codes}:\n{told.read_text()[-3000:]}")
    return json.loads(Path(folder / "found.json").read_text())


def rows(setting: Setting) -> Iterator[Result]:
    """C2, Z1 and Z2."""
    found, count = measured(setting), setting.options.processes
    for engine, seconds in found["boundaries"].items():
        yield setting.judged(
            ratio(
                "C2",
                f"boundary under {engine} x {count}, {found['weights']} weights of {found['side']} x {found['side']}:"
                " PEFT cycle and new engine / ours",
                seconds,
                ("new engine", "ours"),
                Target(">=", LEAST[engine]) if engine in LEAST else None,
            )
        )
    for name in [one for one in found["steps"] if one != "ours, ddp"]:
        engine = name.removeprefix("ours, ")
        yield setting.judged(
            ratio("Z1", f"step, {engine} x {count} / ddp x {count}", found["steps"], (name, "ours, ddp"))
        )
    for engine, traffic in found["bytes"].items():
        for what, moved in traffic.items():
            yield Result("Z2", f"bytes handed to collectives by a {what}, {engine} x {count}", moved, "bytes")
