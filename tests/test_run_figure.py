"""What the figures of a run show is what its files hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Start
from test_inspection import write_run

from lorasc_ds import inspection_figure, run_figure
from lorasc_ds.errors import ConfigError
from lorasc_ds.figure_files import files_of
from lorasc_ds.inspection_rows import inspect, mean_row
from lorasc_ds.ledger_commands import inspect as main


def curves_of(axis: Any) -> dict[str, list[tuple[float, float]]]:
    """By their names in the legend, the points drawn."""
    return {line.get_label(): [*zip(*line.get_data(), strict=True)] for line in axis.get_lines()}


def positions(axis: Any, label: str) -> list[float]:
    """Where the lines of a collection stand."""
    (lines,) = [one for one in axis.collections if one.get_label() == label]
    return [float(segment[0][0]) for segment in lines.get_segments()]


def test_curves_are_those_of_the_run(run: Start) -> None:
    done = run(**{"cascade.experts": 2, "tracking.log_steps": 2, "cascade.noise_intensity": 10})
    figure = run_figure.draw(run_figure.read_events(done.directory / "metrics.jsonl"), "a run")
    losses, scores = figure.axes
    drawn = curves_of(losses)
    assert drawn["training"] == [(one["step"], one["loss"]) for one in done.metrics("step")]
    scored = {one["step"]: one["scores"] for one in done.metrics("eval")}
    assert drawn["dev"] == [(step, of["dev"]["loss"]) for step, of in scored.items()]
    assert [*scored] == [0, 3, 4, 6, 9]  # inside an expert, too
    splits = {split.replace("_", " "): split for split in scored[0]}
    assert curves_of(scores) == {
        shown: [(step, of[split]["accuracy"]) for step, of in scored.items()] for shown, split in splits.items()
    }
    assert positions(losses, "expert merged") == [one["step"] for one in done.metrics("close")] == [4, 9]
    assert (scores.get_ylabel(), scores.get_xlabel()) == ("accuracy", "optimizer step")
    signs = [one for one in done.metrics("warning") if "sign" in one]
    assert [(text.get_text(), text.xy[0]) for text in losses.texts] == [
        (one["sign"].replace("_", " "), one["step"]) for one in signs
    ]
    assert signs


def test_many_boundaries_are_ticks_and_a_run_without_scores_has_one_panel() -> None:
    closed = range(1, run_figure.LINES + 2)
    events = [{"event": "step", "step": step, "loss": 1 / step if step != 3 else None} for step in closed]
    events += [{"event": "close", "step": step} for step in closed]
    (axis,) = run_figure.draw(events, "many").axes
    drawn = curves_of(axis)
    assert [step for step, _ in drawn["expert merged"]] == [*closed]
    assert drawn["training"] == [(step, 1 / step) for step in closed if step != 3]


def test_spectra_and_overlaps_are_those_of_the_ledger(tmp_path: Path) -> None:
    rows = [mean_row(of_expert) for of_expert in zip(*inspect(write_run(tmp_path / "run"), 3).values(), strict=True)]
    spectra, _, overlaps, noise = inspection_figure.draw(rows, "a ledger").axes
    for line, row in zip(spectra.get_lines(), rows, strict=True):
        assert [*line.get_ydata()] == [value for value in row.singular_values if value > 1e-6 * row.singular_values[0]]
    cosines = curves_of(overlaps)["cosine of the two updates"]
    assert cosines == [(row.expert, row.overlap) for row in rows[1:]]
    assert curves_of(noise)["noise before the expert / its update"] == [(row.expert, row.noise) for row in rows]
    alone = inspection_figure.draw(rows[:1], "one expert").axes
    assert [[text.get_text() for text in axis.texts] for axis in alone[2:]] == [
        ["there is one expert"], ["there was no noise"]
    ]  # fmt: skip


def test_the_command_writes_them_and_again_the_same(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run)
    records = [{"event": "step", "step": 1, "loss": 2.0}, {"event": "close", "step": 1}]
    text = "".join(f"{json.dumps(one)}\n" for one in records)
    (run / "metrics.jsonl").write_text(text + '{"event": "st')  # still being written
    written = []
    for name in ("one", "two"):
        assert main([str(run), "--output_dir", str(tmp_path / name)]) == 0
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    kinds = ("inspection.json", "inspection.png", "inspection.svg", "curves.png", "curves.svg")
    assert sorted(written[0]) == sorted(kinds)
    assert written[0] == written[1]
    assert b"singular value</text>" in written[0]["inspection.svg"]
    assert written[0]["curves.png"] == files_of({"curves": run_figure.draw(records, "lorasc, rank 8")})["curves.png"]
    (run / "metrics.jsonl").write_text(f"{text}}}\n")
    with pytest.raises(ConfigError, match=r"metrics.jsonl holds a line that is no JSON"):
        run_figure.read_events(run / "metrics.jsonl")
    assert main([str(run)]) == 2
