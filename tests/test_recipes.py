"""Every recipe is whole and can be prepared, and the README's commands are what it says they are."""

from __future__ import annotations

import json
import math
import re
import shlex
from multiprocessing import active_children
from pathlib import Path
from typing import Any, get_args

import image_models
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import RECIPE, ROOT
from peft import LoraConfig, get_peft_model
from recipe_cases import FOLDER, TinyModels, config_of, files_of, written
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, get_linear_schedule_with_warmup

from lorasc_ds import Cascade
from lorasc_ds.algorithm.ledger import Ledger
from lorasc_ds.config import AdapterConfig, CascadeConfig, Config
from lorasc_ds.method import make_method, make_plan
from lorasc_ds.preparation import prepare
from lorasc_ds.run_directory import flatten
from lorasc_ds.train import main

RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))
ON_THE_QUICKSTART = [name for name in RECIPES if name.startswith("quickstart")]
ON_OTHERS = [name for name in RECIPES if not name.startswith("quickstart")]
README = (ROOT / "README.md").read_text(encoding="utf-8")
METHODS = README.split("\n## Methods\n")[1].split("\n## ")[0]
MAKE_A_METHOD = {
    "adapter.method", "adapter.loraplus_lr_ratio", "cascade.strategy", "cascade.slow_retention",
    "cascade.noise_intensity", "cascade.prune_method", "cascade.prune_fraction", "training.learning_rate",
}  # fmt: skip


def settings(config: Config, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    return {key: value for key, value in flatten(config.model_dump(mode="json")).items() if key not in without}


def tables() -> list[list[str]]:
    """The rows of every table in the README's section Methods, without the heads."""
    found: list[list[str]] = []
    above = ""
    for line in METHODS.split("\n"):
        if line.startswith("|"):
            if not above.startswith("|"):
                found.append([])
            found[-1].append(line)
        above = line
    return [table[2:] for table in found]


def flags_in(row: str) -> list[str]:
    """Of the first code span of a row that holds flags; a row without one is a mistake."""
    spans = [span for span in re.findall(r"`([^`]+)`", row) if span.startswith("--")]
    assert spans, f"no flags in {row}"
    return shlex.split(spans[0])


METHOD_ROWS, PAPER_ROWS = tables()


def name_of(row: str) -> str:
    return " ".join(flags_in(row))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_whole(name: str) -> None:
    """It parses, says its editor's schema and what it is, and leaves no setting of the method to a default."""
    schema, comment, *_ = (FOLDER / name).read_text(encoding="utf-8").split("\n")
    assert schema == "# yaml-language-server: $schema=schema.json"
    assert re.match(r"# \w", comment)
    sections = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    stated = {f"{section}.{key}" for section, values in sections.items() for key in values}
    always = "model.name_or_path", "adapter.rank", "adapter.lora_alpha", "cascade.strategy", "task.name"
    always += "training.epochs", "training.batch_size", "training.learning_rate"
    assert set(always) <= stated
    strategy = config_of(recipe=name).cascade.strategy
    assert ("cascade.slow_retention" in stated) == (strategy in ("slow", "lorasc"))
    assert ("cascade.noise_intensity" in stated) == (strategy in ("noisytune", "lorasc"))


@pytest.mark.parametrize("name", ON_THE_QUICKSTART)
def test_a_recipe_on_the_quickstart_differs_from_it_by_its_method_and_can_be_prepared(name: str) -> None:
    config, quickstart = config_of(recipe=name), settings(config_of())
    differing = {key for key, value in settings(config).items() if value != quickstart[key]}
    assert differing <= MAKE_A_METHOD
    numbers = prepare(config_of("--task.test_examples=10", recipe=name)).derived_numbers()
    assert not [line for line in numbers if line.startswith("note")], "it states what its strategy does not use"


def test_every_strategy_and_adapter_has_a_recipe_and_a_row() -> None:
    strategies, adapters = (
        set(get_args(section.model_fields[key].annotation))
        for section, key in ((CascadeConfig, "strategy"), (AdapterConfig, "method"))
    )
    configs = [config_of(recipe=name) for name in ON_THE_QUICKSTART]
    assert {config.cascade.strategy for config in configs} == strategies
    assert {config.adapter.method for config in configs} == adapters
    configs = [config_of(*flags_in(row)) for row in METHOD_ROWS]
    assert {config.cascade.strategy for config in configs} == strategies
    assert {config.adapter.method for config in configs} == adapters


@pytest.mark.parametrize("row", METHOD_ROWS, ids=name_of)
def test_the_flags_of_a_method_make_its_recipe(row: str) -> None:
    """But for the learning rate, and for settings that the method does not use."""
    config = config_of(*flags_in(row))
    if "rslora" in row:
        assert config.adapter.use_rslora
        return
    (recipe,) = re.findall(r"`([\w-]+\.yaml)`", row)
    from_recipe = config_of(recipe=recipe)
    assert make_method(config.cascade) == make_method(from_recipe.cascade)
    unused = "training.learning_rate", "cascade.slow_retention", "cascade.noise_intensity"
    assert settings(config, without=unused) == settings(from_recipe, without=unused)


PAPER_TASKS = ["rte", "sst2", "cb", "boolq", "wsc", "wic", "multirc", "copa", "record", "squad", "drop", "gsm8k"]
EXECUTED = [(name, None) for name in ON_OTHERS] + [("llama2-7b.yaml", task) for task in PAPER_TASKS[1:]]


@pytest.mark.parametrize(("name", "task"), EXECUTED, ids=lambda value: str(value or ""))
def test_a_recipe_takes_two_steps_and_is_scored(
    name: str, task: str | None, tiny_models: TinyModels, shared_data: Path, tmp_path: Path
) -> None:
    """On a tiny model of its architecture and on released files: the loss is a number, every split has its scores."""
    other = [f"--task.name={task}"] if task else []
    recipe = config_of(*other, recipe=name)
    flags = [*other, *files_of(recipe.task.name, shared_data, tmp_path)]
    flags += [f"--model.name_or_path={tiny_models(recipe.model.name_or_path)}", "--training.max_steps=2"]
    flags += ["--training.warmup_steps=0", "--training.batch_size=2", "--training.micro_batch_size=1"]
    flags += ["--cascade.experts=2", "--training.save_model=false", "--tracking.tensorboard=false"]
    directory = tmp_path / "run"
    assert main(["--config", str(FOLDER / name), "--output_dir", str(directory), *flags], RECIPE) == 0
    summary = json.loads((directory / "summary.json").read_text())
    assert (summary["steps"], summary["experts"]) == (2, 2)
    assert summary["eval"].keys() == summary["eval_before"].keys()
    metric = {"squad": "f1", "drop": "f1", "gsm8k": "exact_match"}.get(recipe.task.name, "accuracy")
    metric = "perplexity" if recipe.task.name in ("alpaca", "instructions", "text") else metric
    assert all(metric in scores and math.isfinite(scores["loss"]) for scores in summary["eval"].values())
    assert not active_children(), "processes that decode end with the run"


def test_the_recipe_of_the_paper_s_table_3_adapts_the_vision_tower_alone(shared_data: Path, tmp_path: Path) -> None:
    """On bigG/14's own shape, of which no weight is read: pairs of 48 layers x 2 x 8 x (1664 + 1664)."""
    image_models.bigg14().save_pretrained(tmp_path)
    image_models.write_preprocessor(tmp_path, "clip", 224)
    image_models.clip_tokenizer().save_pretrained(tmp_path)
    flags = [f"--model.name_or_path={tmp_path}", *files_of("imagenet", shared_data, tmp_path)]
    prepared = prepare(config_of(*flags, "--training.batch_size=4", recipe="clip-vit-bigg-14-imagenet.yaml"))
    assert all(weight.name.startswith("vision_model.") for weight in prepared.weights)
    assert len(prepared.weights) == 48 * 2
    assert sum(p.numel() for p in prepared.network.parameters() if p.requires_grad) == 2_555_904
    assert {parameter.device.type for parameter in prepared.network.parameters()} == {"meta"}


@pytest.fixture
def tiny_rte(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """What puts a tiny model and released rows, 1500 to draw from, in the place of Llama-2-7B and the hub."""
    row = {"premise": "a b c", "hypothesis": "d", "label": "entailment"}
    for name, count in (("train", 1500), ("val", 2)):
        written(tmp_path, f"{name}.jsonl", [row] * count)
    return [f"--model.name_or_path={tiny_folder}", f"--task.data_dir={tmp_path}"]


def test_the_paper_s_rows_are_their_experts_over_1250_steps(tiny_rte: list[str]) -> None:
    adapters = [[], *(flags_in(row) for row in PAPER_ROWS if "--adapter" in row)]
    assert len(adapters) == 3
    rows = [flags_in(row) for row in PAPER_ROWS if "--adapter" not in row]
    prepared = prepare(config_of(*tiny_rte, recipe="llama2-7b.yaml"))
    assert prepared.plan.steps == 1250
    experts = {"lora": 1, "cola": 2, "cascade": 5, "slow": 5, "lorasc": 5}
    for flags in rows:
        for adapter in adapters if "--cascade.strategy" in flags else [[]]:
            config = config_of(*flags, *adapter, recipe="llama2-7b.yaml")
            plan = make_plan(config.cascade, prepared.plan.steps, config.training.epochs)
            wanted = int(flags[1]) if flags[0] == "--cascade.experts" else experts[flags[1]]
            assert plan.experts == wanted
    assert sorted(int(flags[1]) for flags in rows if flags[0] == "--cascade.experts") == [2, 5, 25, 125, 1250]
    assert {flags[1] for flags in rows if flags[0] == "--cascade.strategy"} == set(experts)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers for it
def test_the_loops_of_the_readme_run(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before, after, _ = re.findall(r"```python\n(.*?)```", METHODS, re.DOTALL)
    model = get_peft_model(tiny_llama, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    ids = torch.randint(4, 40, (8, 6), generator=torch.Generator().manual_seed(0))
    loader = DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=4)  # type: ignore[arg-type]
    names: dict[str, Any] = {"torch": torch, "Accelerator": Accelerator, "Cascade": Cascade, "model": model}
    names |= {"loader": loader, "epochs": 3, "get_linear_schedule_with_warmup": get_linear_schedule_with_warmup}
    exec(before, dict(names))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # as a model that has not been trained
            parameter.data.zero_()
    exec(after, dict(names))
    assert [record.steps for record in Ledger.load(tmp_path / "runs/mine/ledger").experts] == [(0, 2), (2, 4), (4, 6)]
    LlamaForCausalLM.from_pretrained(tmp_path / "runs/mine/model")
