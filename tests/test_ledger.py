"""The ledger on disk: format, digests, damage, replay."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from safetensors.torch import load_file
from test_experts import random_pair

from lorasc_ds.algorithm.files import write_atomically
from lorasc_ds.algorithm.ledger import Adapter, Base, Ledger, LedgerError, digest

NAMES = ("layers.10.q.weight", "layers.2.q.weight")  # sorted as strings
SHAPE = (6, 10)
S = 2.0


def base_weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(SHAPE, generator=generator).to(dtype) for name in NAMES}


def write_ledger(directory: Path, experts: int = 3, dtype: str = "float32") -> Ledger:
    weights = base_weights(getattr(torch, dtype))
    base = Base("some/model", "main", dtype, digest(weights[name] for name in NAMES))
    ledger = Ledger(directory, "lorasc", base, Adapter("lora", 2, S), 7, 0.6, 0.1, NAMES)
    ledger.save()
    for index in range(1, experts + 1):
        ledger.append(
            index=index,
            steps=(4 * index - 4, 4 * index),
            slow_retention=0.6,
            noise_intensity=0.1,
            noise_scale={name: 0.0 if index == 1 else float(np.float32(0.01 * index)) for name in NAMES},
            slow={name: random_pair(*SHAPE, 2, seed=10 * index + i) for i, name in enumerate(NAMES)},
        )
    return ledger


def test_digest_is_sha256_of_the_bytes_in_order() -> None:
    one, other = torch.tensor([[1.0, -2.0]]), torch.tensor([0.5], dtype=torch.bfloat16)
    raw = np.array([1.0, -2.0], dtype="<f4").tobytes() + bytes([0x00, 0x3F])  # bfloat16 0.5 is 0x3F00
    assert digest([one, other]) == hashlib.sha256(raw).hexdigest()


def test_the_files_hold_what_the_design_says(tmp_path: Path) -> None:
    write_ledger(tmp_path / "ledger", experts=2)
    content = json.loads((tmp_path / "ledger" / "ledger.json").read_text())
    assert content["format"] == 1
    assert content["weights"] == list(NAMES)
    assert set(content) == {
        "format", "strategy", "base", "adapter", "seed", "slow_retention", "noise_intensity", "weights", "experts"
    }  # fmt: skip
    assert set(content["base"]) == {"name", "revision", "dtype", "sha256"}
    assert content["adapter"] == {"method": "lora", "rank": 2, "scaling": S}
    second = content["experts"][1]
    assert second["index"] == 2
    assert second["steps"] == [4, 8]
    assert second["noise_scale"] == {name: float(np.float32(0.02)) for name in NAMES}
    path = tmp_path / "ledger" / "expert_0002.safetensors"
    assert second["file"] == path.name
    assert second["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    tensors = load_file(path)
    assert set(tensors) == {f"{name}.slow_{part}" for name in NAMES for part in "AB"}
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("experts", [0, 1, 3])
def test_replay_agrees_with_plain_loops(tmp_path: Path, dtype: str, experts: int) -> None:
    write_ledger(tmp_path / "ledger", dtype=dtype)
    ledger = Ledger.load(tmp_path / "ledger")
    weights = base_weights(getattr(torch, dtype))
    ledger.check_base(weights[name] for name in NAMES)
    for position, (name, replayed) in enumerate(ledger.replay(weights.__getitem__, experts)):
        expected = weights[name].float().numpy()
        for record in ledger.experts[:experts]:
            if record.noise_scale[name]:
                expected = reference.add(
                    expected, reference.noise(SHAPE, record.noise_scale[name], position, record.index, 7)
                )
            pair = random_pair(*SHAPE, 2, seed=10 * record.index + position)
            expected = reference.add(expected, reference.delta(pair.A.numpy(), pair.B.numpy(), S))
        assert replayed.dtype == getattr(torch, dtype)
        assert torch.equal(replayed, torch.from_numpy(expected).to(replayed.dtype))


def test_replay_refuses_another_base_and_experts_that_are_not_there(tmp_path: Path) -> None:
    ledger = write_ledger(tmp_path / "ledger")
    weights = base_weights()
    for experts in (-1, 4):
        with pytest.raises(LedgerError, match=f"holds 3 experts, {experts} were asked for"):
            list(ledger.replay(weights.__getitem__, experts))
    weights[NAMES[0]][0, 0] += 1
    with pytest.raises(LedgerError, match="this ledger was written for"):
        list(ledger.replay(weights.__getitem__))


def test_a_base_with_one_changed_weight_is_refused(tmp_path: Path) -> None:
    ledger = write_ledger(tmp_path / "ledger")
    weights = base_weights()
    weights[NAMES[1]][3, 3] = torch.nextafter(weights[NAMES[1]][3, 3], torch.tensor(9.0))
    with pytest.raises(LedgerError, match="this ledger was written for"):
        ledger.check_base(weights[name] for name in NAMES)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "other bytes"])
@pytest.mark.parametrize("file", ["expert_0002.safetensors", "ledger.json"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str, file: str) -> None:
    write_ledger(tmp_path / "ledger")
    path = tmp_path / "ledger" / file
    data = bytearray(path.read_bytes())
    data[0 if file == "ledger.json" else -1] ^= 1
    match damage:
        case "flip":
            path.write_bytes(data)
        case "truncate":
            path.write_bytes(path.read_bytes()[:-5])
        case "remove":
            path.unlink()
        case "other bytes":
            path.write_bytes(b"\xff\xfe")
    with pytest.raises(LedgerError, match=file):
        Ledger.load(tmp_path / "ledger")


def test_another_format_is_refused(tmp_path: Path) -> None:
    write_ledger(tmp_path / "ledger")
    path = tmp_path / "ledger" / "ledger.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(LedgerError, match="has format 2"):
        Ledger.load(tmp_path / "ledger")


def test_experts_are_appended_in_order_and_finite(tmp_path: Path) -> None:
    ledger = write_ledger(tmp_path / "ledger", experts=1)
    common = {"steps": (4, 8), "slow_retention": 0.6, "noise_intensity": 0.1, "noise_scale": dict.fromkeys(NAMES, 0.0)}
    pairs = {name: random_pair(*SHAPE, 2) for name in NAMES}
    with pytest.raises(LedgerError, match="expert 3 cannot follow expert 1"):
        ledger.append(index=3, slow=pairs, **common)
    pairs[NAMES[1]].B[0, 0] = torch.nan
    with pytest.raises(LedgerError, match=r"layers.2.q.weight.slow_B of expert 2 holds a number that is not finite"):
        ledger.append(index=2, slow=pairs, **common)
    assert len(Ledger.load(tmp_path / "ledger").experts) == 1


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_ledger(tmp_path / "ledger", experts=1)
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "ledger").iterdir()} == {"0o640"}
