"""Training on images: the heads against direct computations, and engines that must agree."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import image_models
import numpy as np
import pytest
import torch
from conftest import RECIPE, base_weights, digest_of_run
from forking import Job, group
from forking import run as run_jobs
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch.nn import functional
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from lorasc_ds import models
from lorasc_ds.algorithm.ledger import Ledger, digest
from lorasc_ds.classifier import ImageClassifier, make_rows, prompts_of, read_head, with_head
from lorasc_ds.config import ModelConfig
from lorasc_ds.errors import ConfigError
from lorasc_ds.export import main as export
from lorasc_ds.image_reading import ImageReading, image_reading
from lorasc_ds.images import Preprocessing, evaluation_pixels, preprocessing_of
from lorasc_ds.ledger_commands import roll_back
from lorasc_ds.tasks.base import Classes, Task
from lorasc_ds.tasks.images import StoredImage
from lorasc_ds.train import main as train

DS_CONFIGS = Path(__file__).parents[1] / "ds_configs"
HOW = Preprocessing(resize=None, crop=(32, 32), resample=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def network_of(folder: Path, **settings: Any) -> ImageClassifier:
    given: dict[str, Any] = {"names": ("cat", "old dog", "bus"), "templates": ("a photo of a {}.", "the {}.")}
    classes = Classes(**given | settings)
    model = CLIPModel.from_pretrained(folder).eval()
    network = ImageClassifier(model, classes, HOW, prompts_of(classes, AutoTokenizer.from_pretrained(folder), 77))
    network.eval()
    with torch.no_grad():
        make_rows(network, network)
    return network


def test_prototypes_are_the_normalised_means_of_normalised_text_features(tmp_path: Path) -> None:
    """One image and one prompt at a time, through the model's own forward pass."""
    folder = image_models.clip(tmp_path)
    network = network_of(folder)
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    size = model.config.vision_config.image_size
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    normalised = (pixels / 255 - torch.tensor(HOW.mean)[:, None, None]) / torch.tensor(HOW.std)[:, None, None]
    with torch.no_grad():
        logits = torch.zeros(2, 3)
        for at, name in enumerate(("cat", "old dog", "bus")):
            texts = []
            for template in ("a photo of a {}.", "the {}."):
                ids = tokenizer(template.replace("{}", name), return_tensors="pt")
                texts.append(model(**ids, pixel_values=normalised[:1]).text_embeds[0])
            prototype = functional.normalize(torch.stack(texts).mean(dim=0), dim=0)
            image = model(**ids, pixel_values=normalised).image_embeds
            logits[:, at] = model.logit_scale.exp() * image @ prototype
        torch.testing.assert_close(network(pixels), logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(network_of(folder, subset=(2, 0))(pixels), logits[:, [2, 0]], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(network_of(folder, head="text")(pixels), logits, rtol=1e-4, atol=1e-4)


ENGINES = {"plain": [], "workers": ["--training.data_workers=2"]}
ENGINES |= {stage: [f"--deepspeed={DS_CONFIGS / stage}.json"] for stage in ("zero2", "zero3")}
TRAINED_HEAD = ["--task.train_head=true", "--adapter.target_modules=vision_model.*.q_proj,vision_model.*.v_proj"]


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit", "dinov2"])
def test_pixels_that_a_model_does_not_take_are_refused(kind: str, tmp_path: Path) -> None:
    """As the model itself does with weights: DINOv2 interpolates its positions, the others do not."""
    folder = getattr(image_models, kind)(tmp_path, *([10] if kind in ("vit", "dinov2") else []))
    config, names = ModelConfig(name_or_path=str(folder)), tuple("abcdefghij")
    task = Task("images", "classes", "classification", {}, "accuracy", classes=Classes(names))

    def reading() -> ImageReading:
        return image_reading(config, task, Classes(names), models.load_shape(config), 0, 0)

    assert reading().layout.how.size == (32, 32)  # the model's
    image_models.write_preprocessor(folder, "vit", size=48)
    model: Any = models.load_model(config)
    pixels, read = torch.zeros(1, 3, 48, 48), getattr(model, "get_image_features", model)
    if kind == "dinov2":
        assert reading().layout.how.size == (48, 48)
        read(pixel_values=pixels)
        return
    with pytest.raises((ValueError, RuntimeError)):
        read(pixel_values=pixels)
    with pytest.raises(ConfigError, match=r"makes 48 x 48 pixels, which \w+ does not take \(.*\): set size") as caught:
        reading()
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """CLIP on folders of digits, with a head that is trained: one process, one with workers, two under ZeRO-2 and ZeRO-3.

    `resumed` is that under ZeRO-2, stopped inside its second expert; `text` trains both towers, and has no head.
    """
    folder = tmp_path_factory.mktemp("runs")
    pixels, labels = load_digits(return_X_y=True)
    for at in range(60):
        place = folder / "data" / ("train" if at < 40 else "test") / f"n{labels[at] % 3}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels[at].reshape(8, 8) * 15).astype("uint8")).resize((40, 36)).save(place / f"{at}.png")
    (folder / "data" / "train" / "n0" / "bad.png").write_bytes(b"no image")
    image_models.clip(folder / "clip")
    common = [f"--model.name_or_path={folder / 'clip'}", "--task.name=images", f"--task.data_dir={folder / 'data'}"]
    common += ["--task.templates=simple", "--task.dev_examples=8", "--training.epochs=2", "--training.batch_size=8"]
    common += ["--training.micro_batch_size=4", "--adapter.rank=4", "--training.learning_rate=1e-2"]
    common += ["--cascade.experts=2", "--tracking.tensorboard=false", "--training.data_workers=0"]

    def job(name: str, flags: list[str], stop: str | None = None) -> Job:
        arguments = [f"--output_dir={folder / name}", *common, *flags]
        processes = group(2) if any("zero" in flag for flag in flags) else [{}]
        stopping = ("interruptions:asked_to_stop", [stop, *arguments])
        function, given = stopping if stop else ("lorasc_ds.train:main", [arguments, str(RECIPE)])
        return Job(function, given, str(folder / name), 200, processes)

    zero2 = [*TRAINED_HEAD, *ENGINES["zero2"]]
    trained = {name: job(name, [*TRAINED_HEAD, *engine]) for name, engine in ENGINES.items()}
    first = {"stopped": job("resumed", zero2, stop="step#7:before")} | trained
    second = {"resumed": job("resumed", zero2), "text": job("text", ["--task.head=text"])}
    for jobs in (first, second):
        for name, ended in zip(jobs, run_jobs(*jobs.values(), at_once=2), strict=True):
            assert set(ended.codes) == {75 if name == "stopped" else 0}, (name, ended.err, ended.out)
    return {name: folder / name for name in (*trained, *second)}


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def check_replay(run: Path) -> None:
    """The base and the ledger give the weights that the run had, and those in its model."""
    ledger = Ledger.load(run / "ledger")
    base = base_weights(run.parent / "clip", list(ledger.weights))
    replayed = dict(ledger.replay(base.__getitem__))
    assert digest(replayed.values()) == digest_of_run(run)
    shipped = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(shipped[name], weight) for name, weight in replayed.items())


@pytest.mark.parametrize("engine", ["workers", "zero2", "zero3"])
def test_engines_agree_and_their_ledgers_replay(runs: dict[str, Path], engine: str) -> None:
    expected, found = summary_of(runs["plain"]), summary_of(runs[engine])
    for split, scores in expected["eval"].items():
        assert found["eval"][split]["loss"] == pytest.approx(scores["loss"], abs=1e-4)
    assert expected["eval"]["dev"]["loss"] != expected["eval_before"]["dev"]["loss"]
    assert (found["unreadable"], found["steps"]) == (expected["unreadable"], expected["steps"])
    assert expected["unreadable"] == 2  # `bad.png`, number 18 of 41, is none of the 8 that seed 0 holds out: two epochs
    check_replay(runs[engine])


def test_a_trained_head_is_in_the_ledger_and_beside_the_model(runs: dict[str, Path]) -> None:
    for run in (runs[engine] for engine in ENGINES):
        shipped, ledger = read_head(run / "model"), Ledger.load(run / "ledger")
        assert {part: tensor.shape[0] for part, tensor in shipped.items()} == {"weight": 3, "bias": 3}
        for part, tensor in ledger.head().items():
            assert torch.equal(tensor, shipped[part])
        assert not torch.equal(ledger.head(1)["weight"], shipped["weight"])


def test_speed_is_counted_in_images(runs: dict[str, Path]) -> None:
    timing = summary_of(runs["plain"])["timing"]
    assert "tokens_per_second" not in timing
    assert timing["images_per_second"] == pytest.approx(2 * 33 / timing["train_seconds"])  # epochs x images
    records = map(json.loads, (runs["plain"] / "metrics.jsonl").read_text().splitlines())
    steps = [record for record in records if record["event"] == "step"]
    assert all("images_per_second" in record and "tokens_per_second" not in record for record in steps)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_trained_head_goes_on_to_the_same_bits(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Asked to stop in step 7 of 10, which two processes heed a step later, and taken up again: head, its moments, ledger, weights and scores of never stopped."""
    whole, resumed = runs["zero2"], runs["resumed"]
    assert "resuming  after step 8 (training)" in resumed.with_name("resumed.out0").read_text()
    summaries = [summary_of(run) | {"timing": 0} for run in (whole, resumed)]
    assert summaries[0] == summaries[1]
    for part in ("model", "ledger"):
        assert contents(whole / part) == contents(resumed / part)
    last = Path("checkpoints", "step_00000010_merged", "tensors.safetensors")
    kept = [load_file(run / last) for run in (whole, resumed)]
    assert {f"head.{part}.{moment}" for part in ("weight", "bias") for moment in ("exp_avg", "exp_avg_sq")} <= {
        *kept[0]
    }
    assert kept[0].keys() == kept[1].keys()
    for name, tensor in kept[0].items():
        assert torch.equal(tensor, kept[1][name]), name
        assert tensor.any(), name
    assert train([f"--config={whole / 'config.yaml'}", f"--output_dir={whole}"], RECIPE) == 0
    assert f"{whole} is finished; its summary:" in capsys.readouterr().out


def test_a_rollback_is_refused_where_a_head_is_trained(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [runs["plain"] / part for part in ("ledger", "checkpoints", "model")]
    before = [contents(folder) for folder in kept]
    assert roll_back([str(runs["plain"]), "--expert=1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --expert 1: the moments of the task's head go on from expert to expert")
    assert error.count("\n") == 1
    assert [contents(folder) for folder in kept] == before


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8))


def by_the_card(export: Path) -> torch.Tensor:
    """The logits of `PICTURE` that the Python of an export's README gives."""
    lines = (export / "README.md").read_text().split("```python\n")[1].split("```")[0]
    known: dict[str, Any] = {"FOLDER": str(export), "IMAGE": PICTURE, "NAMES": ["n0", "n1", "n2"]}
    exec(lines, known)
    return known["logits"].detach()


def live_logits(run: Path) -> torch.Tensor:
    """Those of the model that the run shipped, by the network that it trained."""
    head = read_head(run / "model")
    network = network_of(run / "model", templates=("a photo of a {}.",), names=("n0", "n1", "n2"))
    how = preprocessing_of(json.loads((run / "model" / "preprocessor_config.json").read_text()))
    network.mean, network.std = torch.tensor(how.mean), torch.tensor(how.std)
    file = BytesIO()
    PICTURE.save(file, "PNG")
    pixels = torch.from_numpy(evaluation_pixels(StoredImage("picture", file.getvalue()), how))[None]
    with torch.no_grad():
        return (with_head(network, head) if head else network)(pixels)


def test_an_export_has_the_head_and_the_scores_of_the_live_model(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["zero3"]
    assert export([str(run), f"--output_dir={tmp_path / 'last'}", "--compare=true"]) == 0
    loss = summary_of(run)["eval"]["dev"]["loss"]
    measured = "logits differ by at most 0 of their standard deviation"
    assert f"{measured}, loss {loss:.6g} instead of {loss:.6g}" in capsys.readouterr().out
    for name in ("model.safetensors", "head.safetensors"):
        ours, live = (load_file(folder / name) for folder in (tmp_path / "last", run / "model"))
        assert ours.keys() == live.keys()
        assert all(torch.equal(ours[key], live[key]) for key in live)
    assert torch.equal(by_the_card(tmp_path / "last"), live_logits(run))
    assert export([str(run), f"--output_dir={tmp_path / 'first'}", "--expert=1", "--compare=false"]) == 0
    for part, tensor in Ledger.load(run / "ledger").head(1).items():
        assert torch.equal(read_head(tmp_path / "first")[part], tensor)


def test_the_card_of_a_model_without_a_head_of_its_own(runs: dict[str, Path], tmp_path: Path) -> None:
    run = runs["text"]
    assert export([str(run), f"--output_dir={tmp_path / 'out'}", "--compare=false"]) == 0
    assert "pipeline_tag: zero-shot-image-classification\n" in (tmp_path / "out" / "README.md").read_text()
    torch.testing.assert_close(by_the_card(tmp_path / "out"), live_logits(run), rtol=1e-5, atol=1e-5)


def test_prototypes_follow_a_text_tower_that_is_trained(runs: dict[str, Path]) -> None:
    """Scores of the live run against CLIP's own forward pass and image processor; with the old texts they are others."""
    run = runs["text"]
    pairs = load_file(run / "ledger" / "expert_0002.safetensors")
    for tower in ("text_model", "vision_model"):
        moved = [B for name, B in pairs.items() if name.startswith(tower) and name.endswith(".slow_B")]
        assert len(moved) == 4, tower  # q and v of two layers
        assert all(B.abs().max() > 1e-3 for B in moved), tower
    check_replay(run)
    places = sorted((run.parent / "data" / "test").glob("*/*.png"))
    labels = torch.tensor([int(place.parent.name[1]) for place in places])
    processor = AutoImageProcessor.from_pretrained(run / "model", backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    pixels = processor([Image.open(place).convert("RGB") for place in places], return_tensors="pt")
    texts = tokenizer([f"a photo of a n{label}." for label in range(3)], return_tensors="pt", padding=True)
    trained, base = (CLIPModel.from_pretrained(folder).eval() for folder in (run / "model", run.parent / "clip"))
    with torch.no_grad():
        logits = trained(**texts, **pixels).logits_per_image
        old = base(**texts, **pixels).text_embeds
        stale = trained.logit_scale.exp() * trained(**texts, **pixels).image_embeds @ old.T
    found = summary_of(run)["eval"]["test"]
    assert found["loss"] == pytest.approx(float(functional.cross_entropy(logits, labels)), abs=1e-4)
    assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).double().mean()))
    assert abs(found["loss"] - float(functional.cross_entropy(stale, labels))) > 1e-3
