"""Metrics and scores against other implementations, on real rows; where definitions part, each exception by itself."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lorasc_ds.data import Layout
from lorasc_ds.encoding import EncodedExample, Encoder
from lorasc_ds.evaluation import Record, evaluate
from lorasc_ds.sharding import Processes
from lorasc_ds.task_config import ChoiceConfig
from lorasc_ds.tasks import Example, load_task
from lorasc_ds.tasks.gsm8k import extracted, without_commas
from lorasc_ds.tasks.metrics import exact_match, f1, same_but_for_punctuation

squad = pytest.importorskip("torchmetrics.functional.text", reason="pip install -e '.[test]'").squad
harness = pytest.importorskip("lm_eval.models.huggingface", reason="lm-evaluation-harness: pip install -e '.[eval]'")
harness_metrics = pytest.importorskip("lm_eval.api.metrics")
instances = pytest.importorskip("lm_eval.api.instance")

PREDICTIONS = (
    "gold",
    "last gold",
    "the answer to the next question",
    "words around it",
    "half of it",
    "adorned",
    "nothing",
)


@pytest.fixture(scope="module")
def questions(shared_data: Path) -> list[tuple[str, list[str]]]:
    """Context and right answers of every tenth question of SQuAD's dev set."""
    data = json.loads(gzip.decompress((shared_data / "squad" / "dev-v1.1.rebuilt.json.gz").read_bytes()))["data"]
    paragraphs = [paragraph for article in data for paragraph in article["paragraphs"]]
    found = [(p["context"], [a["text"] for a in q["answers"]]) for p in paragraphs for q in p["qas"]]
    assert len(found) == 10570
    return found[::10]


def predicted(kind: str, at: int, questions: list[tuple[str, list[str]]]) -> str:
    context, golds = questions[at]
    start = context.find(golds[0])
    return {
        "gold": golds[0],
        "last gold": golds[-1],
        "the answer to the next question": questions[(at + 1) % len(questions)][1][0],
        "words around it": context[max(0, start - 20) : start + len(golds[0]) + 20],
        "half of it": " ".join(golds[0].split()[: (len(golds[0].split()) + 1) // 2]),
        "adorned": f"The {golds[0].capitalize()}!",
        "nothing": "",
    }[kind]


def by_torchmetrics(answer: str, golds: list[str]) -> dict[str, float]:
    found = squad([{"prediction_text": answer, "id": "1"}], [{"answers": {"text": golds}, "id": "1"}])
    return {name: float(value) / 100 for name, value in found.items()}


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_f1_and_exact_match_are_those_of_torchmetrics(kind: str, questions: list[tuple[str, list[str]]]) -> None:
    """Question by question; torchmetrics rounds to float32."""
    ours = []
    for at, (_, golds) in enumerate(questions):
        answer = predicted(kind, at, questions)
        found = {"f1": f1(answer, golds), "exact_match": exact_match(answer, golds)}
        assert found == pytest.approx(by_torchmetrics(answer, golds), abs=1e-6), (answer, golds)
        ours.append(found["f1"])
    if kind in ("words around it", "half of it", "the answer to the next question"):
        assert 0 < np.mean(ours) < 1
        assert len(set(ours)) > 2, "some overlap in part"
    else:
        assert set(ours) == {0.0 if kind == "nothing" else 1.0}


def test_where_f1_is_not_that_of_torchmetrics() -> None:
    """Two answers without a word agree for torchmetrics, and share nothing in MeZO's F1 (protocols 1.7)."""
    assert (f1("", ["The"]), by_torchmetrics("", ["The"])["f1"]) == (0, 1)
    assert (f1("?", ["the", "an a"]), by_torchmetrics("?", ["the", "an a"])["f1"]) == (0, 1)
    assert exact_match("", ["The"]) == by_torchmetrics("", ["The"])["exact_match"] == 1
    for gold in ("no answer", "CANNOTANSWER"):  # right only as a whole
        assert (f1(f"{gold} here", [gold]), by_torchmetrics(f"{gold} here", [gold])["f1"]) == (0, pytest.approx(0.8 if " " in gold else 2 / 3))  # fmt: skip
        assert f1(gold, [gold, "x"]) == by_torchmetrics(gold, [gold, "x"])["f1"] == 1
    assert (f1("x", ["no answer", "x"]), by_torchmetrics("x", ["no answer", "x"])["f1"]) == (0, 1)


def test_numbers_are_compared_as_hugging_faces_exact_match_does(shared_data: Path) -> None:
    """As open-instruct calls it for GSM8K; lm-evaluation-harness carries a copy of that metric."""
    lines = (shared_data / "gsm8k" / "test.jsonl").read_text().splitlines()
    golds = [without_commas(json.loads(line)["answer"].split("####")[1].strip()) for line in lines]
    assert len(golds) == 1319
    rng = random.Random(0)
    forms = ("{}", "{}.", "${}", "{}.00", "-{}", "{}%", " {}", "So the answer is {}.", "Q")
    answers = [rng.choice(forms).format(gold if rng.random() < 0.7 else "7") for gold in golds]
    for given in (answers, list(map(extracted, answers))):
        ours = [same_but_for_punctuation(answer, gold) for answer, gold in zip(given, golds, strict=True)]
        theirs = [
            harness_metrics.exact_match_hf_evaluate([answer], [gold], ignore_case=True, ignore_punctuation=True)
            for answer, gold in zip(given, golds, strict=True)
        ]
        assert ours == [one["exact_match"] for one in theirs]
        assert 0.2 < np.mean(ours) < 0.9


Stories = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Evaluated = tuple[float, list[tuple[Example, EncodedExample, Record]]]


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Stories:
    folder = shared_data / "models" / "stories260K"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["rte", "copa"])
def evaluated(request: pytest.FixtureRequest, stories: Stories, shared_data: Path) -> tuple[str, Evaluated]:
    """Accuracy on 40 real questions of a task that fit, and each question as text, as tokens and as scored."""
    model, tokenizer = stories
    config = ChoiceConfig(name=request.param, data_dir=str(shared_data / "superglue"), test_examples=60)
    task = load_task(config, seed=0, splits=("test",))
    short = sorted(task.splits["test"], key=lambda example: len(example.prompt))[:40]
    encoder = Encoder(tokenizer, task, max_length=None, model_limit=512, vocabulary_size=512)
    encoded, records = encoder.encode_examples(short), []
    assert not encoder.truncated
    scores = evaluate(
        model,
        task,
        {"test": encoded},
        batch_size=16,
        layout=Layout(encoder.pad_id, share_prefixes=True),
        processes=Processes(0, 1, torch.device("cpu")),
        record=lambda split, example, one: records.append(one),
    )
    return request.param, (scores["test"]["accuracy"], list(zip(short, encoded, records, strict=True)))


def test_accuracy_is_that_of_scikit_learn(evaluated: tuple[str, Evaluated]) -> None:
    accuracy, questions = evaluated[1]
    predictions = [int(np.argmax(record.scores)) for _, _, record in questions]
    assert accuracy == pytest.approx(accuracy_score([example.gold[0] for example, _, _ in questions], predictions))
    assert 0 < accuracy < 1


def test_log_probabilities_are_those_of_the_harness(evaluated: tuple[str, Evaluated], stories: Stories) -> None:
    """It moves the blanks at the end of a prompt into the answer: RTE's newline, whose own share is then taken off."""
    name, (_, questions) = evaluated
    live: Any = harness.HFLM(pretrained=stories[0], tokenizer=stories[1], batch_size=8)

    def log_likelihoods(pairs: list[tuple[str, str]]) -> torch.Tensor:
        asked = [instances.Instance("loglikelihood", {}, pair, 0) for pair in pairs]
        return torch.tensor([sum for sum, _ in live.loglikelihood(asked, disable_tqdm=True)], dtype=torch.float64)

    pairs = [(example.prompt, text[len(example.prompt) :]) for example, _, _ in questions for text in example.texts]
    theirs = log_likelihoods(pairs)
    if name == "rte":
        assert all(prompt.endswith("?\n") for prompt, _ in pairs)
        theirs -= log_likelihoods([(prompt[:-1], "\n") for prompt, _ in pairs])
    candidates = [candidate for _, encoded, _ in questions for candidate in encoded.candidates]
    means = (theirs / torch.tensor([candidate.scored for candidate in candidates])).tolist()
    assert means == pytest.approx([mean for _, _, record in questions for mean in record.scores], abs=1e-5)
    assert len({len(candidate.ids) for candidate in candidates}) > 10, "rows of many lengths"
