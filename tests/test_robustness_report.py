"""The tables of the robustness sets, word for word."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from lorasc_ds.robustness_report import COLUMNS, QUOTED, as_markdown, as_text, sheets, tell


def result(**metrics: float) -> dict[str, Any]:
    return {"metrics": {"test": {name.replace("__", "/"): value for name, value in metrics.items()}}}


SUMMARY = {
    "description": "run runs/big_g",
    "limit": None,
    "tasks": {
        "imagenet": result(accuracy=0.87149, loss=0.5),
        "imagenet_v2": result(accuracy=0.7825, loss=0.5),
        "imagenet_c": result(
            accuracy=0.65,
            mce=0.4321,
            accuracy__fog=0.7,
            accuracy__snow=0.6,
            accuracy__fog__1=0.8,
            accuracy__fog__2=0.6,
            accuracy__snow__1=0.65,
            accuracy__snow__2=0.55,
            loss=1.0,
        ),
        "rte": result(accuracy=0.5),
    },
}

TEXT = """\
robustness, top-1 in percent
  subject          ImageNet  IN-V2  IN-C  IN-R  IN-A  IN-SK  IN-ST
  run runs/big_g       87.1   78.2  65.0     -     -      -      -
  LoRA (quoted)        87.1   77.7  66.2  87.1  72.6   64.9   24.1
  LoRASC (quoted)      87.8   78.4  66.8  88.7  73.4   65.5   24.4
  quoted: the paper's Table 3, CLIP ViT-bigG/14, LoRA and +++ Noise Tuning
  -: not scored (imagenet_r, imagenet_a, imagenet_sketch, imagenet_stylized)
  mCE 43.2: ImageNet-C's errors, each in percent of AlexNet's
by severity, top-1 in percent: imagenet_c
  corruption     1     2  mean
  fog         80.0  60.0  70.0
  snow        65.0  55.0  60.0
  mean                    65.0"""

MARKDOWN = """\
## Robustness, top-1 in percent

| subject | ImageNet | IN-V2 | IN-C | IN-R | IN-A | IN-SK | IN-ST |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| run runs/big\\_g | 87.1 | 78.2 | 65.0 | - | - | - | - |
| LoRA (quoted) | 87.1 | 77.7 | 66.2 | 87.1 | 72.6 | 64.9 | 24.1 |
| LoRASC (quoted) | 87.8 | 78.4 | 66.8 | 88.7 | 73.4 | 65.5 | 24.4 |

quoted: the paper's Table 3, CLIP ViT-bigG/14, LoRA and +++ Noise Tuning

-: not scored (imagenet\\_r, imagenet\\_a, imagenet\\_sketch, imagenet\\_stylized)

mCE 43.2: ImageNet-C's errors, each in percent of AlexNet's

## By severity, top-1 in percent: imagenet\\_c

| corruption | 1 | 2 | mean |
| --- | ---: | ---: | ---: |
| fog | 80.0 | 60.0 | 70.0 |
| snow | 65.0 | 55.0 | 60.0 |
| mean |  |  | 65.0 |
"""


def test_both_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert as_text(sheets(SUMMARY)) == TEXT
    assert as_markdown(sheets(SUMMARY)) == MARKDOWN
    tell(tmp_path, SUMMARY)
    assert capsys.readouterr().out == TEXT + "\n"
    assert (tmp_path / "robustness.md").read_text() == MARKDOWN


def test_a_limit_is_told() -> None:
    limited = copy.deepcopy(SUMMARY) | {"limit": 5}
    lines = as_text(sheets(limited)).splitlines()
    note = "  limited: at most 5 images of every class, and of every corruption and severity"
    assert [line for line in lines if "limited" in line] == [
        note + "; this is not comparable with the quoted rows",
        note,
    ]


def test_own_corrupted_images_have_no_row_beside_the_paper_s() -> None:
    """Severities in the order of their numbers; what is not there is a dash."""
    scores = {"accuracy": 0.5, "accuracy/fog": 0.4, "accuracy/rain": 0.6}
    scores |= {"accuracy/fog/10": 0.3, "accuracy/fog/2": 0.5, "accuracy/rain/2": 0.6}
    tasks = {"corrupted_images": {"metrics": {"test": scores}}}
    assert as_text(sheets(SUMMARY | {"tasks": tasks})).splitlines() == [
        "by severity, top-1 in percent: corrupted_images",
        "  corruption     2    10  mean",
        "  fog         50.0  30.0  40.0",
        "  rain        60.0     -  60.0",
        "  mean                    50.0",
    ]


def test_nothing_to_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell(tmp_path, SUMMARY | {"tasks": {"rte": result(accuracy=0.5)}})
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


def test_the_quoted_rows_are_the_paper_s(shared_data: Path) -> None:
    text = (shared_data.parent / "paper.md").read_text()
    assert "\t".join(["LoRA", *QUOTED["LoRA (quoted)"]]) in text
    assert "\t".join(["+++ Noise Tuning", *QUOTED["LoRASC (quoted)"]]) in text
    assert "\t".join(["Method", *COLUMNS.values()]) in text
