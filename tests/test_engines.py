"""Every engine against one process: the same losses, the same bits, a real restart, bounded memory.

The runs are those of `engine_cases.py`, looped inside one set of processes per world size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import Case, cases, make_trainer
from engine_measures import merged_from_given_pairs, trained
from forking import Job, group, run
from transformers import LlamaConfig, LlamaForCausalLM

from lorasc_ds.quickstart.make_base import make_tokenizer

pytestmark = pytest.mark.timeout(1000)  # the first test of a world size runs all of its cases

CASES = {case.name: case for case in cases()}
EQUALITIES = [case for case in CASES.values() if case.measure == "equality"]
TRAINED = [case for case in CASES.values() if case.measure in ("equality", "method")]
RESTARTS = [case for case in CASES.values() if case.looks_at_the_restart]


def save_model(folder: Path, hidden_size: int, head_dim: int, layers: int) -> Path:
    """A random Llama with biases and tied embeddings.

    With sizes 35 and 10 nothing adapted divides by 3 or 4, and `A` not by 2; q, v and `B` do, as heads must be even.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=hidden_size,
        intermediate_size=56,
        num_hidden_layers=layers,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=128,
        attention_bias=True,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "odd", hidden_size=35, head_dim=10, layers=2)


class Results:
    """What the cases wrote; the processes of a world size are started when one of its cases is first asked for."""

    def __init__(self, folder: Path, model: Path, wide_model: Path) -> None:
        self.folder, self.model, self.wide_model = folder, model, wide_model
        self.logs: dict[str, str] = {}

    def __getitem__(self, case: Case) -> dict[str, Any]:
        # What is resident is measured in processes of its own, whose memory shows what was freed.
        name = f"loading{case.world_size}" if case.measure == "loading" else f"world{case.world_size}"
        if name not in self.logs:
            self.logs[name] = self.start(name, case.world_size)
        path = self.folder / f"{case.name}.json"
        assert path.is_file(), f"the processes ended before this case: {self.logs[name][-3000:]}"
        found = json.loads(path.read_text())
        assert "error" not in found, found["error"]
        return found

    def start(self, name: str, world_size: int) -> str:
        arguments = [name, *(str(path) for path in (self.folder, self.model, self.wide_model))]
        (ended,) = run(Job("engine_cases:main", arguments, str(self.folder / f"{name}.log"), 900, group(world_size)))
        return "\n".join(ended.err)


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Results:
    wide = save_model(tmp_path_factory.mktemp("models") / "wide", hidden_size=1030, head_dim=206, layers=4)
    return Results(tmp_path_factory.mktemp("engines"), model, wide)


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Any:
    """The same runs on one process without an engine, in half global batches as two processes have them."""
    folder = tmp_path_factory.mktemp("alone")
    known: dict[str, dict[str, Any]] = {}

    def run(case: Case) -> dict[str, Any]:
        engine_only = ("cascade.merge_path", "cascade.accumulator", "training.gradient_checkpointing")
        settings = {key: value for key, value in case.settings.items() if key not in engine_only}
        settings = {"training.micro_batch_size": 6} | settings
        key = json.dumps(settings, sort_keys=True)
        if key not in known:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            trainer = make_trainer(Case("alone", 1, None, settings), model, folder, 0)
            given = merged_from_given_pairs(trainer)
            known[key] = {"given": given} | trained(trainer)
            torch.set_num_threads(threads)
        return known[key]

    return run


def same_arithmetic(case: Case) -> bool:
    """Two processes whose gradients are summed as one process sums two micro batches, by the same kernels."""
    return (
        case.world_size == 2
        and (case.zero is None or case.zero["stage"] < 3)
        and "training.micro_batch_size" not in case.settings
        and "training.max_grad_norm" not in case.settings  # the engines' norms differ in the last bit
    )


@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.name)
def test_the_trajectory_is_that_of_one_process(case: Case, results: Results, alone: Any) -> None:
    """Across every boundary: to the bit where the arithmetic is the same, else within the tolerance of its dtype."""
    found, expected = results[case], alone(case)
    assert found["engine"] == ("ddp" if case.zero is None else f"zero{case.zero['stage']}")
    assert found["base"] == expected["base"]
    if same_arithmetic(case):
        assert found["losses"] == expected["losses"]
        assert found["digests"] == expected["digests"]
        assert found["scores"] == expected["scores"]
        assert found["reports"] == expected["reports"] or case.settings.get("model.dtype") == "bfloat16"
        assert found["magnitudes"] == expected["magnitudes"]
        assert found["shipped"] == expected["shipped"]
    assert found["others"] == expected["others"]
    tolerance = 2e-3 if case.settings.get("model.dtype") == "bfloat16" else 1e-4
    assert len(found["losses"]) == 9
    assert found["losses"] == pytest.approx(expected["losses"], rel=tolerance)
    # Adam does not see a gradient that is scaled as a whole; its norm does.
    assert found["norms"] == pytest.approx(expected["norms"], rel=20 * tolerance)
    assert found["choices"] == expected["choices"]
    # The losses themselves move by far more than the tolerance, so that another trajectory would be seen.
    assert max(found["losses"]) / min(found["losses"]) > 1.01
    for score, other in zip(found["scores"], expected["scores"], strict=True):
        assert score["loss"] == pytest.approx(other["loss"], rel=tolerance)


@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.name)
def test_given_pairs_are_merged_to_the_same_bits(case: Case, results: Results, alone: Any) -> None:
    """Noise, merge and re-draw: whatever the world size, stage, merge path, offload or dtype."""
    found = results[case]
    assert found["given"] == alone(case)["given"]
    assert len(set(found["given"])) == len(found["given"]) or case.measure == "method"  # not all of them have noise
    assert found["replayed"] == found["given"][-1]
    if case.looks_at_the_restart:  # in one pass from expert to expert
        assert found["turned"] == [found["given"][-1], found["ledger"]]
    wanted = case.settings.get("cascade.merge_path", "local")
    assert found["merge_path"].startswith(wanted)
    if case.zero is not None:
        assert (found["collectives"] > 0) == (wanted == "gather")


def test_both_merge_paths_make_the_same_run(results: Results) -> None:
    for name in ("zero3-{}float32", "zero3-{}bfloat16", "zero3-offload-{}", "zero3-persisted{}", "zero3-three{}"):
        if name.endswith("{}"):
            gather = CASES[name.format("gather" if name.endswith("-{}") else "-gather")]
            local = CASES["zero3-offload-float32" if "offload" in name else name.format("")]
        else:
            gather, local = CASES[name.format("gather-")], CASES[name.format("")]
        for key in ("losses", "digests", "scores"):
            assert results[gather][key] == results[local][key], name


@pytest.mark.parametrize("case", RESTARTS, ids=lambda case: case.name)
def test_the_restart_is_real(case: Case, results: Results) -> None:
    """B zero and A fresh in master and copy; then Adam's first step, -lr·g/(|g|+eps), in master and copy."""
    found = results[case]["first_step"]
    assert (found["A_off"], found["B_off"]) == (0.0, 0.0)
    assert found["rate"] == pytest.approx(1e-2 * (16 if case.settings.get("adapter.method") == "lora+" else 1))
    assert found["moved"] == pytest.approx(1.0, abs=1e-4)
    assert found["step_off"] < 1e-5
    if case.zero is not None and case.zero["stage"] > 0:
        fault = results[case]["planted_fault"]
        if case.world_size == 1 and case.zero["stage"] == 3:
            return  # there the shard is the weight
        assert "the restart did not reach the whole engine" in fault, "a master that was forgotten went unseen"
        assert "rank 0: " in fault or case.world_size == 1


@pytest.mark.parametrize("name", ["ddp", "zero1", "zero3-local", "zero3-gather"])
def test_nothing_grows_over_twenty_boundaries(name: str, results: Results) -> None:
    found = results[CASES[f"growth-{name}"]]
    assert found["bytes"][0] == found["bytes"][1]
    assert found["hooks"] == [found["hooks"][0]] * 20
    assert all(found["traces"])
    assert len(found["traces"]) == (20 if name.startswith("zero3") else 0)


@pytest.mark.parametrize(("name", "gathered"), [("zero1", 0), ("zero3-local", 0), ("zero3-gather", 2)])
def test_a_boundary_needs_little_memory(name: str, gathered: int, results: Results) -> None:
    """Above steady state: on `gather` two whole weights, on `local` none; beside chunks and low-rank factors."""
    found = results[CASES[f"memory-{name}"]]
    chunks = 3_000_000  # bytes; less than a weight, so that another gathered one would be seen
    assert chunks < found["weight"]
    assert gathered * found["weight"] < found["peak"] < gathered * found["weight"] + chunks


def test_under_zero3_no_rank_holds_the_whole_model(results: Results) -> None:
    """While the checkpoint is loaded: half of the weights, and a few whole ones on the way."""
    found = results[CASES["loading-zero3"]]
    assert found["model"] / 2 < found["peak"] < 0.8 * found["model"]


@pytest.mark.parametrize("case", EQUALITIES, ids=lambda case: case.name)
def test_a_number_that_is_not_finite_on_one_rank_keeps_all_from_the_update(case: Case, results: Results) -> None:
    found = results[case]["not_finite"]
    assert found["finite"] == [False, False]
    assert found["moved"] == 0.0
    assert found["off"] < 1e-3  # nothing of it is left in a buffer


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.is_taken_up], ids=lambda case: case.name)
def test_a_stop_undoes_a_virtual_close_and_a_saved_state_can_be_taken_up(case: Case, results: Results) -> None:
    found = results[case]["taken_up"]
    assert found["undone"]
    assert found["same"]
    assert found["counts"] == [1]


def test_local_edits_are_taken_only_where_a_trial_of_them_succeeds(results: Results) -> None:
    assert results[CASES["layout-auto"]]["merge_path"].startswith("gather: ")
    assert results[CASES["layout-auto"]]["merge_path"].endswith("a trial of local edits failed")
    assert results[CASES["layout-local"]]["refused"].startswith("cascade.merge_path is local, but ")
