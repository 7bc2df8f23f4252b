"""The arrows of the design: who may import whom, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lorasc_ds"
FILES = sorted(PACKAGE.rglob("*.py"))

OWNERS = {  # engine -> the places that may import it
    "peft": ("adapters.py", "benchmark/peers.py"),
    "deepspeed": ("sharding/", "benchmark/rank.py"),
    "lm_eval": ("harness.py",),
    "torch.distributed": ("sharding/", "benchmark/rank.py"),
    "triton": ("algorithm/triton_kernels.py",),
    "accelerate": ("sharding/", "run.py", "trainer.py", "subject.py", "backends.py", "benchmark/rank.py"),
    "pydantic": (
        "section.py",
        "config.py",
        "task_config.py",
        "image_task_config.py",
        "training_config.py",
        "fields.py",
        "show_data.py",
        "study/study_config.py",
        "study/options.py",
    ),
}
FORBIDDEN = {  # place -> what it must not know
    "algorithm/": ("lorasc_ds.", "torch.distributed", "peft", "deepspeed", "accelerate", "transformers"),
    "section.py": ("torch", "lorasc_ds."),
    "task_config.py": ("torch", "lorasc_ds.algorithm", "lorasc_ds.tasks", "lorasc_ds.errors"),
    "image_task_config.py": ("torch", "lorasc_ds.algorithm", "lorasc_ds.tasks", "lorasc_ds.errors"),
    "training_config.py": ("torch", "lorasc_ds.algorithm", "lorasc_ds.tasks", "lorasc_ds.errors"),
    "config.py": ("torch", "lorasc_ds.algorithm", "lorasc_ds.tasks", "lorasc_ds.errors"),
    "command.py": ("torch", "lorasc_ds.sharding"),
    "recipes.py": ("torch", "lorasc_ds.algorithm", "lorasc_ds.tasks"),
    "fields.py": ("torch", "lorasc_ds.algorithm", "lorasc_ds.tasks"),
    "profiling.py": ("lorasc_ds.cascade", "lorasc_ds.adapters", "lorasc_ds.sharding", "torch.distributed"),
    "in_flight.py": ("lorasc_ds.cascade", "lorasc_ds.adapters", "lorasc_ds.tracking", "torch.distributed"),
    "tasks/": ("lorasc_ds.cascade", "lorasc_ds.algorithm", "lorasc_ds.adapters", "lorasc_ds.sharding", "torch"),
    "encoded.py": ("lorasc_ds.cascade", "lorasc_ds.algorithm", "lorasc_ds.adapters", "lorasc_ds.sharding", "torch"),
    "chat.py": ("lorasc_ds.cascade", "lorasc_ds.algorithm", "lorasc_ds.adapters", "lorasc_ds.sharding", "torch"),
    "encoding.py": ("lorasc_ds.cascade", "lorasc_ds.algorithm", "lorasc_ds.adapters", "lorasc_ds.sharding", "torch"),
    "kernels/": (
        "lorasc_ds.cascade",
        "lorasc_ds.algorithm",
        "lorasc_ds.adapters",
        "lorasc_ds.sharding",
        "lorasc_ds.config",
        "peft",
    ),
    "layout.py": ("lorasc_ds.cascade", "lorasc_ds.algorithm", "lorasc_ds.adapters", "lorasc_ds.sharding", "torch"),
    "data.py": ("lorasc_ds.cascade", "lorasc_ds.algorithm", "lorasc_ds.adapters", "lorasc_ds.sharding"),
    "images.py": ("torch", "transformers", "lorasc_ds.algorithm", "lorasc_ds.sharding", "lorasc_ds.models"),
    "corrupting.py": ("torch", "transformers", "lorasc_ds.algorithm", "lorasc_ds.sharding", "lorasc_ds.models"),
    "corruptions/": ("torch", "lorasc_ds.images", "lorasc_ds.tasks", "lorasc_ds.corrupting", "lorasc_ds.errors"),
    "backends.py": ("torch", "lorasc_ds.cascade", "lorasc_ds.adapters", "lorasc_ds.sharding", "lorasc_ds.tracking"),
    "console.py": ("torch", "lorasc_ds.cascade", "lorasc_ds.adapters", "lorasc_ds.sharding"),
    "records.py": ("torch", "lorasc_ds."),
    "warning_signs.py": ("torch", "lorasc_ds."),
    "watch.py": ("torch", "lorasc_ds.cascade", "lorasc_ds.adapters", "lorasc_ds.sharding", "lorasc_ds.tracking"),
    "tracking.py": ("lorasc_ds.cascade", "lorasc_ds.adapters", "lorasc_ds.sharding"),
    "checkpoint.py": ("lorasc_ds.cascade", "lorasc_ds.adapters", "lorasc_ds.sharding", "lorasc_ds.live_weights"),
    "contract.py": ("lorasc_ds.cascade", "lorasc_ds.adapters", "lorasc_ds.sharding", "torch"),
    "adapters.py": ("lorasc_ds.cascade", "lorasc_ds.algorithm", "lorasc_ds.sharding"),
    "sharding/": ("lorasc_ds.cascade", "lorasc_ds.algorithm", "lorasc_ds.adapters", "peft"),
    "benchmark/catalogue.py": ("torch", "lorasc_ds."),
    "benchmark/results.py": ("torch", "lorasc_ds."),
    "benchmark/options.py": ("torch", "transformers"),
    "benchmark/command.py": ("torch", "transformers"),
    "plugin.py": ("torch.distributed", "peft", "deepspeed", "pydantic"),
    "callback.py": ("torch.distributed", "peft", "deepspeed", "pydantic"),
    "study/study_config.py": ("torch", "lorasc_ds.algorithm", "lorasc_ds.tasks", "lorasc_ds.errors"),
    "study/plan.py": ("torch", "lorasc_ds.algorithm", "lorasc_ds.train", "lorasc_ds.run", "lorasc_ds.sharding"),
    "study/selection.py": ("lorasc_ds.",),  # what it sees is what it is given: dev
    "study/statistics.py": ("lorasc_ds.",),
    "study/overview.py": ("torch", "lorasc_ds.algorithm", "lorasc_ds.train", "lorasc_ds.run", "lorasc_ds.sharding"),
    "study/publishing.py": ("torch", "lorasc_ds.train", "lorasc_ds.run", "lorasc_ds.sharding"),
    "cascade.py": (
        "lorasc_ds.run",
        "lorasc_ds.train",
        "lorasc_ds.tasks",
        "lorasc_ds.data",
        "peft",
        "deepspeed",
        "accelerate",
    ),
}


IMPORTERS = {"plugin": ("__init__.py", "callback.py"), "callback": ("__init__.py",)}  # module -> who may import it


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {f"{n.module}.{a.name}" for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names}


def within(path: Path, place: str) -> bool:
    relative = path.relative_to(PACKAGE).as_posix()
    return relative == place or (place.endswith("/") and relative.startswith(place))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_respect_the_layers(path: Path) -> None:
    names = imported(path)
    for engine, places in OWNERS.items():
        uses = {name for name in names if f"{name}.".startswith(f"{engine}.")}
        assert not uses or any(within(path, place) for place in places), f"{uses} belong to {places}"
    for place, forbidden in FORBIDDEN.items():
        if within(path, place):
            own = {name for name in names if name.startswith(f"lorasc_ds.{place.rstrip('/')}.")}
            uses = {n for n in names - own for f in forbidden if f"{n}.".startswith(f if f.endswith(".") else f"{f}.")}
            assert not uses, f"{path.name} must not import {uses}"


@pytest.mark.parametrize("module", IMPORTERS)
def test_nothing_else_knows_the_plugin(module: str) -> None:
    users = {path for path in FILES if any(f"{name}.".startswith(f"lorasc_ds.{module}.") for name in imported(path))}
    assert users == {PACKAGE / name for name in IMPORTERS[module]}


def test_every_rule_names_something_that_exists() -> None:
    places = {place for owners in OWNERS.values() for place in owners} | set(FORBIDDEN)
    assert all((PACKAGE / place).exists() for place in places)


def test_nothing_dangerous_is_called() -> None:
    """Data stays data: no pickle, no eval, no shell, no unsafe YAML."""
    for path in FILES:
        text = path.read_text()
        for word in ("pickle", "weights_only=False", "shell=True", "yaml.unsafe", "torch.load", " eval(", " exec("):
            assert word not in text, f"{path.name}: {word}"
