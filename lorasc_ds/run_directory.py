"""The run directory: whether it may be used, and the files that say what the run was and how it ended."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import yaml

from lorasc_ds.algorithm.files import write_atomically
from lorasc_ds.cli import RecipeLoader, to_yaml
from lorasc_ds.config import Config
from lorasc_ds.errors import ConfigError

PACKAGES = (
    "lorasc_ds", "torch", "accelerate", "transformers", "peft", "safetensors", "tokenizers", "numpy", "scikit-learn",
    "pydantic", "tensorboard",
)  # fmt: skip
State = Literal["running", "done", "failed"]


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def finished_summary(directory: Path, config: Config, resume: str) -> dict[str, Any] | None:
    """The summary of a finished run of this very configuration, or None where a run may begin.

    Raises:
        ConfigError: the directory holds something else, or cannot be written.
    """
    remedy = "choose another --output_dir or remove it"
    try:
        # STOP may have come before the run: a job script turns a signal into it
        present = sorted(path.name for path in directory.iterdir() if path.name != "STOP") if directory.exists() else []
    except OSError as error:
        raise ConfigError(f"--output_dir {directory}: {error.strerror}; {remedy}") from error
    if not present:
        parent = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise ConfigError(f"--output_dir {directory}: {parent} cannot be written; choose another --output_dir")
        return None
    if resume == "never":
        raise ConfigError(f"--output_dir {directory} is not empty and --resume is never: {remedy}")
    try:
        before = yaml.load((directory / "config.yaml").read_text(), RecipeLoader)
        state = json.loads((directory / "status.json").read_text())["state"]
        old = flatten(before)
    except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"--output_dir {directory} holds something that is no run ({', '.join(present[:3])}): {remedy}"
        ) from None
    new = flatten(config.model_dump(mode="json"))
    changed = [f"{key} {old.get(key)} -> {new.get(key)}" for key in sorted(old | new) if old.get(key) != new.get(key)]
    if changed:
        raise ConfigError(
            f"--output_dir {directory} holds a run of another configuration ({', '.join(changed)}): {remedy}"
        )
    if state != "done":
        raise ConfigError(
            f"--output_dir {directory} holds an unfinished run (state {state}), and this version keeps no checkpoints"
            f" to continue from: {remedy}"
        )
    try:
        return json.loads((directory / "summary.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--output_dir {directory} holds a finished run without a readable summary.json: {remedy}"
        ) from error


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, with `-dirty` after changes; None outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def begin(directory: Path, config: Config) -> None:
    """Make the directory and write `config.yaml` and `environment.json`.

    Raises:
        ConfigError: it cannot be written.
    """
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    environment = {
        "command": sys.argv,
        "commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
    }
    head = f"# lorasc_ds {versions['lorasc_ds']}, commit {environment['commit']}; all versions in environment.json\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "environment.json", environment)
        write_atomically(directory / "config.yaml", (head + to_yaml(config)).encode())
    except OSError as error:
        raise ConfigError(
            f"--output_dir {directory}: {error.strerror}; choose a directory that can be written"
        ) from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_status(directory: Path, state: State, step: int, expert: int, message: str, exit_code: int | None) -> None:
    """`status.json`, which a script reads instead of the exit code that a launcher may change; null while it runs."""
    status = {"state": state, "step": step, "expert": expert, "message": message, "exit_code": exit_code}
    write_json(directory / "status.json", status)
