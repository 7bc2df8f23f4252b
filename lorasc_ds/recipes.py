"""Recipes: YAML as people read and write it, with the place where every key stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from lorasc_ds.config import Config
from lorasc_ds.errors import ConfigError


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


def to_yaml(config: Config) -> str:
    """The resolved configuration; `--config` reads it back."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True)
