"""Worker processes that make batches ahead: what ends them, and what does not."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator

import psutil
import pytest

from lorasc_ds.errors import RunError
from lorasc_ds.prefetching import TO_THE_RUN, explaining_dead_workers, prefetched


def slowly(number: int) -> int:
    time.sleep(0.05)
    return number * number


@pytest.fixture
def started() -> Iterator[tuple[Iterator[int], list[psutil.Process]]]:
    before = set(psutil.Process().children())
    made = prefetched(slowly, range(40), 2)
    assert [next(made), next(made)] == [0, 1]
    yield made, [one for one in psutil.Process().children() if one not in before]
    made.close()


def test_a_signal_to_all_processes_ends_no_worker(started: tuple[Iterator[int], list[psutil.Process]]) -> None:
    made, workers = started
    for signum in TO_THE_RUN:
        subprocess.run(["kill", f"-{int(signum)}", *(str(one.pid) for one in workers)], check=True)
    assert list(made) == [number * number for number in range(2, 40)]


def test_the_own_process_ends_them(started: tuple[Iterator[int], list[psutil.Process]]) -> None:
    made, workers = started
    made.close()
    assert psutil.wait_procs(workers, timeout=5)[1] == []


def test_a_dead_worker_is_one_line(started: tuple[Iterator[int], list[psutil.Process]]) -> None:
    made, workers = started

    @explaining_dead_workers(2)
    def lose_one() -> None:
        workers[0].send_signal(signal.SIGKILL)
        list(made)

    with pytest.raises(RunError, match=r"training\.data_workers 2: one of the processes .* died") as caught:
        lose_one()
    assert "\n" not in str(caught.value)
