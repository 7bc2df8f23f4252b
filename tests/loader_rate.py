"""How many images a core decodes and brings to the network's size in a second, beside what a model takes.

    python tests/loader_rate.py                  # files of about ImageNet's size, by CLIP's preprocessing
    python tests/loader_rate.py --model vit_b    # and evaluation and training of a vision tower on the same images

The files are crops of scikit-learn's two photographs, 500 x 375 pixels, quality 90; the model is a random CLIP vision
tower with pairs on q and v, on one core or on this machine's GPU. The rates of a core are images by seconds of its time,
so that others do not disturb them; the last lines say how many cores have to decode for each that trains.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lorasc_ds.images import evaluation_pixels, preprocessing_of, rgb_image, training_pixels
from lorasc_ds.tasks.base import ImageSource
from lorasc_ds.tasks.images import image_folder

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2},
    "vit_b": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
}
HOW = preprocessing_of({"image_processor_type": "CLIPImageProcessor"})


def write_files(root: Path, count: int) -> None:
    import sklearn.datasets

    random = np.random.default_rng(0)
    photographs = [
        Image.open(Path(sklearn.datasets.__file__).parent / "images" / f"{name}.jpg") for name in ("china", "flower")
    ]
    for number in range(count):
        folder = root / ("china", "flower")[number % 2]
        folder.mkdir(exist_ok=True)
        width = int(random.integers(400, 560))
        left, top = int(random.integers(640 - width)), int(random.integers(427 - width * 3 // 4))
        crop = photographs[number % 2].crop((left, top, left + width, top + width * 3 // 4))
        crop.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)


def rate(work: Callable[[ImageSource], Any], sources: Sequence[ImageSource], rounds: int) -> float:
    """Images a second of a core's time, the best of the rounds."""
    times = []
    for _ in range(rounds):
        began = time.process_time()
        for source in sources:
            work(source)
        times.append(time.process_time() - began)
    return len(sources) / min(times)


def rate_of_threads(work: Callable[[ImageSource], Any], sources: Sequence[ImageSource], threads: int) -> float:
    """Images a second by the clock."""
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        list(pool.map(work, sources))
        return len(sources) / (time.perf_counter() - began)


def rates_of_model(
    shape: dict[str, int], sources: Sequence[ImageSource], batch_size: int, rounds: int
) -> dict[str, float]:
    """Images a second that a CLIP vision tower of 16-pixel patches takes: forward, and in a step that trains pairs.

    Of a core's time, with one thread; on a GPU by the clock.
    """
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from lorasc_ds.adapters import attach

    torch.manual_seed(0)
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = time.perf_counter if device == "cuda" else time.process_time
    model = CLIPVisionModel(CLIPVisionConfig(image_size=224, patch_size=16, **shape))
    attach(model, rank=8, lora_alpha=16, use_rslora=False, dropout=0.0, target_modules=["q_proj", "v_proj"])
    model.to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    mean, std = (torch.tensor(value, device=device).view(3, 1, 1) for value in (HOW.mean, HOW.std))
    pixels = torch.from_numpy(np.stack([evaluation_pixels(source, HOW) for source in sources[:batch_size]]))

    def features() -> torch.Tensor:
        return model((pixels.to(device) / 255 - mean) / std).pooler_output

    def evaluation() -> None:
        with torch.inference_mode():
            features().sum().item()  # waits for the device

    def training() -> None:
        loss = features().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    found = {}
    for name, work in {"evaluation": evaluation, "training": training}.items():
        times = []
        for _ in range(rounds + 1):  # the first warms up
            began = clock()
            work()
            times.append(clock() - began)
        found[name] = len(pixels) / min(times[1:])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=200, help="files (default: 200)")
    parser.add_argument("--rounds", type=int, default=5, help="passes over them, of which the best counts (default: 5)")
    parser.add_argument("--model", choices=list(SHAPES), help="a vision tower to time beside it")
    parser.add_argument("--batch_size", type=int, default=16, help="of the model (default: 16)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), options.images)
        examples = image_folder(Path(folder), "folder")
        sources = [example.images[0] for example in examples]
        size = sum(len(source.read()) for source in sources) / len(sources) / 1024
        print(f"{len(sources)} files of {size:.0f} KiB, {os.cpu_count()} cores")
        evaluation = partial(evaluation_pixels, how=HOW)
        training = partial(training_pixels, how=HOW, crop_scale=(0.9, 1.0), seed=0)
        rates = {}
        for name, work in {"decoding": rgb_image, "evaluation": evaluation, "training": training}.items():
            rates[name] = rate(work, sources, options.rounds)
            print(f"loader     {name:<10} {rates[name]:8.1f} images a second and core", flush=True)
        for threads in (1, 2):
            found = max(rate_of_threads(evaluation, sources, threads) for _ in range(options.rounds))
            print(f"loader     evaluation {found:8.1f} images a second by the clock with {threads} threads", flush=True)
        if options.model:
            batch = f"batches of {options.batch_size}"
            for name, found in rates_of_model(
                SHAPES[options.model], sources, options.batch_size, options.rounds
            ).items():
                print(
                    f"{options.model:<10} {name:<10} {found:8.1f} images a second, {batch}; needs {found / rates[name]:.3f} cores that decode"
                )


if __name__ == "__main__":
    main()
