"""The run directory: whether it may be used, and the files that say what the run was and how it ended."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock, Timeout

from lorasc_ds.algorithm.files import current_umask, write_atomically
from lorasc_ds.config import Config
from lorasc_ds.errors import CheckpointError, ConfigError
from lorasc_ds.recipes import RecipeLoader, to_yaml

PACKAGES = (
    "lorasc_ds", "torch", "accelerate", "transformers", "peft", "safetensors", "tokenizers", "numpy", "scikit-learn",
    "scipy", "pillow", "pydantic", "tensorboard", "deepspeed",
)  # fmt: skip
OTHERS = {"STOP", ".lock", ".owner"}  # no run, when there is nothing else
TEMPORARY = ".tmp-"
ORIGIN = "forked_from.json"
State = Literal["running", "preempted", "done", "failed"]
SECRETS = re.compile("TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def check_usable(directory: Path, resume: str | Path) -> None:
    """Whether a run may begin or go on in the directory, as far as names tell.

    Raises:
        ConfigError: it holds something else, must be empty and is not, or cannot be written.
        CheckpointError: there is nothing to go on with, where there has to be.
    """
    remedy = "choose another --output_dir or remove it"
    try:
        # STOP may have come before the run: a job script turns a signal into it
        names = {path.name for path in directory.iterdir()} if directory.exists() else set()
    except OSError as error:
        raise ConfigError(f"--output_dir {directory}: {error.strerror}; {remedy}") from error
    present = sorted(name for name in names - OTHERS if not name.startswith(TEMPORARY))
    if not present:
        parent = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise ConfigError(f"--output_dir {directory}: {parent} cannot be written; choose another --output_dir")
        if resume == "must":
            raise CheckpointError(f"--resume must: {directory} holds no run to go on with; give --resume auto to begin")
    elif resume == "never":
        raise ConfigError(f"--output_dir {directory} is not empty and --resume is never: {remedy}")
    elif not {"config.yaml", "checkpoints", ORIGIN} & set(present):
        raise ConfigError(
            f"--output_dir {directory} holds something that is no run ({', '.join(present[:3])}): {remedy}"
        )


def settings_of(directory: Path) -> dict[str, Any]:
    """The flattened configuration of the run in `directory`.

    Raises:
        CheckpointError: `config.yaml` cannot be read.
    """
    try:
        return flatten(yaml.load((directory / "config.yaml").read_text(), RecipeLoader))
    except (OSError, yaml.YAMLError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{directory / 'config.yaml'} cannot be read ({type(error).__name__}), and there is no checkpoint: choose"
            " another --output_dir or remove it"
        ) from error


def finished_summary(directory: Path) -> dict[str, Any] | None:
    """The summary of the run in `directory`, if it is finished.

    Raises:
        CheckpointError: it is, and its summary cannot be read.
    """
    if state_of(directory) != "done":
        return None
    try:
        return json.loads((directory / "summary.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory / 'summary.json'} of a finished run cannot be read ({type(error).__name__}): where there are"
            f" checkpoints, remove {directory / 'status.json'}, and the same command writes it again"
        ) from error


def status_of(directory: Path) -> dict[str, Any]:
    """What `status.json` says; nothing where it is missing or damaged."""
    try:
        status = json.loads((directory / "status.json").read_text())
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def state_of(directory: Path) -> str | None:
    """The state in `status.json`; None where it is missing or damaged."""
    return status_of(directory).get("state")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Inside, no other run uses the directory. The lock ends with the process, whatever ends it.

    Raises:
        ConfigError: another run does; the message says which; or the directory cannot be written.
    """
    owner = directory / ".owner"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / ".lock", mode=0o666 & ~current_umask())
        lock.acquire(timeout=0)
        write_atomically(owner, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except Timeout:
        who = owner.read_text() if owner.exists() else "another process"
        raise ConfigError(
            f"--output_dir {directory} is in use by {who}: wait for it, stop it, or choose another --output_dir"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"--output_dir {directory}: {error.strerror}; choose a directory that can be written"
        ) from error
    with lock:
        yield


def origin_of(directory: Path) -> Path | None:
    """The checkpoint of another run that the run in `directory` went on from."""
    try:
        return Path(json.loads((directory / ORIGIN).read_text())["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_origin(directory: Path, checkpoint: Path) -> None:
    write_json(directory / ORIGIN, {"checkpoint": str(checkpoint.resolve())})


def clear(directory: Path) -> None:
    """Remove what a run that begins again has written; closed experts are put aside."""
    if any((directory / "ledger").glob("expert_*")):
        aside = next(path for n in count(1) if not (path := directory / "discarded" / f"ledger-{n:03d}").exists())
        aside.parent.mkdir(exist_ok=True)
        (directory / "ledger").rename(aside)
    for name in ("checkpoints", "ledger", "model", "tensorboard"):
        shutil.rmtree(directory / name, ignore_errors=True)
    for name in ("metrics.jsonl", "examples.json", "summary.json", "status.json"):
        (directory / name).unlink(missing_ok=True)


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, with `-dirty` after changes; None outside of one.

    Published results of studies are no changes: a study writes them where they are committed, and reads none.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        places = [":(top)", ":(top,exclude)launch/studies/results"]
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *places], capture_output=True, check=False)
        return head + ("-dirty" if changed.returncode else "")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def processor() -> str:
    """The CPU's name, and what torch uses of it."""
    import torch

    file = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", file.read_text() if file.exists() else "", re.MULTILINE)
    return f"{found[1] if found else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def environment() -> dict[str, Any]:
    """What the run is computed by: command, commit, machine, versions. With all of them, its bits are the same."""
    import torch

    return {
        "command": [redacted(argument) for argument in sys.argv],
        "commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def begin(directory: Path, config: Config) -> None:
    """Write `config.yaml` and `environment.json`.

    Raises:
        ConfigError: they cannot be written.
    """
    now = environment()
    version, commit = now["packages"]["lorasc_ds"], now["commit"]
    head = f"# lorasc_ds {version}, commit {commit}; all versions in environment.json\n"
    try:
        for rest in directory.glob(f"{TEMPORARY}*"):  # of a process that was killed as it wrote
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
        # The settings first: by them a directory is known as a run's.
        write_atomically(directory / "config.yaml", (head + to_yaml(config)).encode())
        write_json(directory / "environment.json", now)
    except OSError as error:
        raise ConfigError(
            f"--output_dir {directory}: {error.strerror}; choose a directory that can be written"
        ) from error


def redacted(text: str) -> str:
    """The text without the values of environment variables that are called like secrets."""
    for name, value in os.environ.items():
        if SECRETS.search(name) and len(value) >= 8:
            text = text.replace(value, f"<{name}>")
    return text


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a record of the run; secrets of the environment do not get into it."""
    write_atomically(path, (redacted(json.dumps(content, indent=2, ensure_ascii=False)) + "\n").encode())


def write_status(directory: Path, state: State, step: int, expert: int, message: str, exit_code: int | None) -> None:
    """`status.json`, which a script reads instead of the exit code that a launcher may change; null while it runs."""
    status = {"state": state, "step": step, "expert": expert, "message": message, "exit_code": exit_code}
    write_json(directory / "status.json", status)
