"""The command line of every launcher script: a YAML recipe, dotted overrides, errors that name the key."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from lorasc_ds.config import Config
from lorasc_ds.errors import ConfigError
from lorasc_ds.task_config import TaskConfig

C = TypeVar("C", bound=Config)


class RecipeLoader(yaml.SafeLoader):
    """YAML as people read it: `1e-4` is a number; `no`, `010` and `2026-01-01` are words."""


RecipeLoader.yaml_implicit_resolvers = {
    letter: [
        (tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":int", ":float", ":timestamp"))
    ]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$"), list("tf"))
RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|nan)$"),
    list("-+.0123456789"),
)


class RecipeDumper(yaml.SafeDumper):
    """Quotes what `RecipeLoader` would read as something else than text."""


RecipeDumper.yaml_implicit_resolvers = RecipeLoader.yaml_implicit_resolvers


def load_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A recipe, and for every dotted key the place `file:line` where it stands.

    Raises:
        ConfigError: the file cannot be read, is no mapping, or holds a key twice.
    """
    try:
        loader = RecipeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}; give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    places: dict[str, str] = {}

    def value_of(node: yaml.Node, prefix: str) -> Any:
        if not isinstance(node, yaml.MappingNode):
            return loader.construct_object(node, deep=True)
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            place = f"{path}:{key_node.start_mark.line + 1}"
            if key in mapping:
                raise ConfigError(f"{place}: {prefix}{key} stands twice, first at {places[prefix + key]}; remove one")
            places[prefix + key] = place
            mapping[key] = value_of(value_node, f"{prefix}{key}.")
        return mapping

    try:
        content = {} if root is None else value_of(root, "")
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} holds a {type(content).__name__}; sections like `model:` are needed")
    return content, places


def members(annotation: Any) -> Iterator[Any]:
    """The plain types behind Annotated and unions."""
    if get_origin(annotation) is Annotated:
        yield from members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from members(member)
    else:
        yield annotation


def fields_of(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, list[FieldInfo]]:
    """Every dotted key with its fields; several where tasks share a key."""
    found: dict[str, list[FieldInfo]] = {}
    for name, field in model.model_fields.items():
        sections = [m for m in members(field.annotation) if isinstance(m, type) and issubclass(m, BaseModel)]
        for section in sections:
            for key, fields in fields_of(section, f"{prefix}{name}.").items():
                found.setdefault(key, []).extend(fields)
        if not sections:
            found.setdefault(prefix + name, []).append(field)
    return found


def parse_override(text: str, fields: list[FieldInfo]) -> Any:
    """The value of `--key text`, typed as YAML types it, except that text stays text."""
    kinds = [kind for field in fields for kind in members(field.annotation)]
    if text == "null" and type(None) in kinds:
        return None
    words = [kind for kind in kinds if kind is str or get_origin(kind) is Literal]
    if len(words) == len([kind for kind in kinds if kind is not type(None)]):
        return text
    lists = [kind for kind in kinds if get_origin(kind) is tuple]
    if any(text in get_args(kind) for kind in words) or (lists and str in kinds and not re.search(r"^\[|,", text)):
        return text  # what may be a text or several is one, if nothing separates it
    for kind in lists:
        if not text.startswith("["):
            if get_args(kind)[0] is str:
                return [part.strip() for part in text.split(",")]
            text = f"[{text}]"
    try:
        return yaml.load(text, RecipeLoader)
    except (yaml.YAMLError, ValueError, AttributeError):
        return text


def meaning(fields: list[FieldInfo]) -> str:
    """What a key means, the values it takes where they are few, and its default."""
    texts = " / ".join(dict.fromkeys(field.description or "" for field in fields))
    kinds = [kind for field in fields for kind in members(field.annotation)]
    values = dict.fromkeys(value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind))
    choices = f" One of: {', '.join(values)}." if values else ""
    default = "" if fields[0].is_required() else f" Default: {json.dumps(fields[0].default)}."
    return f"{texts}{choices}{default}"


def did_you_mean(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def explain(
    error: ValidationError, places: dict[str, str], model: type[Config] = Config, section: str | None = None
) -> ConfigError:
    """A pydantic error as one line: the key, where it stands, the value, what is needed.

    Args:
        section: that the error is about, where it is not about a whole configuration.
    """
    lines = []
    told: dict[str, int] = {}  # the line of a key; members of a union and of a list are told in one
    for detail in error.errors():
        location = [str(part) for part in detail["loc"]]
        if section is not None:  # the discriminator stands first
            location = [section, *location[1:]]
        if location[:1] == ["task"] and len(location) > 2:
            del location[1]  # pydantic puts the task's name between `task` and the key
        key = ".".join(location[:2])
        if key in told:
            if detail["type"] == "literal_error":
                lines[told[key]] += f" or {detail.get('ctx', {}).get('expected')}"
            continue
        told[key] = len(lines)
        context = detail.get("ctx", {})
        place = f" ({places[key]})" if key in places else ""
        if detail["type"] == "extra_forbidden":
            known = [*model.model_fields, *fields_of(model)]
            hint = f"; task {detail['loc'][1]} does not have it" if key in known else did_you_mean(key, known)
            lines.append(f"unknown key {key}{place}{hint}")
        elif detail["type"] == "missing":
            lines.append(f"{key} is needed: set it in the recipe or with --{key}")
        elif detail["type"] == "value_error":
            lines.append(str(context.get("error")))
        elif detail["type"] == "union_tag_invalid":
            lines.append(f"task.name is {context.get('tag')!r}: one of {context.get('expected_tags')} is needed")
        else:
            need = detail["msg"].replace("Input should be ", "needs to be ")
            lines.append(f"{key} is {detail['input']!r}{place}: {need}")
    more = f" (and {len(lines) - 1} more: {'; '.join(lines[1:])})" if len(lines) > 1 else ""
    return ConfigError(lines[0] + more)


def build_task(name: str, settings: dict[str, Any], overrides: dict[str, str]) -> TaskConfig:
    """The settings of a task: those of a run, or its defaults, and what the command line says (`--NAME.KEY`).

    Raises:
        ConfigError: one line with the key and the remedy.
    """
    known = task_fields()
    if name not in known:
        raise ConfigError(
            f"--tasks {name}: no such task; one of {', '.join(known)} is needed{did_you_mean(name, [*known])}"
        )
    given = {key: parse_override(text, [known[name][key]]) for key, text in overrides.items()}
    try:
        return TypeAdapter(Annotated[TaskConfig, Field(discriminator="name")]).validate_python(
            {"name": name} | settings | given
        )
    except ValidationError as error:
        raise explain(error, {}, section=name) from None


def task_fields() -> dict[str, dict[str, FieldInfo]]:
    """The fields of the settings of every task, by its name."""
    return {
        name: {key: field for key, field in section.model_fields.items() if key != "name"}
        for section in members(TaskConfig)
        for name in get_args(section.model_fields["name"].annotation)
    }


def build_config(
    content: dict[str, Any], places: dict[str, str], overrides: dict[str, str], model: type[C] = Config
) -> C:
    """The recipe with the overrides laid over it, validated.

    An override of `task.name` with another task replaces the recipe's whole `task` section.

    Args:
        model: of the configuration.

    Raises:
        ConfigError: one line with the key, the place and the remedy.
    """
    known = fields_of(model)
    sections = {name: {} if section is None else section for name, section in ({"task": None} | content).items()}
    for name, section in sections.items():
        if name not in model.model_fields:
            raise ConfigError(f"unknown key {name} ({places[name]}){did_you_mean(name, [*model.model_fields, *known])}")
        if not isinstance(section, dict):
            raise ConfigError(f"{name} is {section!r} ({places[name]}): a section with keys of its own is needed")
    sections["task"] = {"name": "digits"} | sections["task"]
    if overrides.get("task.name", sections["task"]["name"]) != sections["task"]["name"]:
        sections["task"] = {}
    for key, text in overrides.items():
        name, field = key.split(".", 1)
        sections[name] = sections.get(name, {}) | {field: parse_override(text, known[key])}
        places = places | {key: f"--{key}"}
    try:
        return model.model_validate(sections)
    except ValidationError as error:
        raise explain(error, places, model) from None


@dataclass(frozen=True, slots=True)
class Invocation:
    """What the command line asks for.

    Args:
        resume: `auto`, `must`, `never`, or the folder of a checkpoint.
        resume_override: settings that may differ from those the run began with.
        gpus, gpu_memory: how many the plan of a dry run is for, and the GiB of each; None: those that are here.
    """

    config: Config
    recipe: Path
    output_dir: Path
    resume: Literal["auto", "must", "never"] | Path
    dry_run: bool
    resume_override: tuple[str, ...] = ()
    deepspeed: Path | None = None
    gpus: int | None = None
    gpu_memory: float | None = None


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(message)


def make_parser(default_recipe: Path) -> argparse.ArgumentParser:
    parser = Parser(
        description="Train with LoRASC: a cascade of LoRA experts, averaged, merged and started again.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe(parser, default_recipe)
    parser.add_argument("--output_dir", type=Path, help="run directory (default: runs/RECIPE-STRATEGY)")
    parser.add_argument(
        "--resume",
        metavar="auto|must|never|PATH",
        default="auto",
        help="auto: go on with the run in output_dir, begin where there is none, print the summary of a finished one;"
        " must: there has to be something to go on with; never: the directory must be empty; PATH: go on from this"
        " checkpoint, in the directory of its run or in an empty one",
    )
    parser.add_argument(
        "--resume_override",
        metavar="KEY[,KEY]",
        default="",
        help="settings that differ from those the run began with, and hold from the checkpoint on",
    )
    parser.add_argument("--dry_run", action="store_true", help="check everything, print the plan; load no weights")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="with --dry_run: plan for N processes (default: those that were launched)"
    )
    parser.add_argument(
        "--gpu_memory", type=float, metavar="GIB", help="with --dry_run: of each GPU (default: the one here, or 80)"
    )
    parser.add_argument("--print_config", action="store_true", help="print every field with its meaning, and stop")
    parser.add_argument("--deepspeed", type=Path, metavar="JSON", help="DeepSpeed settings, as in ds_configs/")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def add_recipe(parser: argparse.ArgumentParser, default_recipe: Path, model: type[Config] = Config) -> None:
    """`--config` and an override for every field."""
    parser.add_argument("--config", type=Path, default=default_recipe, help="YAML recipe (default: the quickstart)")
    add_overrides(parser, model)


def add_overrides(parser: argparse.ArgumentParser, model: type[Config] = Config) -> None:
    """An override for every field."""
    group = parser.add_argument_group("overrides of the recipe")
    for key, fields in fields_of(model).items():
        group.add_argument(f"--{key}", metavar="VALUE", help=meaning(fields).replace("%", "%%"))


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """
    Raises:
        ConfigError: an unknown flag.
    """
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        flag = unknown[0].split("=")[0]
        flags = [option for action in parser._actions for option in action.option_strings]
        raise ConfigError(f"unknown argument {unknown[0]}{did_you_mean(flag, flags)}")
    return options


def configuration(options: argparse.Namespace, model: type[C] = Config) -> C:
    """The recipe that the command line names, with its overrides.

    Raises:
        ConfigError: it is impossible.
    """
    overrides = {key: value for key, value in vars(options).items() if "." in key and value is not None}
    return build_config(*load_yaml(options.config), overrides, model)


def parse_command_line(arguments: Sequence[str], default_recipe: Path) -> Invocation | str:
    """The run that is asked for, or the text to print (`--print_config`).

    Raises:
        ConfigError: an unknown flag or an impossible configuration.
    """
    options = parse(make_parser(default_recipe), arguments)
    for flag, number in (("--gpus", options.gpus), ("--gpu_memory", options.gpu_memory)):
        if number is not None and not 0 < number < math.inf:
            raise ConfigError(f"{flag} is {number:g}: a number above 0 is needed")
        if number is not None and not options.dry_run:
            raise ConfigError(f"{flag} {number:g} is for planning: add --dry_run, or leave it out")
    config = configuration(options)
    if options.print_config:
        return describe(config)
    output_dir = options.output_dir or Path("runs") / f"{options.config.stem}-{config.cascade.strategy}"
    return Invocation(
        config=config,
        recipe=options.config,
        output_dir=output_dir,
        resume=options.resume if options.resume in ("auto", "must", "never") else Path(options.resume),
        resume_override=tuple(key.strip() for key in options.resume_override.split(",") if key.strip()),
        dry_run=options.dry_run,
        deepspeed=options.deepspeed,
        gpus=options.gpus,
        gpu_memory=options.gpu_memory,
    )


def to_yaml(config: Config) -> str:
    """The resolved configuration; `--config` reads it back."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True)


def describe(config: Config) -> str:
    """The resolved configuration as YAML with every field's meaning above it."""
    lines, known = [], fields_of()
    for section_name in Config.model_fields:
        section = getattr(config, section_name)
        lines.append(f"{section_name}:")
        for name in type(section).model_fields:
            value = json.dumps(section.model_dump(mode="json")[name])
            lines += [f"  # {meaning(known[f'{section_name}.{name}'])}", f"  {name}: {value}"]
    return "\n".join(lines)


def json_schema() -> str:
    """The schema of a recipe, for editors."""
    return json.dumps(Config.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
