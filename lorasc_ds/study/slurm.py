"""The runs of a study as Slurm arrays of `launch/slurm/train.sbatch`: task N of an array is run N of its folder."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path

from lorasc_ds.algorithm.files import write_atomically
from lorasc_ds.errors import ConfigError
from lorasc_ds.study.worker import Job, read_job

SCRIPT = Path("launch/slurm/train.sbatch")
LONGEST_ARRAY = 1000  # of Slurm's default MaxArraySize
ARRAY_ID = "array_id"  # the file of a folder that says what Slurm calls the array


def submit(jobs: Sequence[Job], output_dir: Path, flags: Sequence[str]) -> str:
    """Queue the runs that are not in the queue yet. Returns what to tell.

    Raises:
        ConfigError: a command of Slurm's is not here, or refuses.
    """
    if not SCRIPT.exists():
        raise ConfigError(f"--slurm: there is no {SCRIPT} here: call it in the repository root")
    told, queued = [], queued_in(output_dir)
    if found := [queued[directory] for job in jobs if (directory := job.directory.absolute()) in queued]:
        told.append(f"left out {len(found)} runs that are queued or running as array {', '.join(sorted({*found}))}")
        jobs = [job for job in jobs if job.directory.absolute() not in queued]
    for part in range(0, len(jobs), LONGEST_ARRAY):
        chosen = jobs[part : part + LONGEST_ARRAY]
        folder = write(chosen, output_dir)
        ours = [f"--array=0-{len(chosen) - 1}", f"--output={folder}/%a.log", f"--export=ALL,STUDY_RUNS={folder}"]
        array = said_by("sbatch", "--parsable", *flags, *ours, str(SCRIPT)).split(";")[0].strip()  # ID or ID;CLUSTER
        write_atomically(folder / ARRAY_ID, array.encode())
        told.append(f"submitted {len(chosen)} runs as array {array}, logs in {folder}")
    end = "when they have ended, the same command with --collect in place of --slurm makes the tables"
    return "\n".join([*told, end if jobs else "nothing is left to submit"])


def queued_in(output_dir: Path) -> dict[Path, str]:
    """The directories of the runs that Slurm has still to do, or is doing, each with its array."""
    folders = {file.read_text(): file.parent for file in output_dir.absolute().glob(f"slurm/*/{ARRAY_ID}")}
    if not folders:
        return {}
    tasks = [line.split() for line in said_by("squeue", "--noheader", "--array", "--format=%F %K").splitlines()]
    return {read_job(folders[array] / f"{task}.json").directory: array for array, task in tasks if array in folders}


def said_by(*command: str) -> str:
    """
    Raises:
        ConfigError: the command is not here, or refuses.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise ConfigError(f"--slurm: there is no {command[0]} here: call it where jobs are submitted") from None
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"--slurm: {command[0]} refuses: {' '.join(error.stderr.split())}") from None


def write(jobs: Sequence[Job], output_dir: Path) -> Path:
    """A new folder with a file for every run."""
    folder = next(path for n in count(1) if not (path := output_dir.absolute() / "slurm" / f"{n:03d}").exists())
    folder.mkdir(parents=True)
    (output_dir / "runs").mkdir(exist_ok=True)
    for number, job in enumerate(jobs):
        content = asdict(job) | {"directory": str(job.directory.absolute()), "recipe": str(job.recipe.absolute())}
        write_atomically(folder / f"{number}.json", json.dumps(content).encode())
    return folder
