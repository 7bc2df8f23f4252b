"""Shared fixtures: tiny models, in-process runs, and where the real data lies."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = (
    "1"  # of tiny models: threads only wait for each other; for the processes tests start, too
)

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from hypothesis import settings
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorasc_ds.cascade import Boundaries
from lorasc_ds.cli import parse_command_line
from lorasc_ds.quickstart.make_base import make_tokenizer
from lorasc_ds.run import run as run_invocation
from lorasc_ds.stopping import Stopping
from lorasc_ds.train import main
from lorasc_ds.trainer import Trainer

if TYPE_CHECKING:
    from recipe_cases import TinyModels

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "launch" / "recipes" / "quickstart.yaml"
os.fsync = os.fstat  # no test cuts the power, and the disk is waited for thousands of times
settings.register_profile("busy", deadline=None)  # others use the machine
settings.load_profile("busy")
CASCADE = {"cascade.slow_retention": 0.6, "cascade.noise_intensity": 1.0, "training.learning_rate": 1e-2}


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data beside the project (`LORASC_SHARED`, default `../shared`)."""
    path = Path(os.environ.get("LORASC_SHARED", ROOT.parent / "shared")) / "data"
    if not path.is_dir():
        pytest.skip(f"the real data is not at {path}; set LORASC_SHARED")
    return path


@pytest.fixture(scope="session")
def tiny_models(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """A tiny model of the architecture that a hub id names."""
    from recipe_cases import TinyModels  # which imports this file

    return TinyModels(shared_data, tmp_path_factory.mktemp)


@pytest.fixture(autouse=True)
def no_accelerator_stays() -> Iterator[None]:
    """Accelerate keeps one state per process, which the next test would have to share."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """Two layers, hidden size 24, grouped queries: q is (24, 24), v is (12, 24)."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        )
    )


@pytest.fixture
def tiny_folder(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> Path:
    """The tiny Llama as a model folder, with the quickstart's tokenizer."""
    folder = tmp_path / "tiny"
    tiny_llama.save_pretrained(folder)
    tokenizer: PreTrainedTokenizerFast = make_tokenizer()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny LLaVA and the rows of `image_text_model.py`."""
    import image_text_model

    folder = tmp_path_factory.mktemp("llava")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    image_text_model.write(folder)
    torch.set_num_threads(threads)
    return folder


@dataclass(frozen=True)
class Run:
    """A finished run. `closed` holds the adapted weights in use after every boundary."""

    directory: Path
    summary: dict[str, Any]
    closed: list[dict[str, torch.Tensor]]

    def metrics(self, event: str) -> list[dict[str, Any]]:
        lines = (self.directory / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["event"] == event]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Runs the quickstart recipe in this process with dotted overrides, on a dozen examples."""
    count = iter(range(1000))

    def start(**overrides: Any) -> Run:
        directory = tmp_path / f"run{next(count)}"
        settings: dict[str, Any] = {"training.epochs": 3, "tracking.tensorboard": "false"}
        if "task.name" not in overrides:
            settings |= {"task.train_examples": 12, "task.dev_examples": 8, "task.test_examples": 10}
        arguments = [f"--{key}={value}" for key, value in (settings | overrides).items()]
        invocation = parse_command_line([f"--output_dir={directory}", *arguments], RECIPE)
        assert not isinstance(invocation, str)
        closed: list[dict[str, torch.Tensor]] = []
        close_expert = Boundaries.close_expert

        def close_and_copy(self: Boundaries, *experts: Any) -> Any:
            report = close_expert(self, *experts)
            closed.append({one.name: one.weight.detach().clone() for one in self.weights})
            return report

        with monkeypatch.context() as patch:
            patch.setattr(Boundaries, "close_expert", close_and_copy)
            run_invocation(invocation, Stopping(directory))
        return Run(directory, json.loads((directory / "summary.json").read_text()), closed)

    return start


Start = Callable[..., Run]


def base_weights(folder: Path, names: list[str], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name: tensors[name].to(dtype) for name in names}


RESUMED = {
    "training.epochs": 2,
    "training.checkpoint_steps": 2,
    "task.train_examples": 12,
    "task.dev_examples": 6,
    "task.test_examples": 2,
    "cascade.noise_intensity": 1,
    "tracking.tensorboard": "false",
}
Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process; its exit code and what it said on both streams."""

    def start(directory: Path, *flags: str, **changed: Any) -> tuple[int, str]:
        overrides = [f"--{key}={value}" for key, value in (RESUMED | changed).items()]
        code = main([f"--output_dir={directory}", *overrides, *flags], RECIPE)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return start


@pytest.fixture
def stopped(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """A run that was asked to stop after so many steps."""

    def start(steps: int = 4, name: str = "run", *flags: str, **changed: Any) -> Path:
        training_step = Trainer.training_step

        def step_and_stop(self: Trainer, step: int, learning_rate: float) -> Any:
            if step + 1 == steps:
                self.stopping.found = "the test"
            return training_step(self, step, learning_rate)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "training_step", step_and_stop)
            code, said = command(tmp_path / name, *flags, **changed)
        assert code == 75
        assert f"asked to stop: the test; left after step {steps}, the same command goes on from there" in said
        return tmp_path / name

    return start


def digest_of_run(directory: Path) -> str:
    return json.loads((directory / "summary.json").read_text())["weights_sha256"]


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position % len(data)] ^= 1 << (position % 8)
    file.write_bytes(bytes(data))
