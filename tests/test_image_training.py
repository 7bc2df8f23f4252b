"""Training on images: the heads against direct computations, and engines that must agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import image_models
import pytest
import torch
from conftest import RECIPE, base_weights, digest_of_run
from forking import Job, group
from forking import run as run_jobs
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional
from transformers import AutoTokenizer, CLIPModel

from lorasc_ds.algorithm.ledger import Ledger, digest
from lorasc_ds.classifier import ImageClassifier, make_rows, prompts_of, read_head
from lorasc_ds.images import Preprocessing
from lorasc_ds.tasks.base import Classes

DS_CONFIGS = Path(__file__).parents[1] / "ds_configs"
HOW = Preprocessing(resize=None, crop=(32, 32), resample=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def network_of(folder: Path, **settings: Any) -> ImageClassifier:
    classes = Classes(("cat", "old dog", "bus"), ("a photo of a {}.", "the {}."), **settings)
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


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """CLIP on folders of digits, with a head that is trained: one process, one with workers, and two under ZeRO-2 and ZeRO-3."""
    folder = tmp_path_factory.mktemp("runs")
    pixels, labels = load_digits(return_X_y=True)
    for at in range(60):
        place = folder / "data" / ("train" if at < 40 else "test") / f"n{labels[at] % 3}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels[at].reshape(8, 8) * 15).astype("uint8")).resize((40, 36)).save(place / f"{at}.png")
    (folder / "data" / "train" / "n0" / "bad.png").write_bytes(b"no image")
    image_models.clip(folder / "clip")
    flags = [f"--model.name_or_path={folder / 'clip'}", "--task.name=images", f"--task.data_dir={folder / 'data'}"]
    flags += ["--adapter.target_modules=vision_model.*.q_proj,vision_model.*.v_proj", "--task.templates=simple"]
    flags += ["--task.train_head=true", "--task.dev_examples=8", "--training.epochs=2", "--training.batch_size=8"]
    flags += ["--training.micro_batch_size=4", "--adapter.rank=4", "--training.learning_rate=1e-2"]
    flags += ["--cascade.experts=2", "--tracking.tensorboard=false", "--training.data_workers=0"]
    engines = {"plain": [], "workers": ["--training.data_workers=2"]}
    engines |= {stage: [f"--deepspeed={DS_CONFIGS / stage}.json"] for stage in ("zero2", "zero3")}
    jobs = [
        Job(
            "lorasc_ds.train:main",
            [[f"--output_dir={folder / name}", *flags, *engine], str(RECIPE)],
            str(folder / name),
            200,
            group(2) if name.startswith("zero") else [{}],
        )
        for name, engine in engines.items()
    ]
    for name, ended in zip(engines, run_jobs(*jobs, at_once=2), strict=True):
        assert set(ended.codes) == {0}, (name, ended.err, ended.out)
    return {name: folder / name for name in engines}


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize("engine", ["workers", "zero2", "zero3"])
def test_engines_agree_and_their_ledgers_replay(runs: dict[str, Path], engine: str) -> None:
    expected, found = summary_of(runs["plain"]), summary_of(runs[engine])
    for split, scores in expected["eval"].items():
        assert found["eval"][split]["loss"] == pytest.approx(scores["loss"], abs=1e-4)
    assert expected["eval"]["dev"]["loss"] != expected["eval_before"]["dev"]["loss"]
    assert (found["unreadable"], found["steps"]) == (expected["unreadable"], expected["steps"])
    assert expected["unreadable"] in (0, 2)  # of two epochs, unless it is held out
    ledger = Ledger.load(runs[engine] / "ledger")
    base = base_weights(runs[engine].parent / "clip", list(ledger.weights))
    assert digest(weight for _, weight in ledger.replay(base.__getitem__)) == found["weights_sha256"]
    assert digest_of_run(runs[engine]) == found["weights_sha256"]


def test_a_trained_head_is_in_the_ledger_and_beside_the_model(runs: dict[str, Path]) -> None:
    for run in runs.values():
        shipped, ledger = read_head(run / "model"), Ledger.load(run / "ledger")
        assert {part: tensor.shape[0] for part, tensor in shipped.items()} == {"weight": 3, "bias": 3}
        for part, tensor in ledger.head().items():
            assert torch.equal(tensor, shipped[part])
        assert not torch.equal(ledger.head(1)["weight"], shipped["weight"])
