"""The command with a fault planted in one process: `faulty_run.py PLACE RANK ARGUMENTS...`.

A process that torchrun has started again has no fault.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from lorasc_ds.algorithm.ledger import Ledger
from lorasc_ds.checkpoint import Checkpoints
from lorasc_ds.errors import DivergedError
from lorasc_ds.live_weights import LiveWeights
from lorasc_ds.train import main as train

RECIPE = Path(__file__).parents[1] / "launch" / "recipes" / "quickstart.yaml"


def fail(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("a planted fault")


def diverge(*_: Any, **__: Any) -> NoReturn:
    raise DivergedError("a planted divergence")


def fill_the_disk(*_: Any, **__: Any) -> NoReturn:
    raise OSError(28, "No space left on device")


def die(*_: Any, **__: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def hang(*_: Any, **__: Any) -> NoReturn:
    while True:
        time.sleep(1)


FAULTS = {
    "boundary": (LiveWeights, "merge", fail),
    "divergence": (LiveWeights, "merge", diverge),
    "hang": (LiveWeights, "merge", hang),
    "ledger": (Ledger, "append", fill_the_disk),
    "save": (LiveWeights, "save", fail),
    "checkpoint": (Checkpoints, "save", fill_the_disk),
    "death": (Ledger, "closed", die),  # as a run is taken up again
}


def main(place: str, rank: str, *arguments: str) -> int:
    owner, name, fault = FAULTS[place]
    assert hasattr(owner, name)
    if os.environ["RANK"] == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        setattr(owner, name, fault)
    return train(list(arguments), RECIPE)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
