"""What `launch/evaluate.py` takes: its flags, without torch, so that `--help` is quick."""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorasc_ds import cli
from lorasc_ds.cli import Parser
from lorasc_ds.errors import ConfigError
from lorasc_ds.fields import build_config, build_task, meaning, task_fields
from lorasc_ds.recipes import load_yaml
from lorasc_ds.robustness_report import COLUMNS
from lorasc_ds.task_config import TaskConfig

FOLDERS = {  # task -> names of its folder, without case and marks, where that is not the task's own; the surest first
    "drop_few_shot": ("drop",),
    "imagenet": ("imagenet", "imagenet1k", "ilsvrc2012", "ilsvrc"),
    "imagenet_v2": ("imagenetv2matchedfrequencyformatval", "imagenetv2matchedfrequency", "imagenetv2"),
    "imagenet_stylized": ("stylizedimagenet", "imagenetstylized", "imagenetstyle", "stylized"),
    "imagenet_sketch": ("imagenetsketch", "sketch"),
}
OF_IMAGES = ("class_names", "templates", "head", "train_head", "unreadable")  # what all tasks on classes have


@dataclass(frozen=True, slots=True)
class HarnessOptions:
    """Tasks of lm-evaluation-harness.

    Args:
        include_path: a folder with task files of one's own.
        shots: None: each task's own number.
    """

    tasks: tuple[str, ...] = ()
    include_path: Path | None = None
    shots: int | None = None


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """What the command line asks for.

    Args:
        subject: hub id or folder of a model, folder of a PEFT adapter, or run directory.
        expert: of a run; None: what it ships, or all experts that closed.
        base: the model under an adapter; None: the one that its configuration names.
        dtype: None: the run's, or bfloat16 on a GPU and float32 without.
        tasks: settings by task.
        splits: what is scored, where a task has it; else all that it has but `train`.
        max_lengths: longest sequence in tokens by task; None: the task's.
        limit: examples of every split and group, images of every class in it; None: all.
        records: whether to write `records.jsonl`.
    """

    subject: str
    output_dir: Path
    expert: int | None
    base: str | None
    revision: str | None
    trust_remote_code: bool
    dtype: Literal["float32", "bfloat16"] | None
    tasks: tuple[TaskConfig, ...]
    splits: tuple[str, ...]
    limit: int | None
    batch_size: int
    max_lengths: dict[str, int | None]
    share_prefixes: bool
    data_workers: int | None
    seed: int
    records: bool
    deepspeed: Path | None
    ddp_timeout: int
    harness: HarnessOptions = field(default_factory=HarnessOptions)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="evaluate.py",
        description="Score a model, an adapter or a run, at any of its experts, on many tasks.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("subject", metavar="SUBJECT", help="hub id or folder of a model, folder of a PEFT adapter, or run directory")
    add("--output_dir", type=Path, required=True, metavar="OUT", help="a folder that does not exist yet")
    add(
        "--tasks",
        metavar="NAME[,NAME]",
        help="what to score on (default: the task of the run); robustness: ImageNet, V2, C, R, A, Sketch and Stylized,"
        " those that --data_dir has, or without it those that the hub has",
    )
    add(
        "--data_dir",
        type=Path,
        metavar="DIR",
        help="folder with a folder of original release files per task, by its name; a task without one comes from"
        " the hub",
    )
    add("--expert", type=int, metavar="K", help="of a run: after K experts (default: what it ships)")
    add("--base", metavar="MODEL", help="the model under an adapter (default: the one that its configuration names)")
    add("--revision", help="branch, tag or commit of a hub model")
    add("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    add("--dtype", choices=("float32", "bfloat16"), help="default: the run's; else bfloat16 on a GPU, float32 without")
    add("--splits", default="test", metavar="NAME[,NAME]", help="default: test, or all but train where there is none")
    add(
        "--limit",
        type=int,
        metavar="N",
        help="examples of every split, and of every subject in it; images of every class, under every corruption and"
        " severity (default: all)",
    )
    add("--class_names", metavar="FILE", help="for all tasks on images: names of the classes, a line each")
    add("--templates", metavar="VALUE", help="for all tasks on images: openai, simple, or prompts of your own with {}")
    add("--batch_size", type=int, default=16, metavar="N", help="rows that the model reads at once (default: 16)")
    add(
        "--max_length", type=int, metavar="N", help="longest sequence in tokens (default: the run's own, or the task's)"
    )
    add(
        "--share_prefixes",
        choices=("true", "false"),
        default="true",
        help="read what the candidates of a question begin with once (default: true, where the model can)",
    )
    add("--data_workers", type=int, metavar="N", help="processes that decode images (default: the cores, at most 8)")
    add("--seed", type=int, metavar="N", help="of samples of examples, and of sampling (default: the run's, or 0)")
    add("--records", action="store_true", help="write records.jsonl: every example with its prediction")
    add("--confirm_run_unsafe_code", action="store_true", help="run the programs that a model writes for humaneval")
    add(
        "--sandbox", metavar="KIND", help="what keeps such a program from network and files: auto, unshare, bwrap, none"
    )
    add("--harness_tasks", default="", metavar="NAME[,NAME]", help="tasks of lm-evaluation-harness, extra [eval]")
    add("--harness_include_path", type=Path, metavar="DIR", help="folder with task files of your own for the harness")
    add("--harness_shots", type=int, metavar="N", help="demonstrations there (default: each task's)")
    add(
        "--deepspeed", type=Path, metavar="JSON", help="DeepSpeed settings, as in ds_configs/; ZeRO-3 cuts the model up"
    )
    add("--ddp_timeout", type=int, default=1800, metavar="SECONDS", help="that a process waits for the others")
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    group = parser.add_argument_group("settings of the tasks")
    for name, fields in task_fields().items():
        for key, one in fields.items():
            group.add_argument(f"--{name}.{key}", metavar="VALUE", help=meaning([one]).replace("%", "%%"))
    return parser


def parse(arguments: Sequence[str]) -> EvaluateOptions:
    """
    Raises:
        ConfigError: an unknown flag or task, or an impossible value.
    """
    options = cli.parse(make_parser(), arguments)
    if options.output_dir.exists():
        raise ConfigError(f"--output_dir {options.output_dir} exists: give a folder that does not exist yet")
    return checked(options, settings_of_run(options.subject))


def parse_for(run: Mapping[str, Any], flags: Sequence[str]) -> EvaluateOptions:
    """What flags will ask for of a run that is not there yet.

    Args:
        run: its settings.
        flags: without the subject and its folder.

    Raises:
        ConfigError: as `parse`.
    """
    return checked(cli.parse(make_parser(), ["RUN", "--output_dir=SCORES", *flags]), run)


def checked(options: argparse.Namespace, run: Mapping[str, Any]) -> EvaluateOptions:
    """
    Args:
        run: settings of the run that is scored; {}: the subject is none.

    Raises:
        ConfigError: an unknown task, or an impossible value.
    """
    least = {
        "expert": 1,
        "limit": 1,
        "batch_size": 1,
        "max_length": 2,
        "seed": 0,
        "harness_shots": 0,
        "data_workers": 0,
        "ddp_timeout": 1,
    }
    for key, lowest in least.items():
        value = getattr(options, key)
        if value is not None and value < lowest:
            raise ConfigError(f"--{key} is {value}: a number from {lowest} on is needed")
    if options.harness_tasks and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--harness_tasks needs lm-evaluation-harness: pip install -e '.[eval]'")
    splits = listed(options.splits)
    if not splits:
        raise ConfigError(f"--splits {options.splits!r}: name splits that are scored, such as dev,test")
    own, trained = run.get("task", {}), run.get("training", {})
    harness = HarnessOptions(listed(options.harness_tasks), options.harness_include_path, options.harness_shots)
    tasks = tasks_of(options, own, bool(harness.tasks))
    return EvaluateOptions(
        subject=options.subject,
        output_dir=options.output_dir,
        expert=options.expert,
        base=options.base,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        dtype=options.dtype,
        tasks=tasks,
        splits=splits,
        limit=options.limit,
        batch_size=options.batch_size,
        max_lengths={
            task.name: options.max_length or (trained["max_length"] if task.name == own.get("name") else None)
            for task in tasks
        },
        share_prefixes=options.share_prefixes == "true",
        data_workers=options.data_workers,
        seed=trained.get("seed", 0) if options.seed is None else options.seed,
        records=options.records,
        deepspeed=options.deepspeed,
        ddp_timeout=options.ddp_timeout,
        harness=harness,
    )


def listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def settings_of_run(subject: str) -> dict[str, Any]:
    """The configuration of a run, checked; {} where the subject is none."""
    recipe = Path(subject) / "config.yaml"
    return build_config(*load_yaml(recipe), {}).model_dump(mode="json") if recipe.is_file() else {}


def tasks_of(options: argparse.Namespace, own: dict[str, Any], harness: bool) -> tuple[TaskConfig, ...]:
    """The tasks that are asked for, with their settings.

    Those of the run, `own`, hold for its own task, and those of `OF_IMAGES` for all tasks on images.
    """
    asked = listed(options.tasks or ("" if harness else own.get("name", "")))
    if not asked and not harness:
        raise ConfigError(f"--tasks is needed: {options.subject} is no run directory whose task could be taken")
    each = [robustness_sets(options, own) if name == "robustness" else [name] for name in asked]
    fields = task_fields()
    found = []
    for name in dict.fromkeys(name for names in each for name in names):
        known = fields.get(name, {})
        settings = {key: value for key, value in own.items() if key != "name"} if own.get("name") == name else {}
        if "class_names" in known and "class_names" in own:
            foreign = name in COLUMNS and own["name"] not in COLUMNS  # its classes are not ImageNet's
            settings = {key: own[key] for key in OF_IMAGES if not (foreign and key == "class_names")} | settings
        folder = folder_of(options.data_dir, name)
        if folder is not None and "data_dir" in known:
            settings = settings | {"data_dir": str(folder)}
        if name == "humaneval":
            settings = settings | {"confirm_run_unsafe_code": options.confirm_run_unsafe_code}
            settings = settings | ({"sandbox": options.sandbox} if options.sandbox else {})
        shared = {key: getattr(options, key) for key in ("class_names", "templates") if key in known}
        given = {key: getattr(options, f"{name}.{key}") for key in known}
        texts = {key: text for one in (shared, given) for key, text in one.items() if text is not None}
        found.append(build_task(name, settings, texts))
    if not any("class_names" in fields[task.name] for task in found):
        for key in ("class_names", "templates"):
            if getattr(options, key) is not None:
                raise ConfigError(f"--{key} {getattr(options, key)}: none of the tasks is on images; leave it out")
    return tuple(found)


def robustness_sets(options: argparse.Namespace, own: dict[str, Any]) -> list[str]:
    """ImageNet and its robustness sets, those whose data is there.

    Raises:
        ConfigError: there is none.
    """

    def there(name: str) -> bool:
        given = own.get("name") == name or getattr(options, f"{name}.data_dir") is not None
        on_hub = name not in ("imagenet_c", "imagenet_stylized")
        return given or (on_hub if options.data_dir is None else folder_of(options.data_dir, name) is not None)

    found = [name for name in COLUMNS if there(name)]
    if not found:
        raise ConfigError(
            f"--tasks robustness: --data_dir {options.data_dir} holds no folder like imagenet, imagenetv2, imagenet-c,"
            " imagenet-r, imagenet-a, sketch or stylized-imagenet: give the folder that has them, or name the tasks"
        )
    return found


def folder_of(data_dir: Path | None, task: str) -> Path | None:
    """The folder of a task's files, there or one folder deeper, in any spelling; None where there is none."""
    if data_dir is None:
        return None
    if not data_dir.is_dir():
        raise ConfigError(f"--data_dir {data_dir} is no folder: give one that holds a folder per task")
    folders = [path for pattern in ("*", "*/*") for path in sorted(data_dir.glob(pattern)) if path.is_dir()]
    spelt = [(re.sub(r"[\W_]", "", path.name.lower()), path) for path in folders]
    wanted = FOLDERS.get(task, (task.replace("_", ""),))
    return next((path for name in wanted for one, path in spelt if one == name), None)
