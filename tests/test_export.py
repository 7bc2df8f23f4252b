"""Exports out of a run directory against the live run's model, the ledger's replay, PEFT, and dense formulas."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import RECIPE, ROOT
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_experts import random_pair
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen3_5TextConfig

from lorasc_ds import comparison, models, pretrained
from lorasc_ds.algorithm.dora import shipped_weight
from lorasc_ds.algorithm.files import sha256_of_file
from lorasc_ds.algorithm.ledger import Ledger
from lorasc_ds.algorithm.low_rank import joined, truncated
from lorasc_ds.config import ModelConfig
from lorasc_ds.export import main
from lorasc_ds.models import QUICKSTART_BASE
from lorasc_ds.train import main as train

SMALL = {
    "task.train_examples": 12, "task.dev_examples": 8, "task.test_examples": 10, "training.epochs": 3,
    "training.evaluate": "end", "tracking.tensorboard": "false",
}  # fmt: skip
PEFT_ASKS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
GIB = 2**30
NO_SCORES = "The run kept no scores of this expert"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def sharded_base(folder: Path) -> Path:
    """The quickstart's base in several files, in float32, without a generation config."""
    base = folder / "sharded base"
    AutoModelForCausalLM.from_pretrained(QUICKSTART_BASE).save_pretrained(base, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(QUICKSTART_BASE).save_pretrained(base)
    assert len(list(base.glob("*.safetensors"))) > 5
    (base / "generation_config.json").unlink()
    return base


def start(directory: Path, **overrides: Any) -> Path:
    arguments = [f"--{key}={value}" for key, value in (SMALL | overrides).items()]
    assert train([f"--output_dir={directory}", *arguments], RECIPE) == 0
    return directory


@pytest.fixture(scope="module")
def lorasc(folder: Path) -> Path:
    return start(folder / "lorasc", **{"adapter.use_rslora": "true"})


@pytest.fixture(scope="module")
def bfloat16(folder: Path, sharded_base: Path) -> Path:
    """Three experts of rank 24 on weights of 64 x 64."""
    return start(
        folder / "bfloat16", **{"model.dtype": "bfloat16", "model.name_or_path": sharded_base, "adapter.rank": 24}
    )


@pytest.fixture(scope="module")
def dora(folder: Path) -> Path:
    return start(folder / "dora", **{"adapter.method": "dora"})


@pytest.fixture(scope="module")
def noisytune(folder: Path) -> Path:
    overrides = {"cascade.strategy": "noisytune", "cascade.noise_on": "all", "training.epochs": 1}
    return start(folder / "noisytune", **overrides, **{"training.learning_rate": 1e-3})


@pytest.fixture(params=["lorasc", "bfloat16", "dora", "noisytune"])
def any_run(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def export(run: Path, out: Path, *arguments: str, compare: str = "false") -> Path:
    assert main([str(run), f"--output_dir={out}", f"--compare={compare}", *arguments]) == 0
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return code, line


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "README.md"}


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(directory.glob("model*.safetensors")) for k, v in load_file(path).items()}


def replayed(run: Path, experts: int | None = None, noise: bool = True) -> dict[str, torch.Tensor]:
    """The adapted weights by `Ledger.replay` on whole files."""
    ledger = Ledger.load(run / "ledger")
    dtype = getattr(torch, ledger.base.dtype)
    base = {k: v.to(dtype) for k, v in tensors_of(QUICKSTART_BASE).items()}
    weights = dict(ledger.replay(base.__getitem__, experts, noise)) | dict(
        ledger.replay_noised(base.__getitem__, experts, noise)
    )
    magnitudes = ledger.magnitudes(experts)
    return {k: shipped_weight(v, magnitudes[k]) if k in magnitudes else v for k, v in weights.items()}


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(60).remainder(29).view(2, 30) + 2
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits.float()


def model_with(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The quickstart's base with some of its weights replaced."""
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART_BASE, dtype=next(iter(weights.values())).dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert len(missing) < len(model.state_dict())
    return model


def test_merged_is_the_model_of_the_run_to_the_byte(any_run: Path, tmp_path: Path) -> None:
    out = export(any_run, tmp_path / "out")
    assert contents(out) == contents(any_run / "model")
    summary = json.loads((any_run / "summary.json").read_text())
    key = "shipped_sha256" if any_run.name == "dora" else "weights_sha256"
    card = (out / "README.md").read_text()
    assert f"{summary[key]}, equal to the run's {key}" in card
    before, after = (summary[when]["dev"]["loss"] for when in ("eval_before", "eval"))
    assert "These weights.\n\n| split | metric | before | after |\n| --- | --- | --- | --- |\n| dev |" in card
    assert f"| dev | loss | {before:.4g} | {after:.4g} |" in card


@pytest.mark.parametrize("name", ["lorasc", "bfloat16", "dora"])
def test_an_earlier_expert_is_the_replay_and_loads_from_shards(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run = request.getfixturevalue(name)
    out = export(run, tmp_path / "out", "--expert=1", f"--max_shard_size={1e5 / GIB}")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found, expected = tensors_of(out), replayed(run, 1)
    assert len(set(index["weight_map"].values())) > 3
    assert index["weight_map"].keys() == found.keys() == tensors_of(run / "model").keys()
    assert all(path.stat().st_size < 1.1e5 for path in out.glob("*.safetensors"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    for key, weight in expected.items():
        assert torch.equal(found[key], weight), key
    assert not torch.equal(found[key], tensors_of(run / "model")[key])
    assert NO_SCORES in (out / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == weight.dtype
    assert torch.equal(logits(loaded), logits(model_with(expected)))
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(QUICKSTART_BASE).get_vocab()


def test_without_noise_it_is_the_replay_without_noise_and_says_how_much_that_is(
    lorasc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = export(lorasc, tmp_path / "out", "--noise=false")
    found, expected, noisy = tensors_of(out), replayed(lorasc, noise=False), replayed(lorasc)
    base = tensors_of(QUICKSTART_BASE)
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())
    noise = sum(float((noisy[key] - expected[key]).square().sum()) for key in expected) ** 0.5
    added = sum(float((expected[key] - base[key]).square().sum()) for key in expected) ** 0.5
    told = re.search(
        r"norm is about ([\d.e-]+), ([\d.]+)% of what the experts add \(([\d.e-]+)\)", capsys.readouterr().out
    )
    assert told is not None
    assert float(told[1]) == pytest.approx(noise, rel=0.02)
    assert float(told[2]) == pytest.approx(100 * noise / added, rel=0.02)
    assert float(told[3]) == pytest.approx(added, rel=0.01)


@PEFT_ASKS
@pytest.mark.parametrize(("name", "rank"), [("lorasc", 24), ("dora", 24), ("noisytune", 8)])
def test_one_adapter_computes_what_all_experts_do_without_the_noise(
    name: str, rank: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run = request.getfixturevalue(name)
    out = export(run, tmp_path / "out", "--as=adapter")
    assert {path.name for path in out.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(QUICKSTART_BASE), out)
    assert adapted.peft_config["default"].r == rank
    expected = logits(model_with(replayed(run, noise=False)))
    base = logits(AutoModelForCausalLM.from_pretrained(QUICKSTART_BASE))
    assert (expected - base).abs().max() > 1e-2 * base.std()
    assert (logits(adapted) - expected).abs().max() < 1e-5 * expected.std()
    card = (out / "README.md").read_text()
    assert "left out: on the adapted weights its norm is about" in card
    assert "The live model, not this export; `measured` above says how far they are apart." in card
    assert ("all of it on 21 other matrices" in card) == (name == "noisytune")


def test_an_adapter_of_too_large_a_rank_is_refused_by_name(
    bfloat16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = (bfloat16, f"--output_dir={tmp_path / 'out'}")
    name = "model.layers.0.self_attn.q_proj.weight"
    code, error = refused(capsys, *where, "--as=adapter")
    assert code == 2
    assert f"3 experts of rank 24 make rank 72, but {name} of (64, 64) has 64 at most: take --as svd" in error
    code, error = refused(capsys, *where, "--as=svd", "--rank=65")
    assert code == 2
    assert f"--rank is 65, but 3 experts of rank 24 on {name} of (64, 64) have 64 at most" in error
    assert list(tmp_path.iterdir()) == []


def test_truncation_is_the_dense_svd() -> None:
    pair = joined([random_pair(30, 20, 4, seed=seed) for seed in range(3)])
    dense = 2.5 * pair.B.double() @ pair.A.double()
    columns, values, rows = torch.linalg.svd(dense)
    for rank in (1, 5, 12):
        best, error = truncated(pair, 2.5, rank)
        assert best.A.shape == (rank, 20)
        assert best.B.shape == (30, rank)
        expected = (columns[:, :rank] * values[:rank]) @ rows[:rank]
        assert torch.allclose(best.B.double() @ best.A.double(), expected, atol=1e-5 * float(values[0]))
        assert error == pytest.approx(float(values[rank:].norm() / values.norm()), abs=1e-12)
    nothing, error = truncated(pair._replace(B=torch.zeros_like(pair.B)), 2.5, 3)
    assert error == 0
    assert not nothing.B.any()


@PEFT_ASKS
def test_svd_of_a_run_tells_its_error(bfloat16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = export(bfloat16, tmp_path / "out", "--as=svd", "--rank=5")
    ledger = Ledger.load(bfloat16 / "ledger")
    errors, expected = {}, {}
    base = {key: tensor.to(torch.bfloat16) for key, tensor in tensors_of(QUICKSTART_BASE).items()}
    for name in ledger.weights:
        pairs = [ledger.slow(expert)[name] for expert in (1, 2, 3)]
        dense = ledger.adapter.scaling * sum((pair.B.double() @ pair.A.double() for pair in pairs), torch.zeros(64, 64))
        columns, values, rows = torch.linalg.svd(dense)
        errors[name] = float(values[5:].norm() / values.norm())
        expected[name] = ((columns[:, :5] * values[:5]) @ rows[:5] + base[name].double()).float()
    told = re.search(r"mean ([\d.e-]+), worst ([\d.e-]+) \((.*)\)", capsys.readouterr().out)
    assert told is not None
    assert float(told[1]) == pytest.approx(sum(errors.values()) / 8, rel=0.01)
    assert float(told[2]) == pytest.approx(max(errors.values()), rel=0.01)
    assert told[3] == max(errors, key=errors.__getitem__)
    wide = AutoModelForCausalLM.from_pretrained(QUICKSTART_BASE)
    wide.load_state_dict({key: tensor.float() for key, tensor in base.items()}, strict=False)
    adapted = PeftModel.from_pretrained(wide, out)
    expected = logits(model_with({key: tensor.float() for key, tensor in base.items()} | expected))
    assert (logits(adapted) - expected).abs().max() < 1e-5 * expected.std()


@pytest.fixture
def copied(lorasc: Path, tmp_path: Path) -> Path:
    """A run directory to damage."""
    return Path(shutil.copytree(lorasc, tmp_path / "run"))


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_damage_ends_with_code_4_and_leaves_nothing(
    kind: str, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copied / "ledger" / "expert_0002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    code, error = refused(capsys, copied, f"--output_dir={tmp_path / 'out'}", f"--as={kind}", "--compare=false")
    assert code == 4
    assert "expert_0002.safetensors is missing or not the file that was written" in error
    data[-4:] = bytes([0, 0, 192, 127])  # NaN
    file.write_bytes(data)
    listed = copied / "ledger" / "ledger.json"
    content = json.loads(listed.read_text())
    content["experts"][1]["sha256"] = sha256_of_file(file)
    listed.write_text(json.dumps(content))
    code, error = refused(capsys, copied, f"--output_dir={tmp_path / 'out'}", f"--as={kind}", "--compare=false")
    assert code == 4
    assert "holds a number that is not finite" in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_files_that_do_not_belong_together_end_with_code_4(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = (copied, f"--output_dir={tmp_path / 'out'}", "--compare=false")
    summary = json.loads((copied / "summary.json").read_text())
    (copied / "summary.json").write_text(json.dumps(summary | {"weights_sha256": "0" * 64}))
    code, error = refused(capsys, *where)
    assert code == 4
    assert f"sha256 {summary['weights_sha256']}, but weights_sha256 in summary.json is 000" in error
    (copied / "summary.json").write_text("{")
    code, error = refused(capsys, *where)
    assert code == 4
    assert "summary.json cannot be read" in error
    (copied / "summary.json").unlink()
    listed = copied / "ledger" / "ledger.json"
    content = json.loads(listed.read_text())
    content["base"]["sha256"] = "0" * 64
    listed.write_text(json.dumps(content))
    code, error = refused(capsys, *where)
    assert code == 4
    assert "but this ledger was written for 000" in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_compacted_ledger_gives_what_it_still_knows(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Ledger.load(copied / "ledger").compact(tensors_of(QUICKSTART_BASE).__getitem__, 2)
    assert contents(export(copied, tmp_path / "last")) == contents(copied / "model")
    second = tensors_of(export(copied, tmp_path / "second", "--expert=2"))
    assert all(torch.equal(second[name], weight) for name, weight in replayed(copied, 2).items())
    for arguments, message in (
        (["--expert=1"], "--expert is 1, but experts 1 to 2 were compacted into one snapshot: give 2 to 3"),
        (["--noise=false"], "experts 1 to 2 were compacted, with their noise and without their pairs"),
        (["--as=adapter"], "so that neither --noise false nor an adapter can be had: take --as merged"),
    ):
        code, error = refused(capsys, copied, f"--output_dir={tmp_path / 'out'}", *arguments)
        assert code == 2
        assert message in error


def test_an_unfinished_run_is_exported_and_told(copied: Path, tmp_path: Path) -> None:
    (copied / "summary.json").unlink()
    card = (export(copied, tmp_path / "out") / "README.md").read_text()
    assert contents(tmp_path / "out") == contents(copied / "model")
    assert "the run recorded none of these weights" in card
    assert NO_SCORES in card


def test_a_run_that_shipped_an_earlier_step_scored_other_weights(copied: Path, tmp_path: Path) -> None:
    summary = json.loads((copied / "summary.json").read_text())
    summary["shipped"] |= {"select": "best_dev", "step": 3, "weights_sha256": "0" * 64}
    (copied / "summary.json").write_text(json.dumps(summary | {"shipped_sha256": "0" * 64}))
    card = (export(copied, tmp_path / "out") / "README.md").read_text()
    assert "equal to the run's weights_sha256" in card
    assert NO_SCORES in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--expert=0"], "--expert is 0: a number from 1 on is needed"),
        (["--expert=4"], "--expert is 4, but 3 experts have closed: give 1 to 3"),
        (["--expret=1"], "unknown argument --expret=1; did you mean --expert?"),
        (["--as=svd"], "svd needs a rank"),
        (["--rank=3"], "--rank is 3 and --as is merged"),
        (["--as=adapter", "--noise=true"], "--as adapter and --noise true exclude each other"),
        (["--as=adapter", "--max_shard_size=1"], "--as adapter and --max_shard_size exclude each other"),
        (["--max_shard_size=0"], "--max_shard_size is 0: a number of GiB above 0 is needed"),
        (["--as=onnx"], "--as: invalid choice"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(
    arguments: list[str], message: str, lorasc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = refused(capsys, lorasc, f"--output_dir={tmp_path / 'out'}", *arguments)
    assert code == 2
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_wrong_folders_are_refused_in_one_line(
    lorasc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = refused(capsys, tmp_path, f"--output_dir={tmp_path / 'out'}")
    assert code == 2
    assert f"RUN_DIR {tmp_path} holds no config.yaml: give the --output_dir of a run" in error
    code, error = refused(capsys, lorasc, f"--output_dir={tmp_path}")
    assert code == 2
    assert f"--output_dir {tmp_path} exists: give a folder that does not exist yet" in error

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, error = refused(capsys, lorasc, f"--output_dir={tmp_path / 'out'}")
    assert code == 2
    assert f"--output_dir {tmp_path / 'out'}: No space left on device" in error
    assert list(tmp_path.iterdir()) == []


def test_one_tensor_at_a_time(bfloat16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    read = models.PretrainedTensors.__call__

    def counted(self: models.PretrainedTensors, name: str) -> torch.Tensor:
        nonlocal most
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    def whole(config: ModelConfig) -> None:
        raise AssertionError("the model was loaded whole")

    monkeypatch.setattr(models.PretrainedTensors, "__call__", counted)
    monkeypatch.setattr(models, "load_model", whole)
    out = export(bfloat16, tmp_path / "out")
    assert contents(out) == contents(bfloat16 / "model")
    assert len(alive) == 38 + 8  # each written, the adapted ones read again for the digest
    assert most <= 2


def test_files_follow_the_umask(lorasc: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        for kind in ("merged", "adapter"):
            export(lorasc, tmp_path / kind, f"--as={kind}")
    finally:
        os.umask(before)
    for kind in ("merged", "adapter"):
        assert oct((tmp_path / kind).stat().st_mode & 0o777) == "0o750"
        assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / kind).iterdir()} == {"0o640"}


@pytest.mark.parametrize("arguments", [["--as=merged"], ["--as=svd", "--rank=3"]])
def test_nothing_private_is_written(
    arguments: list[str], bfloat16: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    out = export(bfloat16, tmp_path / "out", *arguments, compare="true")
    for file in out.iterdir():
        data = file.read_bytes()
        for private in (
            b"hf_planted",
            str(folder).encode(),
            str(tmp_path).encode(),
            str(Path.home()).encode(),
            b"/tmp/",
        ):
            assert private not in data, (file.name, private)
    card = (out / "README.md").read_text()
    assert 'base_model: "sharded base"' in card
    assert f"library_name: {'transformers' if 'merged' in arguments[0] else 'peft'}" in card


@PEFT_ASKS
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("dora", ["--as=merged"]), ("lorasc", ["--as=adapter"]), ("bfloat16", ["--as=svd", "--rank=7"])],
)
def test_the_measured_difference_is_that_of_the_files(
    name: str, arguments: list[str], request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = request.getfixturevalue(name)
    capsys.readouterr()
    out = export(run, tmp_path / "out", *arguments, compare="true")
    measured = r"logits differ by at most ([\d.e-]+) of their standard deviation, loss ([\d.]+) instead of ([\d.]+)"
    told = re.search(measured, capsys.readouterr().out)
    assert told is not None
    summary = json.loads((run / "summary.json").read_text())
    if name != "dora":  # its run computes with float32 magnitudes beside the weights
        assert float(told[3]) == pytest.approx(summary["eval"]["dev"]["loss"], rel=1e-5)
    if arguments == ["--as=merged"]:
        assert (float(told[1]), told[2]) == (0, told[3])
    else:
        assert 1e-3 < float(told[1]) < 1
        assert told[2] != told[3]
    assert f"loss {told[2]} instead of {told[3]}" in (out / "README.md").read_text()


def test_what_cannot_be_measured_is_told(
    lorasc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_data(config: Any) -> None:
        raise models.ConfigError(f"{tmp_path} is gone")

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "prepare", no_data)
        card = (export(lorasc, tmp_path / "one", compare="auto") / "README.md").read_text()
        assert "| measured | nothing, since the model or the data could not be read" in card
        assert f"not measured: {tmp_path} is gone" in capsys.readouterr().out
        code, error = refused(capsys, lorasc, f"--output_dir={tmp_path / 'two'}", "--compare=true")
        assert code == 2
        assert "is gone" in error
    small = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=2 * 4 * 203264))
    monkeypatch.setattr(comparison, "psutil", small)
    card = (export(lorasc, tmp_path / "three", compare="auto") / "README.md").read_text()
    assert "nothing, since memory has no room for the model twice" in card
    small.virtual_memory = lambda: SimpleNamespace(available=2 * 4 * 203264 + 4096)
    card = (export(lorasc, tmp_path / "four", compare="auto") / "README.md").read_text()
    assert "logits differ by at most 0 of their standard deviation" in card


def test_measuring_takes_a_gpu_that_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.load_shape(ModelConfig())
    free = 1.5 * comparison.bytes_of(model)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 2 * free))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert comparison.device_for(model).type == "cpu"
    free += 1
    assert comparison.device_for(model).type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert comparison.device_for(model).type == "cpu"


def headless_llama(base: Path) -> None:
    """An old checkpoint: of the model without its head, so that no name begins with `model.`."""
    shutil.copytree(QUICKSTART_BASE, base)
    tensors = {key.removeprefix("model."): tensor for key, tensor in tensors_of(QUICKSTART_BASE).items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def text_part_of_qwen(base: Path) -> None:
    """A checkpoint whose names, `model.language_model.layers.0` and so on, the live model does not have but saves."""
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 16}
    shape |= {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(vocab_size=31, max_position_embeddings=128, tie_word_embeddings=True, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(QUICKSTART_BASE).save_pretrained(base)
    tensors = {key.replace("model.", "model.language_model.", 1): value for key, value in tensors_of(base).items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


@PEFT_ASKS
@pytest.mark.parametrize("make", [headless_llama, text_part_of_qwen])
def test_files_that_transformers_renames_are_loaded_whole(
    make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "base")
    overrides = {"model.name_or_path": tmp_path / "base", "training.epochs": 1, "adapter.target_modules": "q_proj"}
    run = start(tmp_path / "run", **overrides)
    out = export(run, tmp_path / "out", "--as=merged", compare="true")
    assert contents(out) == contents(run / "model")
    assert re.search(r"base +loaded whole, since ", capsys.readouterr().out)
    adapter = export(run, tmp_path / "adapter", "--as=adapter", compare="true")
    assert "The live model, not this export" in (adapter / "README.md").read_text()
    told = re.search(r"logits differ by at most ([\d.e-]+) of", capsys.readouterr().out)
    assert told is not None
    assert float(told[1]) < 1e-5  # one expert has no noise


def test_weights_that_stay_float32_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["norm"])
    config = ModelConfig(dtype="bfloat16")
    opened = pretrained.open_pretrained(config, [])
    assert opened.loaded == "transformers keeps some of its weights in float32"
    live = models.load_model(config).state_dict()
    assert {key: dtype for key, (dtype, _) in opened.layout.items()} | {"lm_head.weight": torch.bfloat16} == {
        key: torch.float32 if "norm" in key else torch.bfloat16 for key in live
    }
    assert all(torch.equal(opened.tensor(key), live[key]) for key in opened.layout)


@pytest.mark.parametrize(("error", "expected"), [(KeyboardInterrupt(), 130), (RuntimeError("a bug"), 1)])
def test_an_interrupted_export_leaves_nothing(
    error: BaseException, expected: int, lorasc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(pretrained, "write_tensors", interrupted)
    assert main([str(lorasc), f"--output_dir={tmp_path / 'out'}"]) == expected
    assert list(tmp_path.iterdir()) == []


def test_help_and_wrong_flags_need_no_torch() -> None:
    script = (
        "import sys; from lorasc_ds.export import main\n"
        "assert main(['run', '--output_dir=out', '--rank=3']) == 2\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)
