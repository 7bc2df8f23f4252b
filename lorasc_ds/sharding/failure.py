"""One process fails: all end, with one message that names it, even where they wait for it in a collective."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch._C._distributed_c10d import TCPStore

from lorasc_ds.errors import PeerError, PreemptedError, RunError

POLL_SECONDS = 1.0
GRACE_SECONDS = 5.0  # for the main thread to leave a collective by itself


@contextmanager
def failing_together(rank: int, world_size: int, on_failure: Callable[[str, int], None]) -> Iterator[None]:
    """Inside, an error of one process ends all of them.

    The first to fail says so in the store of the launch and raises its error with its rank before it; the
    others, told by a thread that watches the store, raise `PeerError` or, if they are stuck, end.

    Args:
        on_failure: called with message and exit code in the processes that did not fail first, before they end.

    Raises:
        RunError: this process failed first.
        PeerError: another one did.
    """
    if world_size == 1:
        yield
        return
    store, told = connect(), connect()
    left = threading.Event()

    def watch() -> None:
        while not left.wait(POLL_SECONDS):
            try:
                if not told.check([key()]):
                    continue
                message, code = json.loads(told.get(key()))
                told.add(f"{key()}/seen", 1)
            except (RuntimeError, ValueError):  # the store's host is gone; the collectives will say so
                return
            if not left.wait(GRACE_SECONDS):
                on_failure(message, code)
                os._exit(code)

    watcher = threading.Thread(target=watch, name="failure watch", daemon=True)
    watcher.start()
    try:
        yield
    except (PreemptedError, PeerError):  # all raise them together, or know already
        raise
    except BaseException as error:
        message, code = f"rank {rank}: {describe(error)}", error.exit_code if isinstance(error, RunError) else 1
        try:
            first = json.loads(store.compare_set(key(), "", json.dumps([message, code])))
        except (RuntimeError, ValueError):
            raise PeerError(f"{message} (and the process that keeps the store is gone)", code, told=False) from error
        if first != [message, code]:
            on_failure(*first)
            raise PeerError(*first, told=True) from error
        others_saw_it(store, world_size)
        end = threading.Timer(2 * GRACE_SECONDS, os._exit, [code])  # should the engine's own end hang
        end.daemon = True
        end.start()
        if isinstance(error, RunError):
            error.args = (message,)
        else:
            error.add_note(f"on rank {rank} of {world_size}")
        raise
    finally:
        left.set()
        watcher.join()


@contextmanager
def speaking_once_per_node(asked_to_stop: Callable[[], bool]) -> Iterator[None]:
    """Inside, before there is a group, all processes usually meet the same error: the first of each node says it.

    The others wait for their launcher to end them, and say it themselves if nobody does: it may be theirs alone.

    Args:
        asked_to_stop: whether this process was.

    Raises:
        PeerError: in a process that was ended.
    """
    try:
        yield
    except RunError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            deadline = time.monotonic() + GRACE_SECONDS
            while time.monotonic() < deadline and not asked_to_stop():
                time.sleep(0.05)
            if asked_to_stop():
                raise PeerError(str(error), error.exit_code, told=True) from error
        raise


def describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, RunError) else f"{type(error).__name__}: {text}"


def connect() -> TCPStore:
    """A client of the store through which the launch formed its group; a thread needs one of its own."""
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def key() -> str:
    """torchrun's store outlives a restart of the processes, which must not find the failure before it."""
    return f"lorasc_ds/failure/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def others_saw_it(store: TCPStore, world_size: int) -> None:
    """Wait until the others have been told, a few polls at most: the store may end with this process."""
    deadline = time.monotonic() + 3 * POLL_SECONDS
    while store.add(f"{key()}/seen", 0) < world_size - 1 and time.monotonic() < deadline:
        time.sleep(0.05)
