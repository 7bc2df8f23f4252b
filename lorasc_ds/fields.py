"""The fields of a configuration by their dotted keys: overrides of them, their meaning, errors that name the key."""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from lorasc_ds.config import Config
from lorasc_ds.errors import ConfigError
from lorasc_ds.recipes import RecipeLoader
from lorasc_ds.task_config import TaskConfig

C = TypeVar("C", bound=Config)


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
