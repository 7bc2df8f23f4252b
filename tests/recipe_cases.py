"""A recipe's run in small: its settings, released files or stand-ins for them, and tiny models of its architecture."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import image_models
import torch
from conftest import RECIPE
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lorasc_ds.cli import parse_command_line
from lorasc_ds.config import Config

FOLDER = RECIPE.parent


def config_of(*arguments: str, recipe: str = "quickstart.yaml") -> Config:
    invocation = parse_command_line(["--config", str(FOLDER / recipe), *arguments], RECIPE)
    assert not isinstance(invocation, str)
    return invocation.config


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


class TinyModels:
    """A tiny random model of the architecture that a hub id names, with a real tokenizer; each is made once."""

    def __init__(self, data: Path, make_folder: Callable[[str], Path]) -> None:
        self._data, self._make_folder = data, make_folder
        self._found: dict[str, Path] = {}

    def __call__(self, name: str) -> Path:
        if name == "quickstart-vit":
            return Path(name)
        kind = next((kind for kind in ("Qwen3", "clip", "vit") if kind.lower() in name.lower()), "llama").lower()
        if kind not in self._found:
            self._found[kind] = self._make(kind, self._make_folder(kind))
        return self._found[kind]

    def _make(self, kind: str, folder: Path) -> Path:
        if kind == "clip":  # every task of an evaluation reads the tokenizer: CLIP's own takes half a second
            return image_models.clip(folder, whole_tokenizer=False)
        if kind == "vit":  # without a classifier, as the one that the recipe names
            return image_models.vit(folder, classes=None)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE))
        model.generation_config.eos_token_id = [*range(SHAPE["vocab_size"] // 2)]  # answers end soon
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(self._data / "models" / "stories260K").save_pretrained(folder)
        return folder
