"""Runs on images and text by the command: what is learnt, under ZeRO-3 too, saved, scored, exported, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RECIPE, Start, base_weights
from forking import Job, group
from forking import run as run_jobs
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from lorasc_ds import evaluate, export, show_data, train
from lorasc_ds.algorithm.ledger import Ledger, digest


def settings_of(known: Path, **changed: Any) -> list[str]:
    settings = {
        "model.name_or_path": known / "model",
        "task.name": "image_text",
        "task.train_file": known / "mirrored" / "train.jsonl",
        "task.test_file": known / "mirrored" / "test.jsonl",
        "task.dev_examples": 40,
        "task.max_new_tokens": 4,
        "training.epochs": 4,
        "training.batch_size": 8,
        "training.micro_batch_size": 4,
        "training.eval_batch_size": 64,
        "training.learning_rate": 0.02,
        "tracking.log_steps": 1,
        "training.evaluate": "end",
        "cascade.noise_intensity": 0.1,
        "tracking.tensorboard": "false",
    }
    return [f"--{key}={value}" for key, value in (settings | changed).items()]


SHORT = {"training.max_steps": 12, "cascade.experts": 3, "cascade.noise_intensity": 1}


@pytest.fixture(scope="session")
def runs(known: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The command with images, and on two processes without them; a short run on one process, and on two under ZeRO-3."""
    folder = tmp_path_factory.mktemp("runs")
    engine = json.loads((RECIPE.parents[2] / "ds_configs" / "zero3.json").read_text())
    engine["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # or so small a model would stay whole
    (folder / "zero3.json").write_text(json.dumps(engine))
    jobs = {
        "images": (settings_of(known), [{}]),
        "blind": (settings_of(known, **{"task.use_images": "false"}), group(2)),  # a tower that has no part in the loss
        "short": (settings_of(known, **SHORT), [{}]),
        "zero3": ([*settings_of(known, **SHORT), f"--deepspeed={folder / 'zero3.json'}"], group(2)),
    }
    started = [
        Job("image_text_model:train", [f"--output_dir={folder / name}", *arguments], str(folder / name), 200, processes)
        for name, (arguments, processes) in jobs.items()
    ]
    for name, ended in zip(jobs, run_jobs(*started, at_once=2), strict=True):
        assert set(ended.codes) == {0}, (name, ended.err, ended.out)
    return {name: folder / name for name in jobs}


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def events(run: Path, name: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == name]


def exact_match(run: Path) -> tuple[float, float]:
    """On the test rows, before and after training."""
    before, after = events(run, "eval")[0], events(run, "eval")[-1]
    return before["scores"]["test"]["exact_match"], after["scores"]["test"]["exact_match"]


def test_it_learns_to_see_mirrored_digits(runs: dict[str, Path]) -> None:
    before, after = exact_match(runs["images"])
    blind = exact_match(runs["blind"])[1]
    assert after > before + 0.05
    assert after > blind + 0.15


def test_zero_3_makes_the_same_run(runs: dict[str, Path], known: Path) -> None:
    alone, cut_up = ([event["loss"] for event in events(runs[name], "step")] for name in ("short", "zero3"))
    assert len(alone) == 12
    assert cut_up == pytest.approx(alone, rel=1e-4, abs=1e-4)
    for name in ("short", "zero3"):
        ledger = Ledger.load(runs[name] / "ledger")
        base = base_weights(known / "model", list(ledger.weights))
        replayed = [weight for _, weight in ledger.replay(base.__getitem__)]
        assert digest(replayed) == summary_of(runs[name])["weights_sha256"]
        shipped = load_file(runs[name] / "model" / "model.safetensors")
        assert digest(shipped[one] for one in ledger.weights) == summary_of(runs[name])["weights_sha256"]
        assert {one.split(".")[0] for one in ledger.weights} == {"language_model", "vision_tower"}


def test_what_ships_is_loaded_with_its_processor_and_answers_the_same(runs: dict[str, Path], known: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(runs["images"] / "model").eval()
    processor = AutoProcessor.from_pretrained(runs["images"] / "model")
    rows = [json.loads(line) for line in (known / "mirrored" / "test.jsonl").read_text().splitlines()]
    right = 0
    for row in rows:
        given = processor(
            images=Image.open(known / "mirrored" / row["image"]),
            text=f"<image>\n{row['question']}\n",
            return_tensors="pt",
        )
        found = model.generate(**given, max_new_tokens=4, do_sample=False)[0, given["input_ids"].shape[1] :]
        right += processor.tokenizer.decode(found, skip_special_tokens=True) == row["answer"]
    assert right / len(rows) == exact_match(runs["images"])[1]


def test_evaluate_and_export_read_the_run(runs: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    run = runs["images"]
    exported = tmp_path / "exported"
    assert export.main([str(run), "--as=merged", f"--output_dir={exported}", "--compare=true"]) == 0
    of_task = [f"--image_text.{key}={value}" for key, value in summary_settings(run).items()]
    assert evaluate.main([str(run), f"--output_dir={tmp_path / 'run'}", "--records"]) == 0
    flags = ["--tasks=image_text", *of_task, "--dtype=float32", f"--output_dir={tmp_path / 'model'}"]
    assert evaluate.main([str(exported), *flags]) == 0
    for name in ("run", "model"):
        found = summary_of(tmp_path / name)["tasks"]["image_text"]["metrics"]["test"]
        assert found["exact_match"] == exact_match(run)[1]
    capsys.readouterr()


def summary_settings(run: Path) -> dict[str, Any]:
    settings = summary_of_task(run)
    return {key: settings[key] for key in ("train_file", "test_file", "dev_examples", "max_new_tokens")}


def summary_of_task(run: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load((run / "config.yaml").read_text())["task"]


@pytest.mark.parametrize(("target", "tower"), [("vision_tower.*.[qv]_proj", "vision_tower"), ("language_model.*.[qv]_proj", "language_model")])  # fmt: skip
def test_one_tower_alone_is_adapted(run: Start, known: Path, target: str, tower: str) -> None:
    changed = dict(one.removeprefix("--").split("=", 1) for one in settings_of(known))
    changed |= {"adapter.target_modules": f"[{target!r}]", "training.max_steps": 2, "training.select": "last"}
    done = run(**changed)
    names = list(Ledger.load(done.directory / "ledger").weights)
    assert len(names) == 4
    assert all(name.startswith(f"{tower}.") for name in names)
    before, after = (load_file(folder / "model.safetensors") for folder in (known / "model", done.directory / "model"))
    assert sorted(name for name in before if not torch.equal(before[name], after[name])) == sorted(names)


def test_the_vision_tower_alone_needs_images(known: Path, capsys: Any) -> None:
    changed = {"task.use_images": "false", "adapter.target_modules": "['vision_tower.*.q_proj']"}
    assert train.main(["--dry_run", *settings_of(known, **changed)], RECIPE) == 2
    assert (
        "vision_tower.encoder.layers.0.self_attn.q_proj.weight and the others are for images" in capsys.readouterr().err
    )


def test_packing_is_refused_and_data_is_shown(known: Path, capsys: Any) -> None:
    changed = dict(one.removeprefix("--").split("=", 1) for one in settings_of(known, **{"training.packing": "true"}))
    arguments = [f"--{key}={value}" for key, value in changed.items()]
    assert show_data.main(arguments, RECIPE) == 2
    assert "training.packing is true, but the rows of task image_text have images" in capsys.readouterr().err
    assert show_data.main([*arguments, "--training.packing=false", "--examples=1"], RECIPE) == 0
    shown = capsys.readouterr().out
    assert "<image><image><image><image>" in shown.replace(" ", "")
    assert "reference: " in shown
    assert "image: images/" in shown
    assert train.main(["--dry_run", *arguments, "--training.packing=false"], RECIPE) == 0
    assert "<image>" in capsys.readouterr().out
