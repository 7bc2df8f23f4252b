"""ImageNet-C's numbers against a case worked out by hand and against the reference's form."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from lorasc_ds.tasks.mce import ALEXNET, SEVERITIES, of_corruptions, of_imagenet_c

GROUPS = [f"{corruption}/{severity}" for corruption in ALEXNET for severity in SEVERITIES]


def test_by_hand() -> None:
    """An error of 0.30 under all corruptions, of 0.20 to 0.40 over the severities, divided by each of AlexNet's."""
    by_group = {f"{c}/{s}": 0.85 - 0.05 * s for c in ALEXNET for s in SEVERITIES}
    shares = [0.338437, 0.335395, 0.325154, 0.365907, 0.363078]  # 0.3 / 0.886428, 0.3 / 0.894468, ...
    shares += [0.381705, 0.375770, 0.346094, 0.362945, 0.366156]
    shares += [0.531357, 0.351616, 0.464356, 0.417920, 0.494641]  # their sum: 5.820531
    found = of_imagenet_c(by_group)
    assert found["mce"] == pytest.approx(5.820531 / 15, abs=1e-6) == pytest.approx(sum(shares) / 15, abs=1e-6)
    assert found["accuracy"] == pytest.approx(0.7, abs=1e-12)
    assert found["accuracy/fog"] == pytest.approx(0.7, abs=1e-12)
    assert found["accuracy/fog/5"] == pytest.approx(0.6, abs=1e-12)
    assert len(found) == 2 + 15 + 75
    changed = by_group | {f"brightness/{s}": 1.0 for s in SEVERITIES}  # the lightest of them weighs most
    assert of_imagenet_c(changed)["mce"] == pytest.approx((5.820531 - 0.531357) / 15, abs=1e-6)


def test_alexnet_has_an_mce_of_one_and_a_perfect_model_of_none() -> None:
    assert of_imagenet_c({g: 1 - ALEXNET[g.split("/")[0]] for g in GROUPS})["mce"] == pytest.approx(1, abs=1e-12)
    assert of_imagenet_c(dict.fromkeys(GROUPS, 1.0))["mce"] == 0


def test_the_reference_divides_once_per_corruption() -> None:
    """A mean over severities of errors over AlexNet's mean error, in percent, as its authors write it."""
    accuracies = np.random.default_rng(0).random((15, 5))
    by_group = dict(zip(GROUPS, accuracies.ravel().tolist(), strict=True))
    expected = np.mean((100 - 100 * accuracies.mean(axis=1)) / (100 * np.array([*ALEXNET.values()])) * 100)
    found = of_imagenet_c(by_group)
    assert 100 * found["mce"] == pytest.approx(expected, rel=1e-12)
    assert found["accuracy"] == pytest.approx(accuracies.mean(), rel=1e-12)


def test_every_corruption_counts_the_same_however_many_severities_it_has() -> None:
    found = of_corruptions({"fog/1": 0.2, "fog/2": 0.4, "fog/3": 0.6, "rain/2": 0.8})
    assert found == pytest.approx(
        {"accuracy": 0.6, "accuracy/fog": 0.4, "accuracy/rain": 0.8}
        | {"accuracy/fog/1": 0.2, "accuracy/fog/2": 0.4, "accuracy/fog/3": 0.6, "accuracy/rain/2": 0.8}
    )
    assert "mce" not in of_imagenet_c(dict.fromkeys(GROUPS[1:], 0.5))


def test_alexnet_s_errors_are_the_published_ones(shared_data: Path) -> None:
    text = (shared_data.parent / "protocols.md").read_text()
    line = re.search(r"AlexNet errors: (.*?)\. \(ER", text)
    assert line is not None
    assert {name: float(value) for name, value in re.findall(r"(\w+) (\.\d+)", line[1])} == ALEXNET
