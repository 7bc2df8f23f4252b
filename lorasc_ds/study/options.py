"""What `launch/study.py` takes: its flags and the study's YAML, without torch, so that `--help` is quick."""

from __future__ import annotations

import argparse
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import ValidationError

from lorasc_ds import evaluate_options
from lorasc_ds.cli import Parser, add_overrides, did_you_mean, parse
from lorasc_ds.errors import ConfigError
from lorasc_ds.evaluate_options import EvaluateOptions
from lorasc_ds.recipes import load_yaml
from lorasc_ds.study.paper import TABLES
from lorasc_ds.study.plan import Run, expand, text_of
from lorasc_ds.study.study_config import Settings, StrategyVariant, StudyConfig, TaskVariant, Variant

OF_EVALUATE = "evaluate."  # what flags that override the study's `evaluate` begin with


@dataclass(frozen=True, slots=True)
class StudyOptions:
    """What the command line asks for.

    Args:
        file: the study's YAML.
        runs: all of them, in the order of the tables.
        at_once: runs at a time.
        retry_failed: whether runs that diverged are tried again.
        collect: only make the tables of what is there.
        known: a `results.jsonl` whose runs need not be carried out again; None: there is none.
        against: a `results.jsonl` that the runs have to agree with; None: of none.
        slurm: flags of sbatch; None: run here.
    """

    file: Path
    study: StudyConfig
    recipe: Path
    runs: tuple[Run, ...]
    output_dir: Path
    at_once: int
    retry_failed: bool
    dry_run: bool
    collect: bool
    known: Path | None
    against: Path | None
    slurm: tuple[str, ...] | None
    gpu_memory: float | None

    def directory(self, run: Run) -> Path:
        return self.output_dir / "runs" / run.name


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="study.py",
        description="Carry out a study: all runs of a YAML, hyper-parameters chosen by dev, tables and figures.",
        epilog=keys_in_words(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("file", type=Path, metavar="STUDY", help="YAML of the study, as in launch/studies/")
    add("--output_dir", type=Path, help="runs, tables, figures (default: results/NAME beside STUDY)")
    add("--at_once", type=int, default=1, metavar="N", help="runs at a time on this machine (default: 1)")
    add("--tasks", metavar="NAME[,NAME]", help="only these of its tasks")
    add("--rows", metavar="NAME[,NAME]", help="only these of its strategies")
    add("--adapters", metavar="NAME[,NAME]", help="only these of its adapters")
    add("--seeds", metavar="N[,N]", help="these in place of its seeds")
    add("--retry_failed", action="store_true", help="try runs again that diverged; others that failed are in any case")
    add("--collect", action="store_true", help="carry out nothing; tables and figures of what is there")
    add("--known", type=Path, metavar="RESULTS", help="a results.jsonl whose runs are not carried out again")
    add("--against", type=Path, metavar="RESULTS", help="a results.jsonl with which the same runs have to agree")
    add("--dry_run", action="store_true", help="number of runs, hours, GPU memory; carry out nothing")
    add("--gpu_memory", type=float, metavar="GIB", help="with --dry_run: of the GPU (default: the one here, or 80)")
    add(
        "--slurm",
        nargs="?",
        const="",
        metavar="FLAGS",
        help="submit the runs as a Slurm array; FLAGS of sbatch in one text, as '--gpus-per-node=1 --time=24:00:00'",
    )
    add_overrides(parser)
    group = parser.add_argument_group(
        "overrides of the study's evaluate",
        "--evaluate.FLAG VALUE, FLAG any of launch/evaluate.py, as --evaluate.data_dir DIR or --evaluate.gsm8k.mode"
        " direct;\ntrue or false for one that takes no value",
    )
    for flag in flags_of_evaluate():
        group.add_argument(f"--{OF_EVALUATE}{flag}", metavar="VALUE", help=argparse.SUPPRESS)
    return parser


def keys_in_words() -> str:
    """Every key of a study's YAML with its meaning, for `--help`."""
    members = {"tasks": TaskVariant, "adapters": Variant, "strategies": StrategyVariant}
    lines = []
    for key, field in StudyConfig.model_fields.items():
        of_each = f" Each has {', '.join(members[key].model_fields)}." if key in members else ""
        lines.append(
            textwrap.fill(
                f"{field.description}{of_each}",
                width=100,
                initial_indent=f"  {key:<12}",
                subsequent_indent=" " * 14,
                break_on_hyphens=False,
            )
        )
    return "\n".join(["keys of STUDY:", f"  {StudyConfig.__doc__}", *lines])


@cache
def flags_of_evaluate() -> Mapping[str, bool]:
    """The flags that a study's `evaluate` may have, and whether each takes a value; the study gives the rest."""
    own = {"help", "output_dir", "records", "deepspeed", "local_rank"}
    actions = [one for one in evaluate_options.make_parser()._actions if one.option_strings and one.dest not in own]
    return {one.dest: one.nargs != 0 for one in actions}


def evaluate_flags(settings: Settings) -> tuple[str, ...]:
    """A study's `evaluate` as launch/evaluate.py takes it.

    Raises:
        ConfigError: there is no such flag, or it takes no value and has one.
    """
    takes_value, found = flags_of_evaluate(), []
    for key, value in settings.items():
        if key not in takes_value:
            raise ConfigError(f"evaluate: unknown flag {key}{did_you_mean(key, [*takes_value])}")
        text = text_of(value)
        if not takes_value[key] and text not in ("true", "false"):
            raise ConfigError(f"evaluate: {key} is {text!r}: true or false is needed")
        if takes_value[key] or text == "true":
            found.append(f"--{key}={text}" if takes_value[key] else f"--{key}")
    return tuple(found)


def evaluation_of(study: StudyConfig, run: Run) -> EvaluateOptions | None:
    """What will be scored of a run besides; None: nothing.

    Raises:
        ConfigError: launch/evaluate.py would refuse it.
    """
    if not study.evaluate:
        return None
    flags = evaluate_flags(study.evaluate)
    try:
        return evaluate_options.parse_for(run.config.model_dump(mode="json"), flags)
    except ConfigError as error:
        raise ConfigError(f"evaluate: {error}") from None


def parse_options(arguments: Sequence[str]) -> StudyOptions:
    """
    Raises:
        ConfigError: one line with the flag or the key, and the remedy.
    """
    options = parse(make_parser(), arguments)
    if options.at_once < 1:
        raise ConfigError(f"--at_once is {options.at_once}: a number from 1 on is needed")
    if options.gpu_memory is not None and not options.dry_run:
        raise ConfigError(f"--gpu_memory {options.gpu_memory:g} is for planning: add --dry_run, or leave it out")
    study = narrowed(load_study(options.file), options)
    recipe = options.file.parent / study.recipe
    given = {key: value for key, value in vars(options).items() if "." in key and value is not None}
    scored = {key.removeprefix(OF_EVALUATE): value for key, value in given.items() if key.startswith(OF_EVALUATE)}
    study = study.model_copy(update={"evaluate": study.evaluate | scored})
    overrides = {key: value for key, value in given.items() if not key.startswith(OF_EVALUATE)}
    if "training.seed" in overrides:
        raise ConfigError(f"--training.seed {overrides['training.seed']}: give --seeds, which names all of them")
    runs = expand(study, recipe, overrides)
    if not options.collect:
        for run in {run.task: run for run in runs}.values():
            evaluation_of(study, run)
    return StudyOptions(
        file=options.file,
        study=study,
        recipe=recipe,
        runs=runs,
        output_dir=options.output_dir or options.file.parent / "results" / options.file.stem,
        at_once=options.at_once,
        retry_failed=options.retry_failed,
        dry_run=options.dry_run,
        collect=options.collect,
        known=options.known,
        against=options.against,
        slurm=None if options.slurm is None else flags_of_sbatch(options.slurm),
        gpu_memory=options.gpu_memory,
    )


def flags_of_sbatch(text: str) -> tuple[str, ...]:
    """
    Raises:
        ConfigError: a quote is not closed.
    """
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"--slurm {text}: {error}: write the flags as for a shell, with every quote closed") from None


def load_study(file: Path) -> StudyConfig:
    """
    Raises:
        ConfigError: the file is no study.
    """
    content, places = load_yaml(file)
    try:
        study = StudyConfig.model_validate(content)
    except ValidationError as error:
        raise explained(error, places) from None
    if study.paper is not None and study.paper not in TABLES:
        raise ConfigError(f"{places['paper']}: paper is {study.paper!r}: one of {', '.join(TABLES)} is needed")
    return study


def explained(error: ValidationError, places: dict[str, str]) -> ConfigError:
    """The first problem: the key, where it stands, what is needed."""
    detail = error.errors()[0]
    key = ".".join(str(part) for part in detail["loc"])
    place = f" ({places[key]})" if key in places else ""
    if detail["type"] == "extra_forbidden":
        variants = TaskVariant.model_fields | StrategyVariant.model_fields
        known = [*(StudyConfig.model_fields if len(detail["loc"]) == 1 else variants)]
        return ConfigError(f"unknown key {key}{place}{did_you_mean(str(detail['loc'][-1]), known)}")
    if detail["type"] == "value_error":
        return ConfigError(str(detail.get("ctx", {}).get("error")))
    return ConfigError(f"{key}{place}: {detail['msg'].replace('Input should be', 'needs to be')}")


def narrowed(study: StudyConfig, options: argparse.Namespace) -> StudyConfig:
    """The study with those members of its axes that the command line names."""
    changed = {}
    for axis, given in (("tasks", options.tasks), ("strategies", options.rows), ("adapters", options.adapters)):
        if given is not None:
            members, names = getattr(study, axis), [name.strip() for name in given.split(",")]
            for name in names:
                if name not in members:
                    raise ConfigError(
                        f"{name!r} is none of the study's {axis}, which are {', '.join(members)}"
                        f"{did_you_mean(name, [*members])}"
                    )
            changed[axis] = {name: members[name] for name in members if name in names}
    if options.seeds is not None:
        try:
            changed["seeds"] = tuple(int(seed) for seed in options.seeds.split(","))
        except ValueError:
            raise ConfigError(f"--seeds {options.seeds}: whole numbers with commas between them are needed") from None
    return study.model_copy(update=changed)
