"""The benchmark command: what it counts against closed forms, its arithmetic by hand, and one quick run of it all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forking
import matplotlib.image
import pytest
import torch
from torch import nn

from lorasc_ds.benchmark import command, counts, gpu_steps, ranks, results, shapes
from lorasc_ds.benchmark.catalogue import ROWS
from lorasc_ds.benchmark.options import parse
from lorasc_ds.benchmark.report import advantage
from lorasc_ds.benchmark.results import Result, Spread, Target
from lorasc_ds.benchmark.setting import Setting
from lorasc_ds.benchmark.timing import Seconds, in_turns, order_of, seconds_of
from lorasc_ds.benchmark.traffic import Traffic

CPU = torch.device("cpu")
OF_RANKS = [id for id, row in ROWS.items() if row.function == "ranks:rows"]  # forked here, to import once


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One run of every row on small shapes."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "ranks").mkdir()
    alone = ",".join(id for id in ROWS if id not in OF_RANKS)
    arguments = ["--output_dir", str(folder / "out"), "--quick", "--rows", alone]
    job = {"folder": str(folder / "ranks"), "repetitions": 2, "warm_up": 1, "quick": True}
    on_gpu = ["--output_dir", str(folder / "gpu"), "--rows", "G1,G2,G5"]
    jobs = (
        forking.Job("lorasc_ds.benchmark.command:main", [arguments], str(folder / "log"), 240),
        forking.Job("lorasc_ds.benchmark.rank:main", [job], str(folder / "rank"), 240, forking.group(2)),
        forking.Job("lorasc_ds.benchmark.command:main", [on_gpu], str(folder / "log-gpu"), 240),
    )
    for ended in forking.run(*jobs):
        assert not any(code for code in ended.codes if code), ended.err
    content = json.loads((folder / "out" / "benchmark.json").read_text())
    found = json.loads((folder / "ranks" / "found.json").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "measured", lambda setting: found)
        options = parse(["--output_dir", str(folder / "none"), "--quick"])
        content["results"] += [one.as_json() for one in ranks.rows(Setting(options, folder, CPU, {}))]
    return SimpleNamespace(content=content, folder=folder / "out")


def results_of(quick: SimpleNamespace, row: str) -> list[dict[str, Any]]:
    return [one for one in quick.content["results"] if one["row"] == row]


def test_every_row_has_a_number(quick: SimpleNamespace) -> None:
    for row in ROWS:
        found = results_of(quick, row)
        assert found, row
        if row != "G8":  # backends that a CPU does not have
            assert all(one["missing"] is None or "pip install" in one["missing"] for one in found), found
        assert any(one["value"] is not None for one in found), row


def test_the_json_says_what_was_measured_with_what(quick: SimpleNamespace) -> None:
    content = quick.content
    assert set(content) == {"format", "about", "results"}
    assert {"device", "threads", "cores", "packages", "commit", "command", "ceilings", "options"} <= set(
        content["about"]
    )
    assert all(value > 0 for value in content["about"]["ceilings"].values())
    keys = {
        "row",
        "measure",
        "value",
        "unit",
        "low",
        "high",
        "target",
        "ours",
        "peer",
        "details",
        "missing",
        "judged",
        "verdict",
    }
    for one in content["results"]:
        assert set(one) == keys
        if one["low"] is not None:
            assert one["low"] <= one["value"] <= one["high"], one


def test_small_shapes_are_not_judged_by_targets_of_large_ones(quick: SimpleNamespace) -> None:
    verdicts = {
        one["verdict"] for row in ("C1", "C2", "S1", "G1", "G6") for one in results_of(quick, row) if one["target"]
    }
    assert verdicts <= {"not judged: small shapes", "met"}
    assert [one["verdict"] for one in results_of(quick, "C6")] == ["met"]


def test_the_table_and_the_picture(quick: SimpleNamespace) -> None:
    table = (quick.folder / "benchmark.md").read_text()
    assert table.startswith(
        "| row | measure | ours | peer | result | quartiles | target | verdict |\n|---|---|---|---|---|---|---|---|\n"
    )
    pixels = matplotlib.image.imread(quick.folder / "benchmark.png")[..., :3]
    assert pixels.shape[0] > 500
    assert (pixels.std(axis=2) < 1e-6).all()  # readable in grey: there is nothing else


def test_what_is_bound_to_come_out(quick: SimpleNamespace) -> None:
    """HF + PEFT's activations: 3 x 11008 + 8 x 4096 ... in bfloat16 and float32, as counted by hand."""
    width, inner, heads, rank = 4096, 11008, 32, 8
    norms = 2 * (4 * width + 4)  # float32 input and its inverse deviation
    attention = 4 * 2 * width + 4 * heads  # q, k, v, the output; a number a row and head
    pairs = 2 * (4 * width + 4 * rank)  # the float32 copy of the input of q and v, and what A makes of it
    expected = norms + attention + pairs + 3 * 2 * inner
    (activations,) = results_of(quick, "C8")
    assert activations["details"]["peer_kibibytes"] == pytest.approx(expected / 1024, abs=0.2)
    assert activations["details"]["peer_kibibytes"] == pytest.approx(160.6, abs=0.2)
    (checkpoint,) = results_of(quick, "C11")
    pair_bytes = 4 * 4 * (rank * width + width * rank)  # two layers' q and v in float32
    assert pair_bytes < checkpoint["details"]["expert_bytes"] < pair_bytes + 2048
    assert checkpoint["details"]["merged_bytes"] == 2 * (
        2 * (4 * width**2 + 3 * width * inner + 2 * width) + 2 * 32000 * width + width
    )


def test_bytes_communicated(quick: SimpleNamespace) -> None:
    """DDP sums the gradients of four pairs of rank 8 on 16 x 16, and a few counts; a local boundary tells nothing."""
    moved = {one["measure"]: one["value"] for one in results_of(quick, "Z2")}
    gradients = 4 * 4 * 2 * 8 * 16
    assert gradients <= moved["bytes handed to collectives by a step, ddp x 2"] < gradients + 256
    for engine in ("ddp", "zero1", "zero2", "zero3"):
        assert moved[f"bytes handed to collectives by a boundary, {engine} x 2"] == 0
    weights = 4 * 4 * 16 * 16  # float32
    assert moved["bytes handed to collectives by a boundary, zero3, gather x 2"] >= 2 * weights  # gathered twice


def test_nothing_is_compiled_again_and_nothing_grows(quick: SimpleNamespace) -> None:
    graphs, grown = results_of(quick, "C12")
    assert graphs["details"]["graphs_before"] > 0
    assert graphs["value"] == grown["value"] == 0


def test_real_lengths_of_alpaca_are_padded_by_others(quick: SimpleNamespace) -> None:
    (found,) = results_of(quick, "C9")
    assert found["details"]["padded"] > 1.3
    assert 1 <= found["details"]["packed"] < found["details"]["padded"]


def test_candidates_by_hand(quick: SimpleNamespace) -> None:
    """80 tokens and 4 x 25: one by one 4 x 105, shared 80 + 4 x 24, since the last of each is not read."""
    first = next(one for one in results_of(quick, "C10") if one["measure"].startswith("tokens"))
    assert (first["ours"], first["peer"]) == (str(80 + 4 * 24), str(4 * 105))
    assert first["value"] == pytest.approx(420 / 176)


def test_ratios_are_of_turns_and_medians_by_hand() -> None:
    seconds = {"ours": [1.0, 2.0, 4.0], "PEFT": [3.0, 4.0, 20.0]}
    one = results.ratio("C1", "a boundary", seconds, ("PEFT", "ours"), Target(">=", 2.5))
    assert (one.value, one.low, one.high) == (3.0, 2.5, 4.0)
    assert (one.ours, one.peer, one.verdict) == ("ours: 2 s", "PEFT: 4 s", "met")
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert results.ratio("S1", "a step", seconds, ("ours", "PEFT"), Target("<=", 0.3)).verdict == "missed"
    assert results.table([one]).splitlines()[2] == (
        "| C1 | a boundary | ours: 2 s | PEFT: 4 s | 3× | 2.5 to 4 | >= 2.5 | met |"
    )


def test_verdicts() -> None:
    assert Result("G1", "speed", missing="needs a GPU").verdict == "not measured: needs a GPU"
    assert Result("C12", "graphs", 0, target=Target("==", 0)).verdict == "met"
    assert Result("C4", "error", float("nan"), target=Target("<=", 1e-6)).verdict == "missed"
    assert advantage(Target(">=", 2.0), 3.0) == advantage(Target("<=", 3.0), 2.0) == 1.5


def test_variants_take_turns_and_each_is_the_first_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gc.collect", lambda: 0)  # of all that pytest holds
    called: list[str] = []
    variants = {name: lambda name=name: called.append(name) for name in "abc"}
    found = in_turns(variants, repetitions=3, warm_up=1, device=CPU)
    assert ["".join(called[at : at + 3]) for at in range(0, 12, 3)] == ["cab", "abc", "bca", "cab"]
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 3, "b": 3, "c": 3}
    assert order_of(["x", "y"], 1) == ["y", "x"]
    assert seconds_of(lambda: Seconds(7.5), CPU) == 7.5


def test_flops_of_a_linear_layer_and_what_it_keeps() -> None:
    layer, x = nn.Linear(6, 4, bias=False), torch.randn(5, 6, requires_grad=True)
    assert shapes.flops_of(lambda: layer(x).sum()) == 3 * 2 * 5 * 6 * 4
    assert shapes.saved_bytes(lambda: layer(x.exp()).sum()) == 4 * 5 * 6  # exp keeps what the layer keeps
    # of performance.md: 26.43 GFLOP, and 1.61 of attention at 2048
    assert gpu_steps.flops_per_token(shapes.llama2_7b(), 2048) / 1e9 == pytest.approx(26.43 + 1.61, abs=0.01)


def test_shards_agree_and_a_wrong_start_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert counts.merged_in_shards(5, 7, 1) == counts.merged_in_shards(5, 7, 3)
    edit = counts.merge.edit_
    monkeypatch.setattr(counts.merge, "edit_", lambda edits: edit([one._replace(start=0) for one in edits]))
    assert counts.merged_in_shards(5, 7, 1) != counts.merged_in_shards(5, 7, 3)


def test_fidelity_by_hand() -> None:
    meant = torch.tensor([3.0, 4.0]).double()
    assert counts.relative_error(meant / 2, meant) == pytest.approx(0.5)
    assert counts.share_kept(meant / 2, meant) == pytest.approx(0.5)


def test_what_processes_are_told_is_counted() -> None:
    """Of one process alone: 3 float32 summed, 2 float64 gathered from one."""
    import torch.distributed as dist

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with Traffic() as traffic:
            dist.all_reduce(torch.ones(3))
            dist.all_gather([torch.empty(2, dtype=torch.float64)], torch.ones(2, dtype=torch.float64))
            dist.barrier()
    finally:
        dist.destroy_process_group()
    assert sorted(traffic.bytes.values()) == [12, 16]


BAD = {
    "unknown row": (["--rows", "C1,C13"], "--rows C1,C13: 'C13' is not one of S1, S2, S3, C1, "),
    "no row": (["--rows", ","], "--rows is empty: name one or more of S1"),
    "one turn": (["--repetitions", "1"], "--repetitions is 1: a number from 2 on is needed"),
    "sizes": (["--boundaries", "3x64"], "--boundaries is 3x64: sizes like 64x64"),
    "widths": (["--hidden_sizes", "20"], "--hidden_sizes is 20: multiples of 16"),
    "unknown flag": (["--row", "C1"], "unknown argument --row; did you mean --rows?"),
    "no data": (["--data_dir", "/nowhere"], "--data_dir /nowhere is no folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_command_line_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = BAD[case]
    assert command.main(["--output_dir", str(tmp_path / "out"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}"), line
    assert not (tmp_path / "out").exists()


def test_a_launcher_and_a_folder_that_exists_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command.main(["--output_dir", str(tmp_path)]) == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command.main(["--output_dir", str(tmp_path / "out")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"error: --output_dir {tmp_path} exists: give a folder that does not exist yet"
    assert second.startswith("error: WORLD_SIZE is 2: start benchmark.py by python alone")


def test_rows_and_sizes_are_read(tmp_path: Path) -> None:
    options = parse(["--output_dir", str(tmp_path / "out"), "--rows", "c8, c1", "--boundaries", "2x32,64x1024"])
    assert options.rows == ("C1", "C8")
    assert options.boundaries == ((2, 32), (64, 1024))
    assert (options.repetitions, options.warm_up) == (7, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_rows_say_so(quick: SimpleNamespace) -> None:
    found = json.loads((quick.folder.parent / "gpu" / "benchmark.json").read_text())["results"]
    assert [(one["row"], one["verdict"]) for one in found] == [
        (id, "not measured: needs a GPU") for id in ("G1", "G2", "G5")
    ]


def test_a_process_that_fails_is_named_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho rank $RANK of $WORLD_SIZE has no memory; exit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    setting = Setting(parse(["--output_dir", str(tmp_path / "out"), "--processes", "3"]), tmp_path, CPU, {})
    with pytest.raises(RuntimeError, match=r"\[3, 3, 3\]:\nrank 0 of 3 has no memory"):
        ranks.measured(setting)


def test_settings_count_their_folders(tmp_path: Path) -> None:
    setting = Setting(parse(["--output_dir", str(tmp_path / "out")]), tmp_path, CPU, {})
    assert len({setting.fresh("a"), setting.fresh("a")}) == 2
