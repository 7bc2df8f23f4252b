"""Recipes, overrides, help and schema; and one line for every configuration that is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from conftest import RECIPE, ROOT

from lorasc_ds.cli import fields_of, json_schema, make_parser, parse_command_line, to_yaml
from lorasc_ds.config import Config
from lorasc_ds.train import main


def config_of(recipe: str, *arguments: str, folder: Path) -> Config:
    path = folder / "recipe.yaml"
    path.write_text(recipe)
    invocation = parse_command_line(["--config", str(path), *arguments], RECIPE)
    assert not isinstance(invocation, str)
    return invocation.config


def test_overrides_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path: Path) -> None:
    config = config_of(
        "training:\n  learning_rate: 1e-4\n  epochs: 2\n", "--training.learning_rate", "3e-4", "--model.dtype=bfloat16",
        "--adapter.target_modules=k_proj, o_proj", "--training.max_grad_norm=null", folder=tmp_path,
    )  # fmt: skip
    assert config.training.learning_rate == 3e-4
    assert config.training.epochs == 2.0
    assert config.training.batch_size == 4
    assert config.training.max_grad_norm is None
    assert config.model.dtype == "bfloat16"
    assert config.adapter.target_modules == ("k_proj", "o_proj")


def test_numbers_and_words_are_what_they_look_like(tmp_path: Path) -> None:
    config = config_of(
        "training: {learning_rate: 1e-4}\ntask: {name: text, train_file: no.txt, text_field: on}\n", folder=tmp_path
    )
    assert config.training.learning_rate == 1e-4
    assert config.task.model_dump()["text_field"] == "on"


def test_another_task_replaces_the_recipe_s(tmp_path: Path) -> None:
    config = config_of("task: {domain: rotated}\n", "--task.name=text", "--task.train_file=1e5.txt", folder=tmp_path)
    assert config.task.model_dump()["train_file"] == "1e5.txt"


def test_the_resolved_configuration_reads_back(tmp_path: Path) -> None:
    """Texts that look like numbers or truth values included."""
    overrides = ("--cascade.experts=3", "--model.revision=12e4567", "--model.name_or_path=true")
    config = config_of("adapter: {target_modules: [q_proj]}\n", *overrides, folder=tmp_path)
    assert config_of(to_yaml(config), folder=tmp_path) == config


BAD = {
    "unknown key": ("training:\n  lerning_rate: 1", [], r"unknown key training\.lerning_rate \(.*yaml:2\); did you mean training\.learning_rate\?"),
    "unknown section": ("trainin: {}", [], r"unknown key trainin .*did you mean training"),
    "a misspelt section": ("trainig: {epochs: 3}", [], r"unknown key trainig \(.*yaml:1\); did you mean training\?"),
    "a dotted key in YAML": ("training.epochs: 3", [], r"unknown key training\.epochs \(.*yaml:1\)"),
    "a key of another task": ("", ["--task.name=text", "--task.train_file=a.txt", "--task.domain=rotated"], r"unknown key task\.domain \(--task\.domain\); task text does not have it"),
    "a rate beyond sense": ("", ["--training.learning_rate=1e38"], r"training\.learning_rate is 1e\+?38 .*less than or equal to 100"),
    "unknown key of a task": ("task: {domian: rotated}", [], r"unknown key task\.domian .*did you mean task\.domain\?"),
    "unknown flag": ("", ["--adapter.rnk=3"], r"unknown argument --adapter\.rnk=3; did you mean --adapter\.rank\?"),
    "duplicate key": ("training:\n  epochs: 1\n  epochs: 2", [], r"yaml:3: training\.epochs stands twice, first at .*yaml:2"),
    "wrong type": ("training:\n  epochs: many", [], r"training\.epochs is 'many' \(.*yaml:2\): needs to be a valid number"),
    "wrong type, flag": ("", ["--training.epochs=many"], r"training\.epochs is 'many' \(--training\.epochs\)"),
    "a truth value as a number": ("training:\n  batch_size: true", [], r"training\.batch_size is True"),
    "retention of one": ("cascade: {slow_retention: 1.0}", [], r"cascade\.slow_retention is 1\.0 .*less than 1"),
    "retention below zero": ("", ["--cascade.slow_retention=-0.1"], r"cascade\.slow_retention is -0\.1 .*greater than or equal to 0"),
    "negative noise": ("", ["--cascade.noise_intensity=-1"], r"cascade\.noise_intensity is -1 .*greater than or equal to 0"),
    "not a number": ("cascade: {noise_intensity: .nan}", [], r"cascade\.noise_intensity is nan .*finite"),
    "rank zero": ("", ["--adapter.rank=0"], r"adapter\.rank is 0 .*greater than or equal to 1"),
    "no targets": ("adapter: {target_modules: []}", [], r"adapter\.target_modules is \[\]"),
    "float16": ("", ["--model.dtype=float16"], r"model\.dtype is 'float16' .*'float32' or 'bfloat16'"),
    "two experts of lora": ("", ["--cascade.strategy=lora", "--cascade.experts=2"], r"cascade\.experts is 2, but cascade\.strategy lora trains one"),
    "batch not divisible": ("", ["--training.batch_size=6", "--training.micro_batch_size=4"], r"batch_size 6 is not divisible by training\.micro_batch_size 4"),
    "nothing to select from": ("training: {select: best_dev, evaluate: end}", [], r"select best_dev needs the dev loss of every epoch"),
    "too many images": ("task: {train_examples: 200, dev_examples: 98}", [], r"is more than the 297 images"),
    "unknown task": ("", ["--task.name=poems"], r"task\.name is 'poems': one of 'digits', 'text', 'sst2', "),
    "missing key": ("task: {name: text}", [], r"task\.train_file is needed: set it in the recipe or with --task\.train_file"),
    "unknown suffix": ("task: {name: text, train_file: a.csv}", [], r"task\.train_file is 'a\.csv': a name that ends in"),
    "no section": ("model: tiny", [], r"model is 'tiny' \(.*yaml:1\): a section with keys"),
    "no mapping": ("- 1", [], r"holds a list"),
    "no YAML": ("a: [", [], r"is not YAML"),
    "a tag": ("a: !!python/object/apply:os.system [true]", [], r"could not determine a constructor"),
    "an old octal": ("training: {seed: 010}", [], r"training\.seed is '010' .*valid integer"),
    "a date": ("training: {epochs: 2001-99-99}", [], r"training\.epochs is '2001-99-99'"),
    "a bad tag": ("training: {epochs: !!int abc}", [], r"is not YAML"),
    "a loop": ("training: &x {epochs: *x}", [], r"is not YAML"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_configuration_is_one_line_and_code_2(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, arguments, message = BAD[case]
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    assert main(["--config", str(path), "--output_dir", str(tmp_path / "out"), *arguments], RECIPE) == 2
    output = capsys.readouterr()
    assert len(output.err.splitlines()) == 1
    assert output.err.startswith("error: ")
    assert re.search(message, output.err), output.err
    assert not (tmp_path / "out").exists()


def test_print_config_shows_every_field_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print_config", "--cascade.experts=7"], RECIPE) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["cascade"]["experts"] == 7
    config = Config.model_validate({"task": {"name": "digits"}})
    for section in Config.model_fields:
        for name, field in type(getattr(config, section)).model_fields.items():
            assert re.search(rf"  # .*{re.escape(field.description or '?')}.*\n  {name}: ", printed)
    assert "One of: upright, mirrored, rotated, blurred." in printed


def test_help_tells_the_values_and_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"], RECIPE)
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "One of: linear, cosine, constant. Default: null." in text
    assert "One of: digits, text, sst2, " in text


def test_every_field_has_a_meaning() -> None:
    assert all(field.description for fields in fields_of().values() for field in fields)


def test_the_schema_beside_the_recipes_is_current() -> None:
    shipped = ROOT / "launch" / "recipes" / "schema.json"
    assert shipped.read_text() == json_schema(), "run: python -m lorasc_ds.cli > launch/recipes/schema.json"


def test_public_flags_are_frozen() -> None:
    """A flag is a promise: a new one is added here on purpose, an old one is not taken away."""
    flags = {option for action in make_parser(RECIPE)._actions for option in action.option_strings}
    assert sorted(flags) == (ROOT / "tests" / "public_flags.txt").read_text().split()


def test_recipes_are_valid() -> None:
    recipes = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        parse_command_line(["--config", str(recipe)], RECIPE)
