"""Every recipe is whole and can be prepared, and the README's commands are what it says they are."""

from __future__ import annotations

import gzip
import importlib
import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, product
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
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    get_linear_schedule_with_warmup,
)

from lorasc_ds import Cascade
from lorasc_ds.algorithm.ledger import Ledger
from lorasc_ds.cli import parse_command_line
from lorasc_ds.config import AdapterConfig, CascadeConfig, Config
from lorasc_ds.method import make_method, make_plan
from lorasc_ds.preparation import prepare
from lorasc_ds.run_directory import flatten
from lorasc_ds.study.options import StudyOptions, load_study, parse_options
from lorasc_ds.study.records import read as read_record
from lorasc_ds.study.study import job_of
from lorasc_ds.study.study_config import StudyConfig
from lorasc_ds.study.worker import perform
from lorasc_ds.tasks.mce import ALEXNET, SEVERITIES
from lorasc_ds.train import main

FOLDER = RECIPE.parent
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))
ON_THE_QUICKSTART = [name for name in RECIPES if name.startswith("quickstart")]
ON_OTHERS = [name for name in RECIPES if not name.startswith("quickstart")]
README = (ROOT / "README.md").read_text(encoding="utf-8")
METHODS = README.split("\n## Methods\n")[1].split("\n## ")[0]
MAKE_A_METHOD = {
    "adapter.method", "adapter.loraplus_lr_ratio", "cascade.strategy", "cascade.slow_retention",
    "cascade.noise_intensity", "cascade.prune_method", "cascade.prune_fraction", "training.learning_rate",
}  # fmt: skip


def config_of(*arguments: str, recipe: str = "quickstart.yaml") -> Config:
    invocation = parse_command_line(["--config", str(FOLDER / recipe), *arguments], RECIPE)
    assert not isinstance(invocation, str)
    return invocation.config


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


def written(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows))


def photographs(folder: Path) -> None:
    """Pieces of two real photographs: six of each for training, two held out."""
    for wnid, name in (("n03028079", "china.jpg"), ("n11939491", "flower.jpg")):
        whole = Image.fromarray(load_sample_image(name))
        for at in range(8):
            piece = folder / ("train" if at < 6 else "val") / wnid / f"{at}.jpg"
            piece.parent.mkdir(parents=True, exist_ok=True)
            whole.crop((70 * at, 100, 70 * at + 130, 200)).save(piece)


def files_of(task: str, data: Path, made: Path) -> list[str]:
    """Flags that put released files, real or made, in the place of a hub data set or of one's own file."""
    folders = {"gsm8k": data / "gsm8k"}
    for name, folder in (("rte", "RTE"), ("cb", "CB"), ("wsc", "WSC"), ("copa", "COPA")):
        folders[name] = data / "superglue" / folder
    for name, folder in (("boolq", "BoolQ"), ("record", "ReCoRD")):
        folders[name] = data / "superglue" / "fewglue32" / folder
    if task == "squad":  # an article: the whole release takes seconds to read
        release = json.loads(gzip.decompress((data / "squad" / "dev-v1.1.rebuilt.json.gz").read_bytes()))
        for name in ("train", "dev"):
            (made / f"{name}-v1.1.json").write_text(json.dumps({"data": release["data"][:1]}))
    if task == "sst2":
        for name in ("train", "dev"):
            (made / f"{name}.tsv").write_text("sentence\tlabel\n" + "a gripping ride \t1\na bore \t0\n" * 8)
    if task == "wic":
        row = {"word": "place", "sentence1": "Come to my place.", "sentence2": "A political place.", "label": False}
        for name in ("train", "val"):
            written(made, f"{name}.jsonl", [row | {"idx": n} for n in range(12)])
    if task == "multirc":
        answers = [{"text": "Ann", "label": 1}, {"text": "Bob", "label": 0}]
        row = {"passage": {"text": "Ann has a dog.", "questions": [{"question": "Who has a dog?", "answers": answers}]}}
        for name in ("train", "val"):
            written(made, f"{name}.jsonl", [row] * 6)
    if task == "drop":
        for name in ("train", "dev"):
            shutil.copy(data / "drop" / "allennlp_fixture_drop.json", made / f"drop_dataset_{name}.json")
    if task in ("imagenet", "images"):
        photographs(made)
        (made / "names.txt").write_text("temple\nflower\n")
        names = [f"--task.class_names={made / 'names.txt'}"] if task == "imagenet" else []
        return [f"--task.data_dir={made}", "--task.dev_examples=2", *names]
    if task in ("alpaca", "instructions"):
        written(made, "train.jsonl", json.loads((data / "alpaca" / "random_9k.json").read_text())[:12])
        return [f"--task.train_file={made / 'train.jsonl'}", "--task.dev_examples=2"]
    if task == "text":
        (made / "train.txt").write_text("Once upon a time there was a little dog. " * 400)
        return [f"--task.train_file={made / 'train.txt'}", "--task.block_size=32"]
    sizes = [f"--task.{split}_examples={count}" for split, count in (("train", 2), ("dev", 2), ("test", 2))]
    if task == "digit_images":
        return sizes
    answers = ["--task.max_new_tokens=16"] if task == "gsm8k" else []
    return [f"--task.data_dir={folders.get(task, made)}", *sizes, *answers]


SHAPE = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 4096}


@pytest.fixture(scope="session")
def tiny_models(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny random model of the architecture that a hub id names, with a real tokenizer."""
    found: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name == "quickstart-vit":
            return Path(name)
        kind = next((kind for kind in ("Qwen3", "clip", "vit") if kind.lower() in name.lower()), "llama").lower()
        if kind not in found:
            found[kind] = tmp_path_factory.mktemp(kind)
            if kind == "clip":  # every task of an evaluation reads the tokenizer: CLIP's own takes half a second
                return image_models.clip(found[kind], whole_tokenizer=False)
            if kind == "vit":  # without a classifier, as the one that the recipe names
                return image_models.vit(found[kind], classes=None)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE))
            model.generation_config.eos_token_id = [*range(SHAPE["vocab_size"] // 2)]  # answers end soon
            model.save_pretrained(found[kind])
            AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K").save_pretrained(found[kind])
        return found[kind]

    return folder_of


PAPER_TASKS = ["rte", "sst2", "cb", "boolq", "wsc", "wic", "multirc", "copa", "record", "squad", "drop", "gsm8k"]
EXECUTED = [(name, None) for name in ON_OTHERS] + [("llama2-7b.yaml", task) for task in PAPER_TASKS[1:]]


@pytest.mark.parametrize(("name", "task"), EXECUTED, ids=lambda value: str(value or ""))
def test_a_recipe_takes_two_steps_and_is_scored(
    name: str, task: str | None, tiny_models: Callable[[str], Path], shared_data: Path, tmp_path: Path
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


PAPER_STUDIES = ["table1", "table2", "table3", "table4", "figure2", "rank_growth", "noise", "retention"]
ROBUSTNESS = importlib.import_module("lorasc_ds.tasks.robustness")  # the package has a function of this name
MOST_EXPERTS = 1250 if "LORASC_LONG" in os.environ else 25  # .ci/long: 125 take ten seconds and 1250 minutes


def robustness_sets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sets where Table 3's study looks for them from `folder`, as if ImageNet had two classes, the photographs'."""
    photographs(folder)
    held_out, data = folder / "val", folder / "data"
    wordnet_ids = sorted(path.name for path in held_out.iterdir())
    monkeypatch.setattr(ROBUSTNESS, "WORDNET_IDS", wordnet_ids)
    monkeypatch.setattr(ROBUSTNESS, "SUBSETS", dict.fromkeys(ROBUSTNESS.SUBSETS, (0, 1)))
    for corruption, severity in product(ALEXNET, SEVERITIES):
        (data / "imagenet-c" / corruption).mkdir(parents=True, exist_ok=True)
        (data / "imagenet-c" / corruption / str(severity)).symlink_to(held_out)
    for name in ("imagenet-r", "imagenet-a", "sketch", "imagenet-stylized"):
        (data / name).symlink_to(held_out)
    for number, wordnet_id in enumerate(wordnet_ids):  # as V2's classes are called
        shutil.copytree(held_out / wordnet_id, data / "imagenetv2" / str(number))


def by_task(file: Path, study: StudyConfig, model: Path, data: Path, folder: Path) -> list[StudyOptions]:
    """The study once for each of its tasks, at a rate and seed, with an epoch of one step on files in `folder`."""
    common = [str(file), "--output_dir=out", "--seeds=0", "--training.learning_rate=1e-4", "--training.warmup_steps=0"]
    common += ["--training.evaluate=end", "--training.select=last", "--training.data_workers=0"]
    found = []
    for at, (task, variant) in enumerate(study.tasks.items()):
        kind = variant.set.get("task.name", config_of(recipe=Path(study.recipe).name).task.name)
        (made := folder / f"made{at}").mkdir()
        step = 10 if kind in ("alpaca", "imagenet") else 2  # all training examples of `files_of`
        flags = [f"--tasks={task}", f"--model.name_or_path={model}", *files_of(kind, data, made)]
        flags += [f"--training.batch_size={step}", f"--training.micro_batch_size={step}"]
        flags += ["--task.templates=simple" if kind == "imagenet" else "--training.max_length=288"]
        found.append(parse_options([*common, *flags]))
    return found


@pytest.mark.parametrize("name", PAPER_STUDIES)
def test_every_row_of_a_study_of_the_paper_is_trained_and_has_its_scores(
    name: str, tiny_models: Callable[[str], Path], shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all its experts, epochs and ranks, at one point of its grid; the next row on the study's next task."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lorasc_ds.inspection.files_of", lambda figures: {})  # sixty pictures take half a minute
    file = FOLDER.parent / "studies" / f"{name}.yaml"
    study = load_study(file)
    model = tiny_models(config_of(recipe=Path(study.recipe).name).model.name_or_path)
    studies = by_task(file, study, model, shared_data, tmp_path)
    scored: dict[str, Any] = {}
    if name == "table2":
        scored = {"data_dir": str(shared_data), "limit": 1, "sandbox": "none"}
    if name == "table3":
        scored = {"data_dir": "data", "limit": 1}
        robustness_sets(tmp_path, monkeypatch)
    monkeypatch.setattr("sys.argv", [])  # which a run changes
    rows = dict.fromkeys(run.row for run in studies[0].runs)
    for row, options in zip(rows, cycle(studies), strict=False):
        run = next(run for run in options.runs if run.row == row)
        cascade, epochs = run.config.cascade, round(run.config.training.epochs)
        by_default = {"lora": 1, "cola": 2}.get(cascade.strategy, epochs)
        experts = by_default if cascade.experts is None else cascade.experts
        if experts > MOST_EXPERTS:
            continue
        job = job_of(replace(options, study=study.model_copy(update={"evaluate": study.evaluate | scored})), run)
        if experts > epochs:
            job = replace(job, train=(*job.train, f"--training.max_steps={experts}"))
        assert perform(job) == 0, run.title
        record = read_record(run, job)
        assert record.state == "done"
        assert record.facts is not None
        assert (record.facts["steps"], record.facts["experts"]) == (max(experts, epochs), experts)
        variant = study.tasks[run.task]
        names = [*(variant.scores or study.scores).values(), variant.select_by or study.select_by]
        values = {score: record.score(score) for score in names}
        assert all(value is not None and math.isfinite(value) for value in values.values()), (run.title, values)
