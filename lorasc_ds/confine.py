"""Shuts itself in and becomes a program: what `sandbox.py` starts, by itself, ahead of code that nobody has read.

    python -I -S confine.py SETTINGS

A byte on standard output says that the program begins; it keeps that output and no capability. Nothing but the
standard library is imported: where this runs the package may be out of sight.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from dataclasses import asdict, dataclass

NO_SUID, NO_DEVICES, NO_PROGRAMS, READ_ONLY, REMOUNT, BIND, RECURSIVE = 2, 4, 8, 1, 32, 4096, 16384  # mount(2)
PARENT_DEATH_SIGNAL, DROP_FROM_BOUNDING_SET, NO_NEW_PRIVILEGES = 1, 24, 38  # prctl(2)

libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Settings:
    """
    Args:
        command: the program, and its arguments.
        limits: of `resource`, by name without `RLIMIT_`, e.g. `{"CPU": 4}`; a lower one that is in force stays.
        user: to become, as group too; None: stay who one is.
        room: folder that is furnished and becomes `/`, in a mount namespace of one's own; None: the file system stays.
        root: folder that is furnished already and becomes `/`; None: none is.
        visible: files and folders that are to be seen in the room, read-only, where they are outside too.
        files: others, by the path that they have in the room.
        work: the only folder that can be written to, in the room; it is gone afterwards.
        work_bytes: how much fits into it.
    """

    command: list[str]
    limits: dict[str, int]
    user: int | None
    room: str | None
    root: str | None
    visible: list[str]
    files: dict[str, str]
    work: str
    work_bytes: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def main(settings: Settings) -> None:
    os.umask(0o022)  # whoever the program runs as is to read the room
    if settings.room is not None:
        furnish(settings.room, settings)
        child = os.fork()
        if child:  # the first process of its namespace: whatever the program started ends with it
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os._exit(status if status >= 0 else 128 - status)
    if settings.root is not None:
        os.chroot(settings.root)  # a process in a changed root cannot create a user namespace
        os.chdir(settings.work)
    for name, value in settings.limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    for capability in range(64):
        libc.prctl(DROP_FROM_BOUNDING_SET, capability, 0, 0, 0)
    if settings.user is not None:
        os.setgroups([])
        os.setgid(settings.user)
        os.setuid(settings.user)
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    libc.prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    os.write(1, b"\n")
    os.execv(settings.command[0], settings.command)


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    if libc.mount(os.fsencode(source), os.fsencode(target), kind.encode(), flags, options.encode()):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def furnish(room: str, settings: Settings) -> None:
    """Build a root folder that shows nothing but what it is told to, and move in; in a mount namespace of one's own."""
    mount("room", room, "tmpfs", NO_SUID | NO_DEVICES, "mode=755")
    for path in settings.visible:
        show(path, room + path)
    for path, source in settings.files.items():
        show(source, room + path)
    os.makedirs(room + settings.work)
    for point in mount_points(room):
        kept = os.statvfs(point).f_flag & (NO_SUID | NO_DEVICES | NO_PROGRAMS)  # what may not be taken away
        mount("", point, "", REMOUNT | BIND | READ_ONLY | NO_SUID | kept)
    mount("work", room + settings.work, "tmpfs", NO_SUID | NO_DEVICES, f"mode=1777,size={settings.work_bytes}")
    os.chroot(room)  # for good: no capability is left to leave it by, and no file outside is open
    os.chdir(settings.work)


def show(source: str, target: str) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return
    if os.path.isdir(source):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT))
    mount(source, target, "", BIND | RECURSIVE)


def mount_points(folder: str) -> list[str]:
    """What is mounted at and below a folder."""
    with open("/proc/self/mountinfo", "rb") as lines:
        escaped = [line.split()[4] for line in lines]
    points = [os.fsdecode(point.decode("unicode_escape").encode("latin-1")) for point in escaped]
    return [point for point in points if f"{point}/".startswith(f"{folder}/")]


if __name__ == "__main__":
    main(Settings(**json.loads(sys.argv[1])))
