"""Programs in a sandbox: they run to their end or not, and reach nothing of what stands around them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorasc_ds import confine, sandbox
from lorasc_ds.errors import ConfigError
from lorasc_ds.sandbox import Outcome, Sandbox, SandboxError, choose

ROOT = Path(__file__).parents[1]
REPORT = "import json, os, socket, sys\ndef report(value): sys.exit(json.dumps(value))\n"


TRIALS = {
    "unshare": [
        "unshare",
        *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]),
        "--mount",
        "--net",
        "--pid",
        "--fork",
        "true",
    ],
    "bwrap": ["bwrap", "--unshare-net", "--ro-bind", "/", "/", "true"],
    "none": ["true"],
}


def working(kind: sandbox.Kind) -> Sandbox:
    if not shutil.which(kind) and kind != "none":
        pytest.skip(f"{kind} is not installed")
    trial = subprocess.run(TRIALS[kind], capture_output=True, text=True)
    if trial.returncode:
        pytest.skip(f"no namespaces here: {trial.stderr}")
    return choose(kind)


@pytest.fixture(scope="module", params=["unshare", "bwrap"])
def shut(request: pytest.FixtureRequest) -> Sandbox:
    """A sandbox that shuts programs in."""
    return working(request.param)


@pytest.fixture(scope="module", params=["unshare", "bwrap", "none"])
def box(request: pytest.FixtureRequest) -> Sandbox:
    return working(request.param)


def told(box: Sandbox, program: str, timeout: float = 10) -> object:
    """What a program reports."""
    return json.loads(box.run(REPORT + program, timeout).message)


def running(word: str) -> list[tuple[int, bytes]]:
    """Processes whose command line holds a word, and that line."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if word.encode() in command:
            found.append((int(folder.name), command))
    return found


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 100  # of a busy machine
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_a_program_passes_if_it_reaches_its_end_and_not_otherwise(box: Sandbox) -> None:
    whole = "assert __name__ != '__main__'\nprint('\N{SNOWMAN}'); open('\N{SNOWMAN}', 'w').write('\N{SNOWMAN}')"
    assert box.run(whole, 10) == Outcome("passed")
    assert box.run("assert sum([1, 2]) == 4, 'no sum'", 10) == Outcome("failed", "AssertionError: no sum")
    assert box.run("exit(0)", 10) == Outcome("failed", "exit code 0")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import os; os._exit(0)", "exit code 0"),
        ("import os; os._exit(64)", "exit code 64"),
        ("import os, time\nif os.fork(): os._exit(0)\ntime.sleep(60)", "exit code 0"),
        (
            "import os, sys; os.write(1, b'x' * 32); os.write(3, os.read(0, 64) or b'x' * 32); os._exit(0)",
            "exit code 0",
        ),
        (
            "import __main__, os; os.write(3, __main__.secret)",
            "AttributeError: module '__main__' has no attribute 'secret'",
        ),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("\0", "SyntaxError: source code string cannot contain null bytes"),
        ("input()", "EOFError: EOF when reading a line"),
        ("import sys\nwhile True: sys.stderr.write('x' * 99999)", "x" * 4096),
        ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
    ],
)
def test_other_ways_to_fail(program: str, message: str) -> None:
    assert Sandbox("none").run(program, 10) == Outcome("failed", message)


def test_the_umask_of_the_user_does_not_matter(shut: Sandbox) -> None:
    before = os.umask(0o077)
    try:
        assert (
            shut.run("import os, subprocess; subprocess.run(['/bin/true'], stdin=subprocess.DEVNULL)", 10).result
            == "passed"
        )
    finally:
        os.umask(before)


def test_the_clock_stops_it(box: Sandbox) -> None:
    begun = time.monotonic()
    assert box.run("while True: pass", 0.3) == Outcome("timed out", "after 0.3 s")
    assert time.monotonic() - begun < 10


def test_the_clock_begins_with_the_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A sandbox that is slow to start costs no program its pass."""
    slow = tmp_path / "slow.py"
    slow.write_text(Path(confine.__file__).read_text().replace("def main(", "__import__('time').sleep(1)\ndef main("))
    monkeypatch.setattr(confine, "__file__", str(slow))
    begun = time.monotonic()
    assert Sandbox("none").run("", 0.9) == Outcome("passed")
    assert time.monotonic() - begun > 1


def test_memory_and_files_have_limits(box: Sandbox) -> None:
    program = """
def refusal(action):
    try: action()
    except (MemoryError, OSError) as error: return repr(error)
def write(name, size):
    with open(name, 'wb') as file: file.write(bytes(size))
report([refusal(lambda: bytearray(8 << 30)), refusal(lambda: write('f', 32 << 20)), refusal(lambda: [write(str(i), 15 << 20) for i in range(5)])])
"""
    filled = None if box.kind == "none" else "OSError(28, 'No space left on device')"
    assert told(box, program) == ["MemoryError()", "OSError(27, 'File too large')", filled]


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """Stands in the command line of the programs of this test alone."""
    word = f"# {time.monotonic_ns()}"
    monkeypatch.setattr(sandbox, "RUN", f"{sandbox.RUN} {word}")
    return word


def test_processes_have_a_limit_and_end_with_the_program(shut: Sandbox, mark: str) -> None:
    count = "count = 0\ntry:\n while count < 99:\n  if not os.fork(): os.setsid(); __import__('time').sleep(60)\n  count += 1\n"
    assert told(shut, f"{count}except OSError: report(count)") in range(1, sandbox.LIMITS["NPROC"])
    assert until(lambda: not running(mark))
    bomb = "import os\nwhile True:\n try: os.fork(); os.setsid()\n except OSError: pass"
    assert shut.run(bomb, 0.5).result == "timed out"
    assert until(lambda: not running(mark))


def test_what_a_program_leaves_running_ends_with_it(box: Sandbox, mark: str) -> None:
    assert box.run("import os, time\nif not os.fork(): time.sleep(60)", 10) == Outcome("passed")
    assert until(lambda: not running(mark))


def test_the_program_ends_with_whoever_started_it(box: Sandbox, mark: str) -> None:
    program = f"from lorasc_ds import sandbox; sandbox.RUN += {mark!r}; sandbox.Sandbox({box.kind!r}).run('import time; time.sleep(600)', 600)"
    process = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert until(lambda: any(b"confine" not in command and pid != process.pid for pid, command in running(mark)))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert until(lambda: not running(mark))


def test_there_is_no_network(shut: Sandbox) -> None:
    """Nor through a socket by name, which lies in no folder."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(f"\0lorasc-test-{os.getpid()}")
        local.listen()
        program = f"""
def number(kind, address):
    with socket.socket(kind) as one: return one.connect_ex(address)
report([number(socket.AF_INET, {server.getsockname()!r}), number(socket.AF_UNIX, "\\0lorasc-test-{os.getpid()}")])
"""
        assert told(Sandbox("none"), program) == [0, 0]
        refused = [errno.ECONNREFUSED, errno.ENETUNREACH]
        assert all(code in refused for code in told(shut, program))  # type: ignore[attr-defined]


def test_nothing_of_the_user_is_seen(shut: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    places = [
        str(place) for place in (tmp_path, ROOT / "README.md", Path.home() / ".profile", "/etc/passwd", "/proc", "/sys")
    ]
    found = told(
        shut, f"report([list(os.environ), [p for p in {places} if os.path.exists(p)], os.listdir(), os.getpgid(0)])"
    )
    variables, *rest = found  # type: ignore[misc]
    assert set(variables) <= {"PATH", "HOME", "TMPDIR", "LANG", "OMP_NUM_THREADS", "LD_LIBRARY_PATH", "PWD"}
    assert rest == [[], [], 0]  # the group that would be killed is not of its world


def test_nothing_can_be_changed_but_in_the_work_folder(shut: Sandbox) -> None:
    """Files, mounts, users: no capability is left."""
    program = """
import ctypes
libc = ctypes.CDLL(None)
found = []
for place in ['/', '/usr', '/usr/lib', '/dev', '/etc', sys.prefix, sys.base_prefix, '/sandbox', os.environ['TMPDIR']]:
    try: open(place + '/written', 'w'); found.append(place)
    except OSError: pass
files = [os.access(file, os.W_OK) for file in ('/sandbox.py', sys.executable)]
calls = [libc.mount(b'x', b'/sandbox', b'tmpfs', 0, b''), libc.mount(b'', b'/', b'', 32 | 4096, b''), libc.umount2(b'/usr', 2), libc.chroot(b'/'), libc.sethostname(b'x', 1), libc.setuid(12345)]
report([found, files, calls, libc.prctl(39, 0, 0, 0, 0)])
"""
    assert told(shut, program) == [["/sandbox", "/sandbox"], [False, False], [-1] * 6, 1]  # 39: no new privileges


ENTERS = "__import__('ctypes').CDLL(None).unshare(0x10000000)"  # a user namespace, in which it would have capabilities


def test_no_user_namespace_can_be_entered(shut: Sandbox) -> None:
    assert told(shut, f"report({ENTERS})") == -1


@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder that every user can read."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="runs as another user, which only root can")
@pytest.mark.parametrize("kind", ["unshare", "bwrap"])
def test_a_user_without_rights_has_a_sandbox_too(kind: str, readable: Path) -> None:
    """As root the program becomes nobody; a user gets a user namespace instead."""
    if not shutil.which(kind) or not Path("/usr/bin/python3").exists():
        pytest.skip(f"needs {kind}, and a Python that every user can read")
    package = readable / "lorasc_ds"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("sandbox.py", "confine.py", "errors.py"):
        shutil.copy(ROOT / "lorasc_ds" / name, package)
    programs = [
        "pass",
        "1/0",
        "while True: __import__('os').fork()",
        "open('/x', 'w')",
        "__import__('os').chmod('/sandbox.py', 0)",
        f"exit(str({ENTERS}))",
    ]
    script = f"from lorasc_ds.sandbox import choose; box = choose({kind!r}); [print(box.run(program, 5)) for program in {programs}]"
    done = subprocess.run(["/usr/bin/python3", "-c", script], user=61184, group=61184, extra_groups=[], cwd="/", env={"PYTHONPATH": str(readable), "PATH": os.environ["PATH"]}, capture_output=True, text=True)  # fmt: skip
    if "not permitted" in done.stderr or "No permissions" in done.stderr:
        pytest.skip(done.stderr)
    found = [line.split("message=")[1] for line in done.stdout.splitlines()]
    assert found[:2] == ["'')", "'ZeroDivisionError: division by zero')"], done.stderr
    assert "Resource temporarily unavailable" in found[2]
    assert "Read-only file system" in found[3]
    assert "Read-only file system" in found[4]
    assert found[5] == "'-1')"


def test_a_sandbox_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """What shuts nothing in, or does not start, is refused in one line that names the way out."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        ConfigError,
        match=r"task\.sandbox is 'auto', .*unshare: setpriv is not installed; bwrap: bwrap is not installed.* --sandbox none \(programs then run as you, with your files and network\)$",
    ):
        choose("auto")
    assert choose("none") == Sandbox("none")
    with monkeypatch.context() as patch:
        command = Sandbox.command
        patch.setattr(Sandbox, "command", lambda self, *others: command(Sandbox("none"), *others))
        with pytest.raises(ConfigError, match=r"bwrap: a trial program failed: AssertionError: it reaches the network"):
            choose("bwrap")
    monkeypatch.setattr(sandbox, "LIMITS", {"AS": 1 << 20})
    with pytest.raises(ConfigError, match=r"none: .*"):
        choose("none")


def test_a_sandbox_that_no_longer_starts_is_no_failure_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "LIMITS", {"NO_SUCH": 1})
    with pytest.raises(SandboxError, match=r"does not start: AttributeError: .*RLIMIT_NO_SUCH"):
        Sandbox("none").run("", 5)


def test_a_sandbox_that_does_not_start_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    command, tries = Sandbox.command, []

    def fails_at_first(self: Sandbox, *others: Any) -> list[str]:
        tries.append(1)
        return command(self, *others) if len(tries) % 3 == 0 else ["false"]

    monkeypatch.setattr(Sandbox, "command", fails_at_first)
    with pytest.raises(SandboxError, match="the sandbox none does not start: without a word"):
        Sandbox("none").run("", 5)
    tries.pop()
    assert Sandbox("none").run("", 5) == Outcome("passed")
    assert len(tries) == 3


def test_auto_takes_the_first_that_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(one: Sandbox) -> None:
        if one.kind == "unshare":
            raise SandboxError("not here")

    monkeypatch.setattr(sandbox, "check", check)
    assert choose("auto") == Sandbox("bwrap")
