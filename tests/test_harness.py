"""The bridge to lm-evaluation-harness: a real model and real rows, against this project's own evaluation of them."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from forking import Job, group, run
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lorasc_ds.data import Layout
from lorasc_ds.encoding import Encoder
from lorasc_ds.errors import ConfigError
from lorasc_ds.evaluation import Record, evaluate
from lorasc_ds.generation import Generator
from lorasc_ds.harness import OWN_TASKS, matching, metrics, score
from lorasc_ds.sharding import Processes
from lorasc_ds.tasks import Example, Generation, Task

harness_tasks = pytest.importorskip("lm_eval.tasks", reason="lm-evaluation-harness: pip install -e '.[eval]'")

ALONE = Processes(0, 1, torch.device("cpu"))
QUESTION = 'Does this mean that "{hypothesis}" is true?'
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = shared_data / "models" / "stories260K"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def rows(shared_data: Path) -> list[dict[str, Any]]:
    """The 25 shortest of RTE's validation rows, which fit 512 positions."""
    lines = (shared_data / "superglue" / "RTE" / "val.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda row: len(row["premise"]))[:25]


@pytest.fixture(scope="module")
def own(
    stories: tuple[PreTrainedModel, PreTrainedTokenizerBase], rows: list[dict[str, Any]]
) -> dict[str, tuple[dict[str, float], list[Record], list[Any]]]:
    """This project's scores, records and encoded examples of both tasks."""
    prompts = [f"{row['premise']}\n{QUESTION.format(**row)}" for row in rows]
    choices = [
        Example(str(at), prompt, (f"{prompt} Yes", f"{prompt} No"), gold=(int(row["label"] != "entailment"),))
        for at, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
    ]
    written = [
        Example(str(at), row["premise"], (f"{row['premise']} x",), references=("x",)) for at, row in enumerate(rows)
    ]
    generation = Generation(NEW_TOKENS, lambda answer, example: {"exact_match": 0.0}, stop=(".",))
    return {
        "yes_or_no": evaluated(stories, Task("yes_or_no", "candidates", "lm", {"test": choices}, "accuracy")),
        "stories": evaluated(stories, Task("stories", "generation", "lm", {"test": written}, "x", generation=generation)),
    }  # fmt: skip


def evaluated(
    stories: tuple[PreTrainedModel, PreTrainedTokenizerBase], task: Task
) -> tuple[dict[str, float], list[Record], list[Any]]:
    model, tokenizer = stories
    encoder = Encoder(tokenizer, task, max_length=None, model_limit=512, vocabulary_size=512)
    encoded, records = encoder.encode(), []
    generator = (
        None if task.generation is None else Generator(model, tokenizer, task.generation, layout=Layout(encoder.pad_id))
    )
    scores = evaluate(
        model,
        task,
        encoded,
        batch_size=8,
        layout=Layout(encoder.pad_id, share_prefixes=True),
        processes=ALONE,
        generator=generator,
        record=lambda split, example, one: records.append(one),
    )
    return scores["test"], records, list(encoded["test"])


@pytest.fixture(scope="module")
def folder(rows: list[dict[str, Any]], own: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files with local data. Every second right answer of `stories` is what the model writes."""
    folder = tmp_path_factory.mktemp("tasks")
    answers = [str(one.prediction) for one in own["stories"][1]]
    data = [row | {"answer": answer if at % 2 else "x"} for at, (row, answer) in enumerate(zip(rows, answers, strict=True))]  # fmt: skip
    common = local(folder, "rte", data)
    write_task(
        folder,
        common,
        task="yes_or_no",
        output_type="multiple_choice",
        doc_to_text="{{premise}}\n" + QUESTION.replace("{hypothesis}", "{{hypothesis}}"),
        doc_to_choice=["Yes", "No"],
        doc_to_target="{{0 if label == 'entailment' else 1}}",
        metric_list=[{"metric": "acc"}],
    )
    write_task(
        folder,
        common,
        task="stories",
        output_type="generate_until",
        doc_to_text="{{premise}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["."], "max_gen_toks": NEW_TOKENS, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
        filter_list=[
            {"name": "none", "filter": [{"function": "take_first"}]},
            {"name": "again", "filter": [{"function": "take_first"}]},
        ],
    )
    return folder


def local(folder: Path, name: str, data: list[dict[str, Any]]) -> dict[str, Any]:
    """The part of a task file that names rows of one's own."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in data))
    kwargs = {"data_files": {"train": str(file), "validation": str(file)}, "cache_dir": str(folder / "cache")}
    return {"dataset_path": "json", "dataset_kwargs": kwargs, "validation_split": "validation"}


def write_task(folder: Path, common: dict[str, Any], **settings: Any) -> None:
    (folder / f"{settings['task']}.yaml").write_text(yaml.safe_dump(common | settings))


@pytest.fixture
def scored(stories: tuple[PreTrainedModel, PreTrainedTokenizerBase], folder: Path) -> Callable[..., Any]:
    def start(tasks: list[str], **settings: Any) -> Any:
        return score(*stories, tasks, **({"processes": ALONE, "batch_size": 8, "include_path": folder} | settings))

    return start


def test_scores_are_those_of_our_own_evaluation(
    scored: Callable[..., Any],
    stories: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    own: dict[str, Any],
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`Yes` and `No` have as many tokens, so the best sum is the best mean. Nothing else changes, nothing is printed."""
    model, tokenizer = stories
    model.train()
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), tokenizer.pad_token
    records: dict[str, list[dict[str, Any]]] = {"yes_or_no": [], "stories": []}
    scores = scored(["stories", "yes_or_no"], record=lambda task, one: records[task].append(one))

    assert before == (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), tokenizer.pad_token)  # fmt: skip
    assert all(module.training for module in model.modules())
    assert capfd.readouterr() == ("", "")
    assert not caplog.records

    accuracy, of_choices, encoded = own["yes_or_no"]
    lengths = {candidate.scored for example in encoded for candidate in example.candidates}
    assert len(lengths) == 1
    assert 0 < accuracy["accuracy"] < 1
    assert scores["yes_or_no"]["acc"] == accuracy["accuracy"]
    deviation = np.std([one.metrics["accuracy"] for one in of_choices], ddof=1)
    assert scores["yes_or_no"]["acc_stderr"] == pytest.approx(deviation / len(of_choices) ** 0.5)
    sums = [[answer[0] for answer in one["answers"]] for one in records["yes_or_no"]]
    expected = [[mean * lengths.copy().pop() for mean in one.scores] for one in of_choices]
    assert np.array(sums) == pytest.approx(np.array(expected), abs=1e-5)

    written = [one.prediction for one in own["stories"][1]]
    assert [one["answers"][0] for one in records["stories"] if one["filter"] == "none"] == written
    assert len(set(written)) > 10
    assert scores["stories"]["exact_match"] == scores["stories"]["exact_match,again"] == 12 / 25


def test_shots_and_the_limit_are_those_asked_for(
    scored: Callable[..., Any], rows: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    prompts: list[str] = []
    lines: list[str] = []
    scored(["yes_or_no"], shots=2, limit=3, record=lambda task, one: prompts.append(one["prompt"]), say=lines.append)
    assert len(prompts) == 3
    for prompt, row in zip(prompts, rows, strict=False):
        *shots, question = prompt.split("\n\n")
        assert len(shots) == 2
        assert all(shot.endswith(("? Yes", "? No")) for shot in shots)
        assert question == f"{row['premise']}\n{QUESTION.format(**row)}"
    assert not lines
    scored(["yes_or_no"], shots=12, limit=1, say=lines.append)
    assert lines == ["prompts longer than the model's 512 positions lost their beginning"]
    assert capfd.readouterr() == ("", "")


def test_ropes_as_shipped(scored: Callable[..., Any], tmp_path: Path) -> None:
    row = {"background": "Salt melts ice.", "situation": "Ann salted her path. Bob did not.", "question": "Whose path is icy?", "answers": {"text": ["Bob"]}}  # fmt: skip
    write_task(tmp_path, {"include": str(OWN_TASKS / "ropes.yaml")} | local(tmp_path, "ropes", [row]), task="my_ropes")
    records: list[dict[str, Any]] = []
    scores = scored(["my_ropes"], include_path=tmp_path, record=lambda task, one: records.append(one))
    assert scores == {"my_ropes": {"exact_match": 0.0}}
    assert records[0]["prompt"] == (
        "Background: Salt melts ice.\nSituation: Ann salted her path. Bob did not.\n"
        "Question: Whose path is icy?\nAnswer:"
    )
    assert records[0]["target"] == "Bob"


def test_numbers_of_a_task() -> None:
    values = {"alias": "a, b", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": "N/A", "em,strict": 1}
    assert metrics(values) == {"acc": 0.5, "em,strict": 1.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["ropes"]}, "--harness_tasks ropes: the task or its data cannot be loaded: ConnectionError: Couldn't reach 'allenai/ropes'"),
        ({"tasks": ["stories"], "include_path": Path("nowhere")}, "--harness_include_path nowhere is not a folder"),
        ({"tasks": ["long"]}, "--harness_tasks long generates up to 512 tokens, but the model has 512 positions"),
        ({"tasks": ["unsafe"]}, "--harness_tasks unsafe runs programs that the model wrote without a sandbox"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_said_in_one_line(
    settings: dict[str, Any], message: str, scored: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    text = {"output_type": "generate_until", "doc_to_text": "{{premise}}", "doc_to_target": "x"}
    common = local(tmp_path, "rows", [{"premise": "A"}]) | text | {"metric_list": [{"metric": "exact_match"}]}
    write_task(tmp_path, common, task="long", generation_kwargs={"max_gen_toks": 512})
    write_task(tmp_path, common, task="unsafe", unsafe_code=True)
    with pytest.raises(ConfigError) as error:
        scored(**({"include_path": tmp_path} | settings))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_an_unknown_task_gets_the_nearest_names(folder: Path) -> None:
    manager = harness_tasks.TaskManager(include_path=[OWN_TASKS, folder], include_defaults=False)
    with pytest.raises(ConfigError, match=r"no such task, nor has .* a task file of it; nearest: yes_or_no$"):
        matching("yes_or_now", manager, folder)
    with pytest.raises(ConfigError, match=r"no such task; nearest: none is near$"):
        matching("qqqqq", manager, None)


def test_without_the_harness(scored: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(
        ConfigError, match=r"--harness_tasks needs lm-evaluation-harness .*: pip install -e '.\[eval\]'$"
    ):
        scored(["stories"])


def test_two_processes_score_as_one(scored: Callable[..., Any], folder: Path, shared_data: Path) -> None:
    """With fewer questions than processes too, and under ZeRO-3."""
    answers: dict[str, Any] = {}
    tasks = ["yes_or_no", "stories"]
    alone = scored(tasks, record=lambda task, one: answers.update({f"{task} {one['id']}": one["answers"]}))
    engine = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    engine["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # or so small a model would stay whole
    (folder / "zero3.json").write_text(json.dumps(engine))
    arguments = [str(shared_data / "models" / "stories260K"), str(folder)]
    (ended,) = run(Job("harness_processes:main", arguments, str(folder / "log"), 200, group(2)))
    assert ended.codes == [0, 0], ended.err
    first, second = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for case, questions in (("whole", 25), ("one question", 1), ("cut up", 9)):
        scores, records = first[case]
        assert [scores, {}] == second[case], "the same scores, and records on the main process alone"
        assert len(records) == len(tasks) * questions
        assert scores == (alone if questions == 25 else scored(tasks, limit=questions))
        for name, found in records.items():
            if name.startswith("stories"):
                assert found == answers[name]
            else:
                assert np.array(found) == pytest.approx(np.array(answers[name]), abs=1e-5)
