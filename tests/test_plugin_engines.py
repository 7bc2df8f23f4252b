"""The plug-in on two processes: the runs of `plugin_cases.py`, looped inside one pair of processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from forking import Job, group, run
from plugin_cases import EXPERTS, STEPS, cases
from test_engines import save_model

pytestmark = pytest.mark.timeout(400)  # the first of these tests runs all cases

CASES = {case.name: case for case in cases()}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What a case of `plugin_cases.py` has written, all of them run when the first is asked for."""
    folder = tmp_path_factory.mktemp("pair")
    model = save_model(tmp_path_factory.mktemp("models") / "odd", hidden_size=35, head_dim=10, layers=2)
    (ended,) = run(Job("plugin_cases:main", [str(folder), str(model)], str(folder / "log"), 300, group(2)))

    def result(name: str) -> dict[str, Any]:
        path = folder / f"{name}.json"
        assert path.is_file(), f"the processes ended before this case: {ended.codes} {ended.err}"
        found = json.loads(path.read_text())
        assert "error" not in found, found["error"]
        return found

    return result


@pytest.mark.parametrize(
    "name", [name for name in CASES if name.startswith(("hand-", "trainer-")) and "bf16" not in name]
)
def test_every_loop_makes_this_packages_run(name: str, pair: Callable[[str], dict[str, Any]]) -> None:
    """To the bit, under each engine: the loops do the same arithmetic; they may divide a loss at another place."""
    found, own = pair(name), pair(f"own-{name.split('-', 1)[1]}")
    assert found["digests"] == own["digests"]
    assert found["live"] == own["live"]
    assert found["losses"] == pytest.approx(own["losses"], rel=1e-5)
    assert len(found["digests"]) == 2 * EXPERTS
    assert len(found["losses"]) == STEPS


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("hand-", "trainer-"))])
def test_boundaries_are_whole(name: str, pair: Callable[[str], dict[str, Any]]) -> None:
    """The ledger, replayed on one process, gives the live weights; pairs begin anew in master and copy."""
    found = pair(name)
    assert found["replayed"] == found["live"] == found["digests"][-1]
    assert len(set(found["digests"])) == 2 * EXPERTS  # noise and merge each move the weights; expert 1 has no noise
    assert found["off"] == [0.0] * EXPERTS
    assert found["moments"][1:] == [0.0] * (EXPERTS - 1)  # before the first step there may be none
    if CASES[name].loop == "trainer":
        assert found["merged"] == found["live"]
        assert found["dtype"] == ("bfloat16" if CASES[name].bf16 else "float32")
    if CASES[name].bf16:
        assert set(found["dtypes"]) == {f"torch.{CASES[name].pairs}"}  # of the copy that computes


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].expect == "resume"])
def test_a_trainers_run_resumes_to_the_same_bits(name: str, pair: Callable[[str], dict[str, Any]]) -> None:
    found = pair(name)
    assert found["resumed"] == found["live"]
    assert found["again"] == found["digests"][-len(found["again"]) :]
    assert len(found["again"]) == 3  # a closing, an opening, a closing


def test_engines_and_optimizers_that_would_be_restarted_by_halves_are_refused(
    pair: Callable[[str], dict[str, Any]],
) -> None:
    assert pair("refused-bf16-optimizer")["refused"].startswith("BF16_Optimizer keeps copies of the pairs")
    assert pair("refused-mixed-group")["refused"].startswith(
        "a parameter group holds 8 parameters of LoRA pairs and 4 others"
    )
    for name in ("zero2", "zero3"):
        found = pair(f"refused-raw-optimizer-{name}")["refused"]
        assert found.startswith("this AdamW has 0 of the 8 parameters")
        assert found.endswith("give Cascade the optimizer that prepare returned, not the one that it was given")
