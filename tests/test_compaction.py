"""Digests, truncation and compaction of a ledger: what may change, what must not, and what a crash leaves."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_experts import random_pair
from test_ledger import NAMES, SHAPE, base_weights, write_ledger

from lorasc_ds.algorithm.ledger import Ledger, LedgerError


def append(ledger: Ledger, **changes: object) -> None:
    index = len(ledger.experts) + 1
    expert = {
        "index": index, "steps": (4 * index - 4, 4 * index), "slow_retention": 0.6, "noise_intensity": 0.1,
        "noise_scale": dict.fromkeys(NAMES, 0.03125),
        "slow": {name: random_pair(*SHAPE, 2, seed=10 * index + i) for i, name in enumerate(NAMES)},
    }  # fmt: skip
    ledger.append(**expert | changes)  # pyright: ignore[reportArgumentType]


def weights_after(ledger: Ledger, experts: int | None = None, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [weight for _, weight in ledger.replay(base_weights(dtype).__getitem__, experts)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def files_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compacted_ledger_replays_to_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    plain = write_ledger(tmp_path / "plain", experts=4, dtype=name)
    compacted = write_ledger(tmp_path / "ledger", experts=4, dtype=name)
    compacted.compact(base_weights(dtype).__getitem__, 3)
    for ledger in (compacted, Ledger.load(tmp_path / "ledger")):
        assert equal(weights_after(ledger, 3, dtype), weights_after(plain, 3, dtype))
        assert equal(weights_after(ledger, dtype=dtype), weights_after(plain, dtype=dtype))
    append(plain)
    append(compacted)
    compacted.compact(base_weights(dtype).__getitem__, 5)  # on top of the older snapshot
    assert files_in(compacted.directory) == {"ledger.json", "snapshot_0005.safetensors", "expert_0005.safetensors"}
    append(plain)
    append(compacted)
    for experts in (5, 6):
        again = Ledger.load(tmp_path / "ledger")
        assert equal(weights_after(again, experts, dtype), weights_after(plain, experts, dtype))


def test_the_first_expert_alone_can_be_compacted(tmp_path: Path) -> None:
    plain, ledger = write_ledger(tmp_path / "plain"), write_ledger(tmp_path / "ledger")
    ledger.compact(base_weights().__getitem__, 1)
    assert files_in(ledger.directory) == files_in(plain.directory) | {"snapshot_0001.safetensors"}
    assert equal(weights_after(Ledger.load(ledger.directory)), weights_after(plain))


def test_what_a_compacted_ledger_still_gives(tmp_path: Path) -> None:
    plain, ledger = write_ledger(tmp_path / "plain", experts=4), write_ledger(tmp_path / "ledger", experts=4)
    ledger.compact(base_weights().__getitem__, 2)
    ledger = Ledger.load(ledger.directory)
    assert files_in(ledger.directory) == {
        "ledger.json", "snapshot_0002.safetensors", *(f"expert_000{i}.safetensors" for i in (2, 3, 4))
    }  # fmt: skip
    content = json.loads((ledger.directory / "ledger.json").read_text())
    assert content["snapshot"]["experts"] == 2
    assert [record["index"] for record in content["experts"]] == [1, 2, 3, 4]
    assert [record.index for record, _ in ledger.closed()] == [3, 4]
    for (_, one), (_, other) in zip(list(plain.closed())[2:], ledger.closed(), strict=True):
        assert all(torch.equal(a, b) for name in NAMES for a, b in zip(one[name], other[name], strict=True))
    for index in (2, 4):
        pair = ledger.slow(index)[NAMES[1]]
        assert torch.equal(pair.A, random_pair(*SHAPE, 2, seed=10 * index + 1).A)
    held = load_file(ledger.directory / "snapshot_0002.safetensors")
    assert set(held) == {f"{name}.accumulator" for name in NAMES}
    for name, weight in plain.replay(base_weights().__getitem__, 2):  # in float32 a weight is its accumulator
        assert torch.equal(held[f"{name}.accumulator"], weight.flatten())
        assert torch.equal(ledger.accumulator_slice(name, 7, 31), weight.flatten()[7:31])
    assert ledger.size() == sum(path.stat().st_size for path in ledger.directory.glob("*.safetensors"))


def test_what_was_compacted_away_is_refused(tmp_path: Path) -> None:
    ledger = write_ledger(tmp_path / "ledger", experts=4)
    with pytest.raises(LedgerError, match="has no snapshot"):
        ledger.accumulator_slice(NAMES[0], 0, 1)
    ledger.compact(base_weights().__getitem__, 3)
    gone = "experts 1 to 3 were compacted into one snapshot, and what was there after 2 of them is gone: ask for 3"
    for ask in (
        lambda: weights_after(ledger, 2),
        lambda: ledger.slow(2),
        lambda: ledger.magnitudes(2),
        lambda: ledger.truncate(2, keep=True),
        lambda: ledger.compact(base_weights().__getitem__, 2),
    ):
        with pytest.raises(LedgerError, match=gone):
            ask()
    with pytest.raises(LedgerError, match="were compacted with their noise"):
        list(ledger.replay(base_weights().__getitem__, noise=False))
    assert equal(weights_after(Ledger.load(ledger.directory)), weights_after(ledger))


def test_a_snapshot_of_another_base_or_of_nothing_is_not_written(tmp_path: Path) -> None:
    ledger = write_ledger(tmp_path / "ledger")
    before = files_in(ledger.directory)
    other = base_weights()
    other[NAMES[1]][0, 0] += 1
    with pytest.raises(LedgerError, match="this ledger was written for"):
        ledger.compact(other.__getitem__, 2)
    with pytest.raises(LedgerError, match="a snapshot needs one or more"):
        ledger.compact(base_weights().__getitem__, 0)
    with pytest.raises(LedgerError, match="holds 3 experts, 4 were asked for"):
        ledger.compact(base_weights().__getitem__, 4)
    assert ledger.snapshot is None
    assert files_in(ledger.directory) == before


@pytest.mark.parametrize("damage", ["flip", "remove"])
@pytest.mark.parametrize("file", ["snapshot_0002.safetensors", "expert_0002.safetensors", "expert_0003.safetensors"])
def test_a_damaged_file_of_a_compacted_ledger_is_named(tmp_path: Path, file: str, damage: str) -> None:
    write_ledger(tmp_path / "ledger").compact(base_weights().__getitem__, 2)
    path = tmp_path / "ledger" / file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    if damage == "flip":
        path.write_bytes(data)
    with pytest.raises(LedgerError, match=file):
        Ledger.load(tmp_path / "ledger")


def test_a_snapshot_of_more_experts_than_there_are_is_refused(tmp_path: Path) -> None:
    write_ledger(tmp_path / "ledger").compact(base_weights().__getitem__, 2)
    path = tmp_path / "ledger" / "ledger.json"
    whole = path.read_text()
    path.write_text(whole.replace('"experts": 2', '"experts": 4').replace("snapshot_0002", "snapshot_0004"))
    with pytest.raises(LedgerError, match=r"lists 3 experts and as a snapshot Snapshot\(experts=4"):
        Ledger.load(tmp_path / "ledger")
    path.write_text(whole.replace('"experts": 2', '"experts": 3'))  # a flipped bit
    with pytest.raises(LedgerError, match=r"lists 3 experts and as a snapshot Snapshot\(experts=3"):
        Ledger.load(tmp_path / "ledger")


class Crash(BaseException):
    """The process dies: nothing catches it."""


def die(*arguments: object, **keywords: object) -> None:
    raise Crash


def die_unlinking(path: Path, missing_ok: bool = False) -> None:
    if not path.name.startswith(".tmp-"):  # those of atomic writes
        raise Crash


@pytest.mark.parametrize(
    ("where", "method", "death", "compacted"),
    [
        (os, "replace", die, 1),  # the snapshot is not published
        (Ledger, "save", die, 1),  # it is, but not listed
        (Path, "unlink", die_unlinking, 2),  # it is listed, and no expert is deleted yet
    ],
)
def test_a_crash_in_a_compaction_leaves_a_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: object, method: str, death: object, compacted: int
) -> None:
    ledger = write_ledger(tmp_path / "ledger")
    expected = weights_after(ledger)
    ledger.compact(base_weights().__getitem__, 1)
    with monkeypatch.context() as patch:
        patch.setattr(where, method, death)
        with pytest.raises(Crash):
            ledger.compact(base_weights().__getitem__, 2)
    left = Ledger.load(tmp_path / "ledger")
    assert left.compacted == compacted
    assert equal(weights_after(left), expected)
    left.compact(base_weights().__getitem__, 3)  # which clears what the crash left
    assert files_in(left.directory) == {"ledger.json", "snapshot_0003.safetensors", "expert_0003.safetensors"}
    assert equal(weights_after(Ledger.load(left.directory)), expected)


def test_the_digest_names_a_length(tmp_path: Path) -> None:
    ledger = write_ledger(tmp_path / "ledger", experts=2)
    of_two, of_one = ledger.sha256(), ledger.sha256(1)
    assert of_two != of_one
    assert ledger.sha256(0) not in (of_one, of_two)
    append(ledger)
    assert ledger.sha256(2) == of_two
    ledger.compact(base_weights().__getitem__, 2)
    assert Ledger.load(ledger.directory).sha256(2) == of_two
    with pytest.raises(LedgerError, match="holds 3 experts, 4 were asked for"):
        ledger.sha256(4)


@pytest.mark.parametrize("change", ["seed", "noise_scale", "pair"])
def test_the_digest_is_of_everything(tmp_path: Path, change: str) -> None:
    one, other = write_ledger(tmp_path / "one", experts=0), write_ledger(tmp_path / "other", experts=0)
    append(one)
    changes: dict[str, object] = {}
    if change == "seed":
        other.seed += 1
    elif change == "noise_scale":
        changes = {"noise_scale": dict.fromkeys(NAMES, 0.0625)}
    else:
        changes = {"slow": {name: random_pair(*SHAPE, 2, seed=99) for name in NAMES}}
    append(other, **changes)
    assert one.sha256() != other.sha256()
    other.truncate(0, keep=False)
    other.seed = one.seed
    append(other)
    assert one.sha256() == other.sha256()


@pytest.mark.parametrize("keep", [False, True])
def test_truncation_drops_the_last_experts(tmp_path: Path, keep: bool) -> None:
    plain, ledger = write_ledger(tmp_path / "plain"), write_ledger(tmp_path / "ledger")
    ledger.truncate(1, keep)
    assert len(ledger.experts) == 1
    dropped = {"expert_0002.safetensors", "expert_0003.safetensors"}
    assert files_in(ledger.directory) - {"discarded"} == files_in(plain.directory) - dropped
    assert equal(weights_after(Ledger.load(ledger.directory)), weights_after(plain, 1))
    discarded = ledger.directory / "discarded"
    if keep:
        assert files_in(discarded / "001") == dropped | {"ledger.json"}
        for file in files_in(discarded / "001"):
            assert (discarded / "001" / file).read_bytes() == (plain.directory / file).read_bytes()
        append(ledger)
        ledger.truncate(0, keep=True)  # beside what was there
        assert files_in(discarded / "002") == {"expert_0001.safetensors", "expert_0002.safetensors", "ledger.json"}
        assert files_in(discarded / "001") == dropped | {"ledger.json"}
    else:
        assert not discarded.exists()
    ledger.truncate(len(ledger.experts), keep)  # nothing to drop
    assert files_in(discarded) == {"001", "002"} if keep else not discarded.exists()
    with pytest.raises(LedgerError, match="were asked for"):
        ledger.truncate(2, keep)


def test_a_ledger_is_truncated_to_its_snapshot(tmp_path: Path) -> None:
    plain, ledger = write_ledger(tmp_path / "plain"), write_ledger(tmp_path / "ledger")
    ledger.compact(base_weights().__getitem__, 2)
    ledger.truncate(2, keep=False)
    assert files_in(ledger.directory) == {"ledger.json", "snapshot_0002.safetensors", "expert_0002.safetensors"}
    assert equal(weights_after(Ledger.load(ledger.directory)), weights_after(plain, 2))


@pytest.mark.parametrize(
    ("where", "method", "death", "experts"), [(Ledger, "save", die, 3), (Path, "unlink", die_unlinking, 1)]
)
def test_a_crash_in_a_truncation_leaves_a_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: object, method: str, death: object, experts: int
) -> None:
    ledger = write_ledger(tmp_path / "ledger")
    with monkeypatch.context() as patch:
        patch.setattr(where, method, death)
        with pytest.raises(Crash):
            ledger.truncate(1, keep=False)
    left = Ledger.load(tmp_path / "ledger")
    assert len(left.experts) == experts
    assert "expert_0002.safetensors" in files_in(left.directory)  # a leftover, or still listed
    left.truncate(1, keep=False)
    append(left)
    assert equal(weights_after(Ledger.load(left.directory)), weights_after(left))


def test_the_noise_can_be_left_out(tmp_path: Path) -> None:
    ledger = write_ledger(tmp_path / "ledger")
    quiet = write_ledger(tmp_path / "quiet", experts=0)
    for _ in ledger.experts:
        append(quiet, noise_scale={})
    without = [weight for _, weight in ledger.replay(base_weights().__getitem__, noise=False)]
    assert equal(without, weights_after(quiet))
    assert not equal(without, weights_after(ledger))


def test_noise_on_other_matrices_follows_the_experts(tmp_path: Path) -> None:
    weights = base_weights() | {"other.weight": torch.ones(3, 5)}
    ledger = write_ledger(tmp_path / "ledger", experts=0)
    ledger.noised = ("other.weight",)
    append(ledger, noise_scale={"other.weight": 0.5})
    append(ledger)

    def noised(**options: object) -> torch.Tensor:
        ((name, weight),) = ledger.replay_noised(weights.__getitem__, **options)  # pyright: ignore[reportArgumentType]
        assert name == "other.weight"
        return weight

    assert torch.equal(noised(experts=0), weights["other.weight"])
    assert torch.equal(noised(noise=False), weights["other.weight"])
    assert not torch.equal(noised(), weights["other.weight"])
    before = noised()
    ledger.compact(weights.__getitem__, 2)
    assert torch.equal(noised(), before)
    assert torch.equal(noised(experts=1), before)  # from the records alone


def test_magnitudes_are_those_after_an_expert(tmp_path: Path) -> None:
    ledger = write_ledger(tmp_path / "ledger", experts=1)
    assert ledger.magnitudes() == {}
    ledger.truncate(0, keep=False)
    for factor in (1.0, 2.0, 3.0):
        append(ledger, persistent={f"{name}.magnitude": (factor * torch.arange(6)).bfloat16() for name in NAMES})
    assert ledger.magnitudes(0) == {}
    ledger.compact(base_weights().__getitem__, 2)
    for experts, factor in ((2, 2.0), (3, 3.0), (None, 3.0)):
        found = ledger.magnitudes(experts)
        assert list(found) == list(NAMES)
        assert torch.equal(found[NAMES[1]], factor * torch.arange(6.0))  # float32, whatever was given


def test_no_expert_has_no_pair(tmp_path: Path) -> None:
    ledger = write_ledger(tmp_path / "ledger", experts=1)
    with pytest.raises(LedgerError, match="the first has index 1"):
        ledger.slow(0)
    with pytest.raises(LedgerError, match="holds 1 experts, 2 were asked for"):
        ledger.slow(2)


def test_files_of_a_compaction_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        ledger = write_ledger(tmp_path / "ledger")
        ledger.compact(base_weights().__getitem__, 2)
        ledger.truncate(2, keep=True)
    finally:
        os.umask(before)
    files = [path for path in ledger.directory.rglob("*") if path.is_file()]
    assert len(files) == 5
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o644"}
