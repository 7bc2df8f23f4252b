"""Runs programs that nobody has read: each in a process of its own, with limits, without network or anyone's files."""

from __future__ import annotations

import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Literal

from lorasc_ds import confine
from lorasc_ds.errors import ConfigError, RunError

Kind = Literal["unshare", "bwrap", "none"]

# Repeats at the program's end, and not otherwise, the secret of this run, which is read before the program begins. No
# exit code or output stands for it. The program shares the process, though: one that searches the interpreter's frames
# or memory finds it. That takes intent; no wrapper inside the process can rule it out.
RUN = """
def run():
    import os, runpy, sys
    secret, end = os.read(0, 64), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    runpy.run_path(sys.argv[1])
    os.write(end, secret)
    os._exit(0)
run()"""
LIMITS = {
    "AS": 4 << 30,  # bytes of address space
    "CORE": 0,
    "FSIZE": 16 << 20,  # bytes of a file, what the program says on standard error too
    "NOFILE": 64,
    "NPROC": 16,  # processes and threads; of all that run as this user, where there is no namespace
}
WORK_BYTES = 64 << 20
START_SECONDS = 60
SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")
WORK, PROGRAM, CONFINE = "/sandbox", "/sandbox.py", "/sandbox-confine.py"  # in a room of its own
ROOM = "/sandbox-room"  # bubblewrap's second room, inside the first
PROBE = """
import os, socket
def refused(action):
    try:
        action()
    except OSError:
        return True
assert refused(lambda: socket.create_connection(("127.0.0.1", {port}), 5)), "it reaches the network"
assert refused(lambda: open({file!r})), "it reads files that are none of its business"
assert refused(lambda: open({beside!r} + "/written", "w")), "it writes where it must not"
assert refused(lambda: os.chroot("/")), "it has the capabilities of root"
open("written", "w").close()
"""


class SandboxError(RunError):
    """A sandbox does not start: that says nothing about the program."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a program; `message` is the last line that it wrote on standard error, or its exit code."""

    result: Literal["passed", "failed", "timed out"]
    message: str = ""


@dataclass(frozen=True, slots=True)
class Sandbox:
    """
    Args:
        kind: `unshare` and `bwrap`: the program has namespaces of its own, no network, sees the system's and Python's
            files alone, read-only, and runs as nobody where this runs as root. `none`: it has limits and no more.
    """

    kind: Kind

    def run(self, program: str, timeout: float) -> Outcome:
        """Run a Python program to its end, or until `timeout` seconds after it began.

        Raises:
            SandboxError: it does not begin, twice.
        """
        try:
            return self.run_once(program, timeout)
        except SandboxError:
            return self.run_once(program, timeout)

    def run_once(self, program: str, timeout: float) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="lorasc-", ignore_cleanup_errors=True) as name:
            folder = Path(name).resolve()
            (folder / "room").mkdir()
            (folder / "program.py").write_text(program, encoding="utf-8")
            (folder / "program.py").chmod(0o444)
            with (folder / "stderr").open("w+b") as stderr:
                code = self.exit_code(folder, stderr.fileno(), timeout)
                stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - 4096))
                said = stderr.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "")
        if code == "no start":
            raise SandboxError(f"the sandbox {self.kind} does not start: {last or 'without a word'}")
        if code == "timed out":
            return Outcome("timed out", f"after {timeout:g} s")
        return Outcome("passed") if code == "passed" else Outcome("failed", last or f"exit code {code}")

    def exit_code(self, folder: Path, stderr: int, timeout: float) -> int | Literal["passed", "no start", "timed out"]:
        secret = secrets.token_bytes(32)
        receives, sends = os.pipe()
        try:
            os.write(sends, secret)
            os.close(sends)
            process = subprocess.Popen(
                self.command(folder, timeout),
                cwd=folder / "room",
                env=environment(str(folder / "room") if self.kind == "none" else WORK),
                stdin=receives,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
                bufsize=0,
            )
        finally:
            os.close(receives)
        assert process.stdout is not None
        try:
            begun = select.select([process.stdout], [], [], START_SECONDS)[0] and process.stdout.read(1)
            if not begun:
                return "no start"
            code = process.wait(timeout)
            os.set_blocking(process.stdout.fileno(), False)  # what the program left running may hold it open
            said = process.stdout.read(1 << 16) or b""
            return "passed" if code == 0 and secret in said else code
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()

    def command(self, folder: Path, timeout: float) -> list[str]:
        """The command that runs `program.py` of a folder."""
        root = os.geteuid() == 0
        program = str(folder / "program.py") if self.kind == "none" else PROGRAM
        settings = confine.Settings(
            command=[interpreter(), "-I", "-c", RUN, program],
            limits=LIMITS | {"CPU": ceil(timeout) + 1},
            user=stranger() if root and self.kind != "none" else None,
            room=str(folder / "room") if self.kind == "unshare" else None,
            root=ROOM if self.kind == "bwrap" and root else None,
            visible=visible(),
            files={PROGRAM: str(folder / "program.py")},
            work=WORK,
            work_bytes=WORK_BYTES,
        )
        file = CONFINE if self.kind == "bwrap" else confine.__file__
        confined = [interpreter(), "-I", "-S", file, settings.to_json()]
        match self.kind:
            case "unshare":
                user = [] if root else ["--user", "--map-root-user"]
                spaces = ["--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
                orphaned = [installed("setpriv"), "--pdeathsig", "KILL"]  # ends with this process, as bwrap does
                return [*orphaned, installed("unshare"), *user, *spaces, *confined]
            case "bwrap":
                needed = ("CAP_SETUID", "CAP_SETGID", "CAP_SYS_CHROOT")
                user = [word for name in needed for word in ("--cap-add", name)] if root else shut_user()
                spaces = ["--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--die-with-parent"]
                return [installed("bwrap"), *user, *spaces, *furniture(settings), *confined]
            case "none":
                return confined


@cache
def shut_user() -> list[str]:
    """A user namespace, and no other inside it where bubblewrap is 0.8 or later."""
    known = subprocess.run([installed("bwrap"), "--help"], capture_output=True, text=True).stdout
    return ["--unshare-user", *(["--disable-userns"] if "--disable-userns" in known else [])]


def furniture(settings: confine.Settings) -> list[str]:
    """The room of `confine.furnish` in bubblewrap's words; with `settings.root` a second one, which is moved into."""
    words = []
    for room in ("", settings.root) if settings.root else ("",):
        parents = dict.fromkeys(str(parent) for path in settings.visible for parent in reversed(Path(path).parents))
        for parent in [room, *(room + parent for parent in parents if parent != "/")]:
            words += ["--perms", "0755", "--dir", parent] if parent else []
        for path in settings.visible:
            if os.path.islink(path):
                words += ["--symlink", os.readlink(path), room + path]
            else:
                words += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, room + path]
        for path, source in settings.files.items():
            words += ["--ro-bind", source, room + path]
        words += ["--perms", "1777", "--size", str(settings.work_bytes), "--tmpfs", room + settings.work]
    return [*words, "--ro-bind", confine.__file__, CONFINE, "--remount-ro", "/", "--chdir", settings.work]


def environment(home: str) -> dict[str, str]:
    """Nothing of the user's: there may be keys among it."""
    own = {"PATH": "/usr/bin:/bin", "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    libraries = os.environ.get("LD_LIBRARY_PATH")  # without it some Pythons do not start
    return own | ({"LD_LIBRARY_PATH": libraries} if libraries else {})


def interpreter() -> str:
    """This environment's Python; the one beneath it, where others may not enter: inside, a program is nobody."""
    open_to_all = os.stat(sys.prefix).st_mode & 0o005 == 0o005
    return sys.executable if open_to_all else os.path.realpath(sys.executable)


def visible() -> list[str]:
    """The system's and Python's files and folders, none inside another."""
    prefixes = {sys.prefix, sys.base_prefix}
    wanted = {*SYSTEM, *prefixes, *map(os.path.realpath, prefixes)}
    found = sorted(path for path in wanted if os.path.exists(path))
    return [path for path in found if not any(path.startswith(f"{other.rstrip('/')}/") for other in found)]


def stranger() -> int:
    """A user whom nobody is, another one for every process: the processes of a user are counted together."""
    return 60706 + os.getpid() % 478  # systemd leaves 60706 to 61183 to nobody


def installed(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise SandboxError(f"{name} is not installed")
    return path


def check(sandbox: Sandbox) -> None:
    """Run a program that tries what it must not be able to do, or with `none` one that does nothing.

    Raises:
        SandboxError: it can, or does not run at all.
    """
    with tempfile.TemporaryDirectory(prefix="lorasc-") as folder, socket.create_server(("127.0.0.1", 0)) as server:
        os.chmod(folder, 0o777)
        file = Path(folder, "file")
        file.touch(0o666)
        probe = PROBE.format(port=server.getsockname()[1], file=str(file), beside=folder)
        outcome = sandbox.run("" if sandbox.kind == "none" else probe, timeout=20)
    if outcome.result != "passed":
        raise SandboxError(f"a trial program {outcome.result}: {outcome.message}")


def choose(kind: Literal["auto"] | Kind) -> Sandbox:
    """A sandbox that has been tried; `auto`: the first that holds, never `none`.

    Raises:
        ConfigError: it does not work here.
    """
    kinds: list[Kind] = ["unshare", "bwrap"] if kind == "auto" else [kind]
    reasons = []
    for one in kinds:
        try:
            check(Sandbox(one))
        except SandboxError as error:
            reasons.append(f"{one}: {error}")
        else:
            return Sandbox(one)
    raise ConfigError(
        f"task.sandbox is {kind!r}, and programs cannot be shut in here ({'; '.join(reasons)}): allow user namespaces,"
        " install bubblewrap, or give --sandbox none (programs then run as you, with your files and network)"
    )
