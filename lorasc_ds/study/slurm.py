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
from lorasc_ds.study.worker import Job

SCRIPT = Path("launch/slurm/train.sbatch")
LONGEST_ARRAY = 1000  # of Slurm's default MaxArraySize


def submit(jobs: Sequence[Job], output_dir: Path, flags: Sequence[str]) -> str:
    """Queue the runs. Returns what to tell.

    Raises:
        ConfigError: sbatch is not here, or refuses.
    """
    if not SCRIPT.exists():
        raise ConfigError(f"--slurm: there is no {SCRIPT} here: call it in the repository root")
    submitted = []
    for part in range(0, len(jobs), LONGEST_ARRAY):
        chosen = jobs[part : part + LONGEST_ARRAY]
        folder = write(chosen, output_dir)
        command = ["sbatch", "--parsable", f"--array=0-{len(chosen) - 1}", f"--output={folder}/%a.log", *flags]
        command += [f"--export=ALL,STUDY_RUNS={folder}", str(SCRIPT)]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=True)
        except FileNotFoundError:
            raise ConfigError("--slurm: there is no sbatch here: call it where jobs are submitted") from None
        except subprocess.CalledProcessError as error:
            raise ConfigError(f"--slurm: sbatch refuses: {' '.join(error.stderr.split())}") from None
        submitted.append(f"submitted {len(chosen)} runs as array {result.stdout.strip()}, logs in {folder}")
    end = "when they have ended, the same command with --collect in place of --slurm makes the tables"
    return "\n".join([*submitted, end if jobs else "nothing is left to submit"])


def write(jobs: Sequence[Job], output_dir: Path) -> Path:
    """A new folder with a file for every run."""
    folder = next(path for n in count(1) if not (path := output_dir.absolute() / "slurm" / f"{n:03d}").exists())
    folder.mkdir(parents=True)
    (output_dir / "runs").mkdir(exist_ok=True)
    for number, job in enumerate(jobs):
        content = asdict(job) | {"directory": str(job.directory.absolute()), "recipe": str(job.recipe.absolute())}
        write_atomically(folder / f"{number}.json", json.dumps(content).encode())
    return folder
