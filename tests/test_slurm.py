"""launch/slurm/train.sbatch on a real Slurm cluster of two nodes, which `slurm_cluster` runs on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from slurm_cluster import NODES, PATH, Cluster, missing_programs

from lorasc_ds.errors import ConfigError
from lorasc_ds.study import slurm
from lorasc_ds.study.worker import Job, read_job

pytestmark = pytest.mark.timeout(600)  # the waits have limits of their own

SCRIPT = "launch/slurm/train.sbatch"
BIN = Path(sys.executable).parent

# Instead of launch/train.py: writes down how it was started; then waits for STOP, unless --now or started again.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

directory = Path(sys.argv[sys.argv.index("--output_dir") + 1])
rank = os.environ["RANK"]

def write(name, content):
    (directory / f"{rank}.new").write_text(json.dumps(content))
    (directory / f"{rank}.new").rename(directory / name)

def end(state, code):
    if rank == "0":
        write("status.json", {"state": state})
    sys.exit(code)

if "--fail" in sys.argv:
    sys.exit(2)
signal.signal(signal.SIGTERM, lambda *_: end("preempted", 75))
directory.mkdir(parents=True, exist_ok=True)
write(f"rank{rank}.json", {"arguments": sys.argv[1:], "environment": dict(os.environ)})
if "--now" in sys.argv or os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
    end("done", 0)
while not (directory / "STOP").exists():
    time.sleep(0.05)
end("preempted", 75)
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Skips where Slurm is not installed, unless LORASC_REQUIRE_SLURM=1 says that it has to be."""
    if missing := missing_programs():
        reason = f"not installed, so no Slurm cluster can run: {', '.join(missing)} (.ci/install-slurm installs them)"
        if os.environ.get("LORASC_REQUIRE_SLURM") == "1":
            pytest.fail(f"LORASC_REQUIRE_SLURM is 1, but {reason}")
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository root with the script, the stand-in, and a virtual environment `venv` that tells its activation."""
    (tmp_path / SCRIPT).parent.mkdir(parents=True)
    shutil.copy(ROOT / SCRIPT, tmp_path / SCRIPT)
    (tmp_path / "launch" / "train.py").write_text(STAND_IN)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text(f'export PATH="{BIN}:$PATH" ACTIVATED=yes\n')
    return tmp_path


def submit(cluster: Cluster, checkout: Path, *arguments: str) -> str:
    """The id of the job. Options of sbatch come before `SCRIPT`, those of train.py after it."""
    return cluster.run("sbatch", "--parsable", *arguments, cwd=checkout, VENV="venv")


def steps_of(run: Path) -> list[int]:
    """Those that `metrics.jsonl` holds."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return [record["step"] for record in map(json.loads, lines) if record["event"] == "step"]


def test_two_nodes_train_the_quickstart_and_go_on_after_a_requeue(cluster: Cluster, tmp_path: Path) -> None:
    """The real command, warned as Slurm warns before a time limit; every step is taken once."""
    log, run = tmp_path / "log", tmp_path / "run"
    job = cluster.run(
        "sbatch", "--parsable", "--nodes=2", f"--output={log}", SCRIPT, "--output_dir", str(run),
        "--training.epochs", "60", "--cascade.experts", "4", "--training.evaluate", "end",
        "--tracking.tensorboard", "false", "--tracking.log_steps", "1",
        "--task.train_examples", "12", "--task.dev_examples", "8", "--task.test_examples", "10",
        cwd=ROOT, PATH=f"{BIN}:{PATH}", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1",
    )  # fmt: skip

    cluster.wait("ten steps", lambda: len(steps_of(run)) >= 10, seconds=100)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    ended = cluster.finish(job, seconds=150)
    text = log.read_text()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), text
    assert (
        text.index("asked the run to stop") < text.index("status.json says preempted") < text.index("restart 1 (SLURM")
    )
    assert "resume    resuming  after step " in text
    assert json.loads((run / "summary.json").read_text())["world_size"] == 2
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert steps_of(run) == list(range(1, 181))


def test_a_study_is_completed_as_an_array_of_two_node_runs(cluster: Cluster, tmp_path: Path) -> None:
    """Submitted once, trained, measured, collected; what failed in training or after it is shown with its reason."""
    study = {
        "title": "By Slurm",
        "recipe": str(ROOT / "launch" / "recipes" / "quickstart.yaml"),
        "set": {"task.train_examples": 12, "task.dev_examples": 8, "task.test_examples": 10, "training.epochs": 2,
                "training.evaluate": "end", "training.save_model": False, "tracking.tensorboard": False},
        "tasks": {"mirrored": {}},
        "strategies": {
            "LoRASC": {},
            "diverges": {"set": {"cascade.max_boundary_drift": 1e-12}},
            "is not scored": {"set": {"model.dtype": "bfloat16"}},
            "is killed": {"set": {"training.epochs": 1000}},
        },
        "scores": {"new": "new_domain/accuracy", "rotated": "digits/new_domain/accuracy", "rank": "ledger/bound"},
        "evaluate": {"tasks": "digits", "digits.domain": "rotated", "digits.test_examples": 4, "splits": "new_domain",
                     "dtype": "float32"},
        "inspect": True,
        "seeds": [0],
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    command = [sys.executable, "launch/study.py", str(tmp_path / "study.yaml"), "--output_dir", str(tmp_path / "out")]
    variables = {"PATH": f"{BIN}:{PATH}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    held = "--slurm=--nodes=2 --hold --comment='by a study'"
    said = cluster.run(*command, held, cwd=ROOT, **variables)
    (job,) = re.findall(r"submitted 4 runs as array (\d+), ", said)
    assert cluster.run("squeue", "--noheader", "--format=%k", f"--jobs={job}") == "by a study"
    said = cluster.run(*command, held, cwd=ROOT, **variables)
    assert f"left out 4 runs that are queued or running as array {job}\nnothing is left to submit" in said

    cluster.run("scontrol", "release", job)
    jobs = [read_job(file) for file in (tmp_path / "out" / "slurm").glob("*/*.json")]
    (long,) = [job.directory for job in jobs if "--training.epochs=1000" in job.train]
    cluster.wait("steps of the run that is killed", lambda: steps_of(long), seconds=200)
    os.kill(int((long / ".owner").read_text().split()[1]), signal.SIGKILL)
    cluster.wait("the end of the runs", lambda: not cluster.run("squeue", "--noheader"), seconds=200)
    ended = subprocess.run([*command, "--collect"], cwd=ROOT, env=cluster.environment | variables, check=False)
    assert ended.returncode == 1, "three runs failed"
    logs = [file.read_text() for file in sorted((tmp_path / "out" / "slurm").glob("*/*.log"))]
    done, *failed = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert (done["state"], done["facts"]["world_size"], done["scores"]["ledger/bound"]) == ("done", 2, 16.0), logs
    assert [(line["state"], line["exit_code"]) for line in failed] == [("failed", code) for code in (3, 2, 1)], logs
    reasons = [line["message"] for line in failed]
    assert re.match("error: rank [01]: expert 1: .* more than cascade.max_boundary_drift 1e-12", reasons[0]), logs
    assert re.match("error: --dtype float32: the weights of .* are bfloat16", reasons[1]), logs
    assert re.match(r"Signal 9 \(SIGKILL\) received by PID", reasons[2]), logs

    said = cluster.run(*command, held, cwd=ROOT, **variables)  # what diverged would do so again
    (job,) = re.findall(r"submitted 2 runs as array (\d+), ", said)
    cluster.run("scancel", job)


def install(folder: Path, programs: dict[str, str]) -> None:
    """Shell scripts in place of Slurm's programs."""
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)


def test_of_an_array_only_what_has_left_the_queue_is_submitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{PATH}")
    jobs = [Job(tmp_path / "runs" / str(n), tmp_path / "recipe.yaml", (), None, inspect=False) for n in range(3)]
    install(tmp_path / "bin", {"sbatch": "echo '12;cluster'", "squeue": "exit 1"})
    assert slurm.submit(jobs, tmp_path, []).startswith("submitted 3 runs as array 12, ")
    install(tmp_path / "bin", {"sbatch": "echo 13", "squeue": "echo '12 0'; echo '12 2'; echo '11 1'; echo '10 N/A'"})
    left_out, submitted, _ = slurm.submit(jobs, tmp_path, []).splitlines()
    assert left_out == "left out 2 runs that are queued or running as array 12"
    assert submitted.startswith("submitted 1 runs as array 13, ")
    assert read_job(tmp_path / "slurm" / "002" / "0.json") == jobs[1]
    install(tmp_path / "bin", {"squeue": "echo no controller >&2; exit 1"})
    with pytest.raises(ConfigError, match=r"^--slurm: squeue refuses: no controller$"):
        slurm.submit(jobs, tmp_path, [])


@pytest.mark.parametrize(
    ("training", "measuring", "told"),
    [
        ("status done 0", "", (0, "")),
        ("echo 'error: task.domain is 1'; exit 1", "", (1, "error: task.domain is 1")),
        ("status failed 3; echo 'error: the loss is nan'; exit 1", "", (3, "error: the loss is nan")),
        ("status failed 1; echo '  ChildFailedError'; exit 1", "", (1, "ValueError: what the run says")),
        ("status running null; echo '  traceback : Signal 9 (SIGKILL) received by PID 36'; exit 1", "",
         (1, "Signal 9 (SIGKILL) received by PID 36")),
        ("status running null; echo 'slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.'; exit 1", "",
         (1, "Detected 1 oom_kill event in StepId=7.0.")),
        ("status preempted 75; exit 1", "", None),
        ("status running null; kill -TERM $PPID; sleep 5", "", None),
        ("status done 0", "exit 137", (-9, "ended by SIGKILL")),
        ("status done 0", "echo KeyError; echo 'srun: error: task 0: Exited with exit code 1'; exit 1", (1, "KeyError")),
        ("status done 0", "kill -TERM $PPID; sleep 5", None),
        ("status done 0", "kill -USR1 $PPID; echo DUE TO TIME LIMIT; sleep 0.5; kill -TERM $PPID; sleep 5", (124, "DUE TO TIME LIMIT")),
    ],
)  # fmt: skip
def test_a_run_of_a_study_tells_its_end_unless_it_was_asked_to_stop(
    tmp_path: Path, training: str, measuring: str, told: tuple[int, str] | None
) -> None:
    """What srun does and says is made up: the training's part and what is measured after it."""
    job = Job(tmp_path / "runs" / "one", tmp_path / "recipe.yaml", (), None, inspect=True)
    job.directory.mkdir(parents=True)
    job.log.write_text("error: of an attempt on this machine")
    folder = slurm.write([job], tmp_path)
    status = '{"state": "%s", "exit_code": %s, "message": "ValueError: what the run says"}'
    programs = {
        "scontrol": 'echo "scontrol $1"',
        "srun": f"""status() {{ printf '{status}' "$1" "$2" >{job.directory}/status.json; }}
            case "$*" in *lorasc_ds.study.worker*) {measuring or ":"} ;; *) {training} ;; esac""",
    }
    install(tmp_path / "bin", programs)
    variables = {"PATH": f"{tmp_path / 'bin'}:{BIN}:{PATH}", "STUDY_RUNS": str(folder), "SLURM_JOB_NODELIST": ""}
    variables |= {
        "SLURM_JOB_ID": "7",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "0",
        "SLURM_JOB_NUM_NODES": "1",
    }
    with (folder / "0.log").open("w") as log:
        subprocess.run(["bash", SCRIPT], cwd=ROOT, env=os.environ | variables, stdout=log, stderr=log, check=False)
    end = job.directory.with_suffix(".json")
    said = (folder / "0.log").read_text()
    assert ("scontrol requeue" in said) == ("preempted" in training), said
    assert end.exists() == (told is not None), said
    if told is not None:
        content = json.loads(end.read_text())
        assert (content["exit_code"], content["message"]) == told, said
        assert 0 <= content["seconds"] < 60


def test_every_gpu_of_every_node_gets_a_process_that_knows_its_place(cluster: Cluster, checkout: Path) -> None:
    job = submit(
        cluster,
        checkout,
        "--nodes=2",
        "--gpus-per-node=2",
        SCRIPT,
        "--now",
        "--output_dir=a run",
        "--text",
        "two words",
    )
    assert cluster.finish(job)["JobState"] == "COMPLETED", (checkout / f"slurm-{job}.out").read_text()
    starts = [json.loads((checkout / "a run" / f"rank{rank}.json").read_text()) for rank in range(4)]
    environments = [start["environment"] for start in starts]
    assert [environment["SLURMD_NODENAME"] for environment in environments] == [NODES[0]] * 2 + [NODES[1]] * 2
    assert [environment["LOCAL_RANK"] for environment in environments] == ["0", "1"] * 2
    for start, environment in zip(starts, environments, strict=True):
        assert start["arguments"] == ["--now", "--text", "two words", "--output_dir", "a run"]
        assert (environment["WORLD_SIZE"], environment["MASTER_ADDR"]) == ("4", NODES[0])
        assert environment["ACTIVATED"] == "yes"
        assert environment["MASTER_PORT"] == environments[0]["MASTER_PORT"]


def test_array_tasks_are_seeds_each_requeued_by_itself_and_not_after_scancel(cluster: Cluster, checkout: Path) -> None:
    job = submit(cluster, checkout, "--array=3-4", SCRIPT, "--output_dir", "runs")
    for seed in ("3", "4"):
        cluster.wait(f"start of seed {seed}", (checkout / "runs" / f"seed-{seed}" / "rank0.json").exists, seconds=60)
        start = json.loads((checkout / "runs" / f"seed-{seed}" / "rank0.json").read_text())
        assert start["arguments"] == ["--training.seed", seed, "--output_dir", f"runs/seed-{seed}"]
        assert start["environment"]["WORLD_SIZE"] == "1"

    # The job id of the last task is also that of the array: requeued by it, the other task would start again too.
    assert cluster.job(f"{job}_4")["JobId"] == job
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_4")
    ended = cluster.finish(f"{job}_4")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    log = (checkout / f"slurm-{job}_4.out").read_text()
    assert log.index("restart 0 (SLURM_RESTART_COUNT)") < log.index("asked the run to stop")
    assert log.index("status.json says preempted") < log.index("restart 1 (SLURM_RESTART_COUNT)")
    assert json.loads((checkout / "runs" / "seed-4" / "status.json").read_text()) == {"state": "done"}
    assert not (checkout / "runs" / "seed-4" / "STOP").exists()

    other = cluster.job(f"{job}_3")
    assert (other["JobState"], other["Restarts"]) == ("RUNNING", "0")
    cluster.run("scancel", f"{job}_3")
    ended = cluster.finish(f"{job}_3")
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")


def test_a_failure_is_the_jobs_and_an_older_status_does_not_requeue_it(cluster: Cluster, checkout: Path) -> None:
    status = checkout / "run" / "status.json"
    status.parent.mkdir()
    status.write_text('{"state": "preempted"}')
    ended = cluster.finish(submit(cluster, checkout, SCRIPT, "--fail", "--output_dir", "run"))
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "0")  # torchrun's code is 1


@pytest.mark.parametrize("arguments", [["--config", "recipe.yaml"], ["--output_dir"], ["--output_dir="]])
def test_without_an_output_dir_it_says_so(arguments: list[str]) -> None:
    result = subprocess.run(["bash", ROOT / SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --output_dir is missing")
    assert result.stderr.count("\n") == 1


def test_outside_the_repository_root_it_says_so(tmp_path: Path) -> None:
    command = ["bash", ROOT / SCRIPT, "--output_dir", "run"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: there is no launch/train.py in {tmp_path}: call sbatch in the repository root\n"
