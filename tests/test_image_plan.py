"""A run on images without a dev split, with a head of text, and with classes that have no names: its plan, its refusals."""

from __future__ import annotations

from pathlib import Path

import image_models
import pytest
from PIL import Image

from lorasc_ds.cli import parse_command_line
from lorasc_ds.config import Config
from lorasc_ds.duration import OPERATIONS, REACHED, prompt_seconds, scored_in
from lorasc_ds.errors import ConfigError
from lorasc_ds.preparation import prepare
from lorasc_ds.selection import Patience

RECIPE = Path(__file__).parents[1] / "launch" / "recipes" / "clip-vit-bigg-14-imagenet.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plan")
    image_models.clip(root / "clip")
    for split in ("train", "val"):
        for name in ("n01440764", "n01443537"):
            (root / split / name).mkdir(parents=True)
            for at in range(5):
                Image.new("RGB", (8, 8)).save(root / split / name / f"{at}.png")
    (root / "names.txt").write_text("tench\ngoldfish\n")
    return root


def configured(folder: Path, *flags: str) -> Config:
    given = [f"--model.name_or_path={folder / 'clip'}", f"--task.data_dir={folder}", "--training.batch_size=4"]
    given += [f"--task.class_names={folder / 'names.txt'}", "--task.templates=simple"]
    invocation = parse_command_line(["--config", str(RECIPE), *given, *flags], RECIPE)
    assert not isinstance(invocation, str)
    return invocation.config


def test_the_papers_recipe_trains_on_all_images(folder: Path) -> None:
    preparation = prepare(configured(folder))
    assert {split: len(examples) for split, examples in preparation.splits.items()} == {"train": 10, "test": 10}
    assert preparation.data.steps_per_epoch == 3  # the last of two images
    assert "task      imagenet: 10 train, 10 test;" in preparation.derived_numbers()[0]
    patience = Patience(None)
    patience.consider(3, {"test": {"loss": 1.0}})
    assert not patience.over
    assert patience.state() == []


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--training.select=best_dev", "training.select best_dev"),
        ("--training.early_stopping_patience=3", "training.early_stopping_patience 3"),
        ("--cascade.noise_intensity=auto", "cascade.slow_retention or noise_intensity auto"),
    ],
)
def test_what_needs_a_dev_split_is_refused(folder: Path, flag: str, named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named} needs the dev loss, but task.dev_examples is 0: hold"):
        prepare(configured(folder, flag))


def test_wordnet_ids_are_refused_by_a_head_of_text(folder: Path) -> None:
    ids = folder / "ids.txt"
    ids.write_text("n01440764\nn01443537\n")
    with pytest.raises(ConfigError, match=r"^task.class_names: 2 of 2 classes are called by WordNet id"):
        prepare(configured(folder, f"--task.class_names={ids}"))


def test_a_live_text_tower_takes_time(folder: Path) -> None:
    assert prompt_seconds(scored_in(prepare(configured(folder)))) == 0
    preparation = prepare(configured(folder, "--task.head=text"))
    text = preparation.shape.config.text_config
    layer = 4 * text.hidden_size * (text.hidden_size + 1) + 2 * text.hidden_size * 2
    layer += text.intermediate_size * (2 * text.hidden_size + 1) + text.hidden_size
    whole = (
        text.num_hidden_layers * layer
        + 2 * text.hidden_size
        + text.hidden_size * preparation.shape.config.projection_dim
    )
    tokens = 2 * 1 * preparation.reading.prompts.ids.shape[1]
    assert prompt_seconds(scored_in(preparation)) == pytest.approx(
        2 * whole * tokens / (REACHED * OPERATIONS["bfloat16"])
    )
