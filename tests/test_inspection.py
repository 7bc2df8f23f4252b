"""Spectra against a dense decomposition and closed forms; the command on a ledger made by hand."""

from __future__ import annotations

import json
import math
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, base_weights
from test_experts import random_pair

from lorasc_ds.algorithm.experts import Pair
from lorasc_ds.algorithm.ledger import Adapter, Base, Ledger, digest
from lorasc_ds.algorithm.spectrum import LowRankSum, ranks, subspace_overlap
from lorasc_ds.inspection_rows import ROWS, inspect, mean_row
from lorasc_ds.ledger_commands import inspect as main
from lorasc_ds.models import QUICKSTART_BASE

S = 2.0
Q = "model.layers.0.self_attn.q_proj.weight"
V = "model.layers.0.self_attn.v_proj.weight"


def dense(pairs: list[Pair]) -> torch.Tensor:
    return sum((S * pair.B.double() @ pair.A.double() for pair in pairs), torch.tensor(0.0))


@pytest.mark.parametrize(("out_features", "in_features"), [(30, 40), (9, 40), (40, 9)])
def test_spectrum_is_that_of_the_formed_update(out_features: int, in_features: int) -> None:
    pairs = [random_pair(out_features, in_features, 4, seed=i) for i in range(6)]  # 24 in all: above 9, below 30
    total = LowRankSum.zero(out_features, in_features)
    added = 0
    for group in ([0], [1], [2, 3], [4, 5]):
        total.add([pairs[i] for i in group], S)
        added += len(group)
        expected = torch.linalg.svdvals(dense(pairs[:added]))
        kept = min(4 * added, out_features, in_features)
        assert total.values.shape == (kept,)
        torch.testing.assert_close(total.values, expected[:kept], rtol=1e-12, atol=0)
        assert float(expected[kept:].sum()) < 1e-12 * float(expected[0])
    formed = total.left @ torch.diag(total.values) @ total.right.T
    torch.testing.assert_close(formed, dense(pairs), rtol=0, atol=1e-12 * float(total.values[0]))


def test_orthogonal_experts_add_their_ranks_and_the_same_expert_adds_none() -> None:
    basis = torch.linalg.qr(random_pair(20, 20, 20).B)[0]
    experts = [Pair(basis[:, 3 * i : 3 * i + 3].T.contiguous(), basis[:, 3 * i : 3 * i + 3]) for i in range(3)]
    apart, same = LowRankSum.zero(20, 20), LowRankSum.zero(20, 20)
    for count, pair in enumerate(experts, start=1):
        apart.add([pair], S)
        same.add([experts[0]], S)
        for found, rank in ((ranks(apart.values), 3 * count), (ranks(same.values), 3)):
            assert found.numerical == rank
            assert found.effective == pytest.approx(rank, rel=1e-5)
            assert found.stable == pytest.approx(rank, rel=1e-5)
        assert float(same.values[0]) == pytest.approx(S * count, rel=1e-5)


def test_ranks_of_known_spectra() -> None:
    skewed = ranks(torch.tensor([2.0, 1.0, 1.0, 1e-7], dtype=torch.float64))
    assert skewed.effective == pytest.approx(2 * math.sqrt(2), rel=1e-5)  # entropy of (1/2, 1/4, 1/4) is 1.5 ln 2
    assert skewed.stable == pytest.approx(1.5)
    assert skewed.numerical == 3
    assert ranks(torch.zeros(4, dtype=torch.float64)) == (0.0, 0.0, 0)


def test_subspace_overlap_of_known_angles() -> None:
    one = torch.eye(5)[:, :2]
    angle = torch.tensor(0.3)
    tilted = torch.stack((one[:, 0], angle.cos() * one[:, 1] + angle.sin() * torch.eye(5)[:, 4]), 1)
    assert subspace_overlap(one, one @ torch.tensor([[3.0, 1.0], [0.0, 2.0]])) == pytest.approx(1.0)
    assert subspace_overlap(one, torch.eye(5)[:, 2:4]) == pytest.approx(0.0, abs=1e-12)
    assert subspace_overlap(one, tilted) == pytest.approx((1 + math.cos(0.3) ** 2) / 2, rel=1e-6)
    assert subspace_overlap(one, one[:, :1].repeat(1, 2)) == pytest.approx(1.0)  # of dimension 1, inside
    assert subspace_overlap(one, torch.zeros(5, 2)) == 0.0


def write_run(directory: Path, experts: int = 3, noise: float = 0.01) -> Ledger:
    """A ledger on two weights of the quickstart's model, (64, 64) both, with pairs of rank 8; and a summary."""
    weights = base_weights(QUICKSTART_BASE, [Q, V])
    base = Base("quickstart", None, "float32", digest(weights.values()))
    directory.mkdir()
    ledger = Ledger(directory / "ledger", "lorasc", base, Adapter("lora", 8, S), 7, 0.6, 0.1, (Q, V))
    ledger.save()
    for index in range(1, experts + 1):
        ledger.append(
            index=index, steps=(index - 1, index), slow_retention=0.6, noise_intensity=0.1,
            noise_scale=dict.fromkeys((Q, V), noise * (index > 1)),
            slow={name: random_pair(*weights[name].shape, 8, seed=10 * index + i) for i, name in enumerate((Q, V))},
        )  # fmt: skip
    write_summary(directory, digest(weight for _, weight in ledger.replay(weights.__getitem__)))
    return ledger


def write_summary(directory: Path, sha256: str) -> None:
    (directory / "summary.json").write_text(json.dumps({"weights_sha256": sha256}))


def test_rows_agree_with_dense_arithmetic(tmp_path: Path) -> None:
    ledger = write_run(tmp_path / "run")
    rows = inspect(ledger, 3)
    for i, name in enumerate((Q, V)):
        shape = base_weights(QUICKSTART_BASE, [name])[name].shape
        pairs = [random_pair(*shape, 8, seed=10 * index + i) for index in (1, 2, 3)]
        updates = [dense([pair]) for pair in pairs]
        for k, row in enumerate(rows[name], start=1):
            total = dense(pairs[:k])
            assert (row.expert, row.bound) == (k, min(8 * k, *shape))
            assert row.norm == pytest.approx(float(updates[k - 1].norm()))
            assert row.total_norm == pytest.approx(float(total.norm()))
            noise = 0.01 * math.sqrt(total.numel() / 12)
            assert row.noise * row.norm == pytest.approx(noise * (k > 1))
            assert row.total_noise * row.total_norm == pytest.approx(noise * math.sqrt(k - 1))
            if k == 1:
                assert (row.overlap, row.column_overlap, row.row_overlap) == (None, None, None)
            else:
                cosine = (updates[k - 1] * updates[k - 2]).sum() / updates[k - 1].norm() / updates[k - 2].norm()
                assert row.overlap == pytest.approx(float(cosine), abs=1e-9)
                assert row.column_overlap == pytest.approx(subspace_overlap(updates[k - 1], updates[k - 2]))
                assert row.row_overlap == pytest.approx(subspace_overlap(updates[k - 1].T, updates[k - 2].T))
    mean = mean_row([rows[Q][2], rows[V][2]])
    assert mean.effective_rank == pytest.approx((rows[Q][2].effective_rank + rows[V][2].effective_rank) / 2)
    assert mean.singular_values[5] == pytest.approx((rows[Q][2].singular_values[5] + rows[V][2].singular_values[5]) / 2)
    assert mean_row([rows[Q][0], rows[V][2]]).singular_values[20] == pytest.approx(rows[V][2].singular_values[20] / 2)


def test_of_many_experts_some_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    count = ROWS + 9
    ledger = write_run(tmp_path / "run", experts=count)
    rows = inspect(ledger, count)[Q]
    assert ROWS <= len(rows) <= ROWS + 1
    assert [rows[0].expert, rows[-1].expert] == [1, count]
    pairs = [random_pair(64, 64, 8, seed=10 * index) for index in range(1, count + 1)]
    assert rows[-1].total_norm == pytest.approx(float(dense(pairs).norm()))
    assert rows[-1].bound == 64
    for row in rows[1:]:
        overlap = subspace_overlap(pairs[row.expert - 1].B, pairs[row.expert - 2].B)
        assert row.column_overlap == pytest.approx(overlap)  # with the one before, shown or not


def command(run: Path, *flags: object) -> int:
    return main([str(run), *map(str, flags)])


def test_the_command_verifies_measures_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = write_run(tmp_path / "run")
    assert command(tmp_path / "run", "--output_dir", tmp_path / "out", "--per_weight") == 0
    printed = capsys.readouterr().out
    assert "3 of 3 have the sha256 that was written down" in printed
    assert "quickstart has the sha256 that the run began with" in printed
    assert "replay to the sha256 in summary.json" in printed
    assert f"{Q}:" in printed
    content = json.loads((tmp_path / "out" / "inspection.json").read_text())
    assert content["ledger_sha256"] == ledger.sha256()
    assert [row["expert"] for row in content["mean"]] == [1, 2, 3]
    first, last = (content["mean"][i]["effective_rank"] for i in (0, -1))
    assert f"effective rank {first:.1f} after expert 1, {last:.1f} after expert 3 (at most 24)" in printed
    assert len(content["weights"][V][2]["singular_values"]) == 24
    png = (tmp_path / "out" / "inspection.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.rstrip().endswith(b"IEND\xaeB`\x82")
    assert command(tmp_path / "run", "--experts", 2) == 0
    assert [row["expert"] for row in json.loads((tmp_path / "run" / "inspection.json").read_text())["mean"]] == [1, 2]


def test_the_launch_script_is_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["inspect_ledger.py", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "launch" / "inspect_ledger.py"), run_name="__main__")
    assert ended.value.code == 2
    assert "holds no ledger/" in capsys.readouterr().err


def test_a_ledger_alone_and_one_without_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = write_run(tmp_path / "run", experts=1)
    assert command(ledger.directory, "--output_dir", tmp_path / "out") == 0
    assert "there is no summary.json to compare with" in capsys.readouterr().out
    ledger.truncate(0, keep=False)
    assert command(ledger.directory) == 0
    assert "no expert has closed yet" in capsys.readouterr().out


def test_an_expert_that_adds_nothing_is_drawn(tmp_path: Path) -> None:
    ledger = write_run(tmp_path / "run", experts=0)
    pair = random_pair(64, 64, 8)
    for index in (1, 2):
        ledger.append(
            index=index, steps=(index - 1, index), slow_retention=0.0, noise_intensity=0.0, noise_scale={},
            slow=dict.fromkeys((Q, V), Pair(pair.A, torch.zeros_like(pair.B))),
        )  # fmt: skip
    assert command(ledger.directory, "--output_dir", tmp_path / "out") == 0
    last = json.loads((tmp_path / "out" / "inspection.json").read_text())["mean"][-1]
    assert (last["effective_rank"], last["total_norm"], last["overlap"], last["column_overlap"]) == (0, 0, 0, 0)
    assert last["row_overlap"] == pytest.approx(1)


@pytest.mark.parametrize("compacted", [1, 2])
def test_a_compacted_ledger_is_measured_from_its_snapshot_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], compacted: int
) -> None:
    ledger = write_run(tmp_path / "run")
    before = inspect(ledger, 3)
    ledger.compact(base_weights(QUICKSTART_BASE, [Q, V]).__getitem__, compacted)
    assert command(tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert "replay to the sha256 in summary.json" in printed
    assert ("are known only as part of a snapshot" in printed) == (compacted == 2)
    after = inspect(ledger, 3)
    assert (after == before) == (compacted == 1)
    assert [row.expert for row in after[Q]] == [1, 2, 3][compacted - 1 :]
    assert after[Q][-1].column_overlap == before[Q][-1].column_overlap
    if compacted == 2:
        assert after[Q][-1].bound == 16
        assert command(tmp_path / "run", "--experts", 1) == 2
        assert "has experts 2 to 3 to inspect" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["expert_0002.safetensors", "ledger.json"])
def test_a_flipped_bit_ends_with_code_4(tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str) -> None:
    ledger = write_run(tmp_path / "run")
    path = ledger.directory / file
    data = bytearray(path.read_bytes())
    data[0 if file == "ledger.json" else 5000] ^= 1
    path.write_bytes(data)
    assert command(tmp_path / "run") == 4
    error = capsys.readouterr().err
    assert file in error
    assert len(error.splitlines()) == 1


def test_other_weights_than_written_down_end_with_code_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    write_summary(tmp_path / "run", "0" * 64)
    assert command(tmp_path / "run") == 4
    assert "one of the two is of another run" in capsys.readouterr().err
    (tmp_path / "run" / "summary.json").write_text("{")
    assert command(tmp_path / "run") == 4
    assert "holds no weights_sha256 that can be read" in capsys.readouterr().err
    path = tmp_path / "run" / "ledger" / "ledger.json"
    path.write_text(path.read_text().replace('"sha256": "', '"sha256": "0', 1))  # the base's
    assert command(tmp_path / "run") == 4
    assert "this ledger was written for" in capsys.readouterr().err
    assert not (tmp_path / "run" / "inspection.json").exists()


def test_another_base_ends_with_code_4(tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", experts=1)
    assert command(tmp_path / "run", "--base", tiny_folder) == 4  # its weights have other shapes
    assert "this ledger was written for" in capsys.readouterr().err


def test_a_base_that_cannot_be_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", experts=1)
    path = tmp_path / "run" / "ledger" / "ledger.json"
    path.write_text(path.read_text().replace('"quickstart"', '"gone/away"'))
    assert command(tmp_path / "run") == 0
    assert "base      not checked: model.name_or_path gone/away" in capsys.readouterr().out
    shutil.copytree(QUICKSTART_BASE, tmp_path / "base")
    assert command(tmp_path / "run", "--base", tmp_path / "base") == 0
    assert f"{tmp_path / 'base'} has the sha256 that the run began with" in capsys.readouterr().out
    assert command(tmp_path / "run", "--base", tmp_path / "nowhere") == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "flags", "message"),
    [
        ("nowhere", (), "nowhere holds no ledger/: give the directory of a run"),
        ("run", ("--experts", 0), "has experts 1 to 1 to inspect"),
        ("run", ("--experts", 2), "has experts 1 to 1 to inspect"),
        ("run", ("--expert", 1), "unrecognized arguments"),
        ("run", ("--output_dir", "run/summary.json"), "--output_dir .*summary.json: .*; choose another"),
    ],
)
def test_a_wrong_command_line_ends_with_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    run: str,
    flags: tuple[object, ...],
    message: str,
) -> None:
    write_run(tmp_path / "run", experts=1)
    monkeypatch.chdir(tmp_path)
    assert command(Path(run), *flags) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error
