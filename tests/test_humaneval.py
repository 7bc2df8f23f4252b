"""HumanEval: its prompt, what of an answer is run, where, and the real problems (protocols 5)."""

from __future__ import annotations

import gzip
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from benchmark_tasks import Hub, accuracy

from lorasc_ds import sandbox
from lorasc_ds.errors import ConfigError
from lorasc_ds.sandbox import Sandbox, choose
from lorasc_ds.task_config import HumanEvalConfig
from lorasc_ds.tasks import load_task
from lorasc_ds.tasks.humaneval import completion_of, program_of

PROBLEM = {"task_id": "T/0", "prompt": 'def one():\n    """1"""\n', "test": "def check(candidate):\n    assert candidate() == 1\n", "entry_point": "one"}  # fmt: skip


@pytest.fixture
def problem(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "HumanEval.jsonl").write_text(json.dumps(PROBLEM))
    return {"name": "humaneval", "data_dir": str(tmp_path), "sandbox": "none", "confirm_run_unsafe_code": True}


def test_humaneval_prompt_and_program(problem: dict[str, Any]) -> None:
    task = load_task(HumanEvalConfig(**problem), seed=0)
    (example,) = task.splits["test"]
    assert (example.id, example.header, example.shots) == ("T/0", "", ())
    assert example.prompt == (
        "Please complete the following Python code without providing any additional tasks such as testing or explanations\n"
        'def one():\n    """1"""\n'
    )
    assert program_of("    return 1", example) == (
        'def one():\n    """1"""\n    return 1\ndef check(candidate):\n    assert candidate() == 1\n\ncheck(one)'
    )
    assert task.generation is not None
    assert (task.generation.max_new_tokens, task.generation.temperature, task.generation.max_length) == (512, 0.1, None)
    answers = {
        "   return 1\n\ndef two():\n    return": 1,
        "\n    return 1": 1,
        "    return 2": 0,
        "    return 1\nexit()": 0,
    }
    assert {answer: accuracy(task, answer, example) for answer in answers} == answers


@pytest.mark.parametrize(
    ("answer", "completion"),
    [
        ("   x = 1\n    return x", "    x = 1\n    return x"),
        ("return 1", "return 1"),
        ("\n\n    return 1\n\n\ndef f(): pass", "    return 1"),
        ("    a\n     b\n \n    c", "    a\n      b\n  \n    c"),
        ("\t return", "\t return"),
        ("    a\n\n    b", "    a"),
        (" \n\n a", "  "),
        ("", ""),
    ],
)
def test_humaneval_completion(answer: str, completion: str) -> None:
    """Indented by an even number, then without empty lines in front, then up to the first."""
    assert completion_of(answer) == completion


def test_humaneval_asks_before_it_runs_anything(problem: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["lorasc_ds.tasks.humaneval"], "choose", None)
    with pytest.raises(
        ConfigError,
        match=r"^task humaneval runs programs .*--sandbox.*task\.confirm_run_unsafe_code is false: give --confirm_run_unsafe_code if that is all right$",
    ):
        load_task(HumanEvalConfig(**problem | {"confirm_run_unsafe_code": False}), seed=0)


def test_humaneval_says_what_it_does(problem: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_task(HumanEvalConfig(**problem), seed=0).notes == (
        "one answer to a problem, a sample at temperature 0.1, top_p 1; 3 s for its tests",
        "sandbox: limits alone: programs run as you, with your files and network",
    )
    monkeypatch.setattr(sandbox, "check", lambda one: None)
    task = load_task(HumanEvalConfig(**problem | {"temperature": 0.0, "sandbox": "auto"}), seed=0)
    assert task.notes == (
        "one answer to a problem, greedy, not at temperature 0.1; 3 s for its tests",
        "sandbox: unshare",
    )
    assert task.generation is not None
    assert task.generation.temperature == 0


def test_humaneval_from_the_hub(problem: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub({(None, "test"): [PROBLEM]})
    monkeypatch.setattr(sys.modules["lorasc_ds.tasks.humaneval"], "hub_rows", hub)
    local, other = (
        load_task(HumanEvalConfig(**problem | {"data_dir": data}), seed=0) for data in (problem["data_dir"], None)
    )
    assert local.splits == other.splits
    assert hub.asked == [("openai/openai_humaneval", None, "test", None)]


def test_humaneval_real_solutions_pass_and_empty_ones_fail(shared_data: Path) -> None:
    """Every fourth problem, in the sandbox that there is."""
    try:
        box = choose("auto")
    except ConfigError as error:
        pytest.skip(str(error))
    task = load_task(
        HumanEvalConfig(
            name="humaneval", data_dir=str(shared_data / "humaneval"), confirm_run_unsafe_code=True, sandbox=box.kind
        ),
        seed=0,
    )
    with gzip.open(shared_data / "humaneval" / "HumanEval.jsonl.gz", "rt") as lines:
        solutions = [json.loads(line)["canonical_solution"] for line in lines]
    problems = task.splits["test"]
    assert len(problems) == len(solutions) == 164
    with ThreadPoolExecutor(2) as pool:
        right = [program_of(solution, problem) for problem, solution in zip(problems, solutions, strict=True)][::4]
        assert {outcome.result for outcome in pool.map(lambda program: box.run(program, 10), right)} == {"passed"}
        wrong = [program_of("    pass\n", problem) for problem in problems[::16]]
        assert {outcome.result for outcome in pool.map(lambda program: Sandbox("none").run(program, 10), wrong)} == {
            "failed"
        }
