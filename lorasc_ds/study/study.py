"""Carries out a study: what is missing is run, here or by Slurm; then tables, figures and `results.jsonl`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lorasc_ds import run_directory
from lorasc_ds.algorithm.files import write_atomically
from lorasc_ds.errors import ConfigError, DataError
from lorasc_ds.memory import gpu_bytes
from lorasc_ds.robustness_report import Sheet, as_markdown, as_text
from lorasc_ds.study import figures, hparams, publishing, records, slurm
from lorasc_ds.study.agreement import disagreements
from lorasc_ds.study.estimate import estimate
from lorasc_ds.study.options import StudyOptions, evaluate_flags, evaluation_of
from lorasc_ds.study.overview import best_sheets, one_rate_sheets, stability_sheets
from lorasc_ds.study.plan import Run
from lorasc_ds.study.publishing import Published
from lorasc_ds.study.records import DIVERGED, Record
from lorasc_ds.study.results import Results, check_names, results_of
from lorasc_ds.study.tables import latex, sheets
from lorasc_ds.study.worker import Job
from lorasc_ds.study.worker import carry_out as run_jobs
from lorasc_ds.tasks import load_task


def carry_out(options: StudyOptions) -> int:
    """Do what the command line asks for. Returns 0, or 1 where runs failed or are not what they have to be.

    Raises:
        ConfigError: the directory cannot be used, Slurm refuses, or a score that is asked for does not exist.
        DataError: data cannot be read.
    """
    known = None if options.known is None else publishing.load(options.known, "--known")
    published = None if options.against is None else publishing.load(options.against, "--against")
    found = read(options, known)
    jobs = to_do(options, found)
    states = {one.run.digest: one.state for one in found}
    done = sum(state == "done" for state in states.values())
    print(f"study     {options.study.title}: {len(states)} runs, {done} done", flush=True)
    for one in found:
        check_names(options.study, one)
    if not options.collect:
        check_data(options, jobs)
    if options.dry_run:
        print("\n".join(estimate(options.study, found, gpu_bytes(options.gpu_memory), options.at_once)))
        return 0
    refuse_to_lose(options, found)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if options.slurm is not None:
        print(slurm.submit(jobs, options.output_dir, options.slurm))
        return 0
    if jobs and not options.collect:
        with run_directory.locked(options.output_dir):
            run_here(jobs, options)
        found = read(options, known)
    tell(options, found)
    wrong = [] if published is None else [*disagreements(published, found)]
    print("".join(f"differs   {line}\n" for line in wrong), end="")
    return int(bool(wrong) or any(one.state == "failed" for one in found))


def read(options: StudyOptions, known: Published | None = None) -> list[Record]:
    """What is there of every run, in its directory or else among the known results."""

    def record(run: Run) -> Record:
        job = job_of(options, run)
        here = records.read(run, job)
        there = here if known is None else known.record(run, job)
        return there if here.state == "missing" or (here.state, there.state) == ("failed", "done") else here

    return [record(run) for run in options.runs]


def refuse_to_lose(options: StudyOptions, found: Sequence[Record]) -> None:
    """
    Raises:
        ConfigError: the results in the output folder are of runs that are nowhere else and would not be written again.
    """
    file = options.output_dir / publishing.RESULTS
    if not file.exists():
        return
    ours = {one.run.digest for one in found if one.state == "done" or not options.collect}
    done = {digest for digest, line in publishing.load(file, "--output_dir").lines.items() if line["state"] == "done"}
    lost = [digest for digest in done - ours if not any((options.output_dir / "runs").glob(f"*-{digest[:12]}"))]
    if lost:
        raise ConfigError(
            f"--output_dir {options.output_dir}: its {file.name} holds {len(lost)} finished runs that are nowhere else"
            " and no part of this command: name another folder, or move that file away"
        )


def job_of(options: StudyOptions, run: Run) -> Job:
    study, engine = options.study, [f"--deepspeed={options.study.deepspeed}"] if options.study.deepspeed else []
    flags = evaluate_flags(study.evaluate)
    return Job(
        directory=options.directory(run),
        recipe=options.recipe,
        train=(*run.flags, *engine),
        evaluate=(*flags, *engine) if flags else None,
        inspect=study.inspect,
    )


def to_do(options: StudyOptions, found: Sequence[Record]) -> list[Job]:
    """The runs that are missing or failed, each once; one that diverged would do so again."""
    again = {one.job.directory: one.job for one in found if one.state != "done"}
    settled = {one.job.directory for one in found if one.exit_code == DIVERGED and not options.retry_failed}
    return [job for directory, job in again.items() if directory not in settled]


def check_data(options: StudyOptions, jobs: Sequence[Job]) -> None:
    """Read what the jobs will read, every task once.

    Raises:
        ConfigError: there is no dev split to choose by.
        DataError: data cannot be read.
    """
    directories = {job.directory for job in jobs}
    runs = {run.config.task.model_dump_json(): run for run in options.runs if options.directory(run) in directories}
    read = {*runs}
    for run in runs.values():
        evaluation = evaluation_of(options.study, run)
        try:
            if "dev" not in load_task(run.config.task, run.seed).splits:
                raise ConfigError(
                    "task.dev_examples is 0, so there is no dev split, which a study chooses by: hold examples out, as"
                    " --task.dev_examples 1000 does"
                )
            if evaluation is not None:
                for config in evaluation.tasks:
                    if config.model_dump_json() not in read:
                        load_task(config, evaluation.seed, evaluation.splits)
                        read.add(config.model_dump_json())
        except (ConfigError, DataError) as error:
            raise type(error)(f"{run.task}: {error}") from None


def run_here(jobs: Sequence[Job], options: StudyOptions) -> None:
    """Carry out jobs, a line for each as it ends.

    Raises:
        ConfigError: a run is done and has not what the study reports; the others are stopped, and can go on.
    """
    runs, at_once = {options.directory(run): run for run in options.runs}, options.at_once
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
    (jobs[0].directory.parent).mkdir(exist_ok=True)
    for number, (job, code, seconds) in enumerate(run_jobs(jobs, at_once), start=1):
        end = "done" if code == 0 else f"FAILED with {code}, see {job.directory.with_suffix('.log')}"
        print(f"{number:>5}/{len(jobs)}  {runs[job.directory].title}: {end}, {seconds:.1f} s", flush=True)
        check_names(options.study, records.read(runs[job.directory], job))


def tell(options: StudyOptions, found: Sequence[Record]) -> None:
    """Write what the runs came to, tables and figures of what was written, and print the tables."""
    study, folder = options.study, options.output_dir
    published = publishing.publish(folder, study.title, found)
    kept = [published.record(one.run, one.job) for one in found]
    results = results_of(study, kept)
    every = tables(results)
    write_atomically(folder / "tables.md", as_markdown([*every, publishing.computed_by(kept)]).encode())
    write_atomically(folder / "tables.tex", "\n".join(map(latex, every)).encode())
    for name, data in figures.draw(results).items():
        write_atomically(folder / name, data)
    hparams.write(folder / "tensorboard", results)
    print(as_text(every))
    print(
        f"written   {folder}: results.jsonl, tables.md, tables.tex, figures; tensorboard --logdir {folder}/tensorboard"
    )


def tables(results: Results) -> list[Sheet]:
    return [*sheets(results), *stability_sheets(results), *one_rate_sheets(results), *best_sheets(results)]
