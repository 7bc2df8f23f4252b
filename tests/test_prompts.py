"""MeZO's prompts against golden strings, and against a table of templates written another way."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasc_ds.data import Layout
from lorasc_ds.encoding import Encoder
from lorasc_ds.errors import DataError
from lorasc_ds.evaluation import evaluate
from lorasc_ds.sharding import Processes
from lorasc_ds.task_config import TaskConfig
from lorasc_ds.tasks import Example, Task, load_task
from lorasc_ds.tasks.answers import ANSWERS, GENERATION
from lorasc_ds.tasks.choices import CHOICES
from lorasc_ds.tasks.rows import Row

GOLDEN = json.loads((Path(__file__).parent / "golden_prompts.json").read_text())
EXAMPLE = {name: choice.example for name, choice in CHOICES.items()} | {
    name: example for name, (_, example, _) in ANSWERS.items()
}
MORE = {  # what the golden inputs leave out
    "sst2": {"label": 1},
    "rte": {"label": 0},
    "cb": {"label": 0},
    "boolq": {"answer": True},
    "wsc": {"label": 0},
    "wic": {"label": 0},
    "multirc": {"label": 0},
    "copa": {"label": 0, "choice1": "I was late.", "choice2": "It rained."},
    "record": {"entities": ["Rome", "Paris"], "answers": ["Rome"]},
}


@pytest.mark.parametrize("golden", GOLDEN)
def test_golden_strings(golden: str) -> None:
    name = golden.lower().partition("(")[0]
    given = GOLDEN[golden]["in"]
    if name == "squad":
        given = given | {"answers": {"text": given["answers"]}}
    if name == "drop":
        given = {"passage": given["context"], "answers_spans": {"spans": given["answers"]}, **given}
    example = EXAMPLE[name](Row("x:1", MORE.get(name, {}) | given))
    assert example.id == "x:1"
    assert example.prompt == GOLDEN[golden]["PROMPT"]
    assert list(example.texts) == GOLDEN[golden]["FULL"]
    if name in ANSWERS:
        assert list(example.references) == GOLDEN[golden]["in"]["answers"]


def test_every_task_has_golden_strings() -> None:
    assert {golden.lower().partition("(")[0] for golden in GOLDEN} == set(EXAMPLE)


def boolq_question(question: str) -> str:
    asked = question + ("" if question[-1:] == "?" else "?")
    return asked[0].upper() + asked[1:]


def copa_premise(row: dict[str, Any]) -> str:
    premise = row["premise"].rstrip()
    return premise[: -1 if premise[-1:] == "." else None] + {"cause": " because ", "effect": " so "}[row["question"]]


def lower_first(text: str) -> str:
    words = text.split(" ")
    words[0] = "I" if words[0] == "I" else words[0].lower()
    return " ".join(words)


TEMPLATES = {  # <...> is a field, or what `derived` makes of it; then what the answers are
    "sst2": ("<stripped> It was", " terrible| great"),
    "rte": ('<premise>\nDoes this mean that "<hypothesis>" is true? Yes or No?\n', "Yes|No"),
    "cb": ('Suppose <premise> Can we infer that "<hypothesis>"? Yes, No, or Maybe?\n', "Yes|No|Maybe"),
    "boolq": ("<passage> <asked>\n", "Yes|No"),
    "wsc": (
        '<text>\nIn the previous sentence, does the pronoun "<pronoun>" refer to <span1_text>? Yes or No?\n',
        "No|Yes",
    ),
    "wic": (
        'Does the word "<word>" have the same meaning in these two sentences? Yes, No?\n<sentence1>\n<sentence2>\n',
        "No|Yes",
    ),
    "multirc": (
        '<paragraph>\nQuestion: <question>\nI found this answer "<answer>". Is that correct? Yes or No?\n',
        "No|Yes",
    ),
}
FIELDS = (
    *("sentence", "premise", "hypothesis", "passage", "question", "text", "span1_text", "span2_text", "word"),
    *("sentence1", "sentence2", "paragraph", "answer", "choice1", "choice2", "title", "context"),
)
TEXT = st.text(st.sampled_from(" \n.?aIÉß{}%\"'@"), min_size=1, max_size=8)
ROWS = st.fixed_dictionaries(dict.fromkeys(FIELDS, TEXT))


def derived(row: dict[str, str]) -> dict[str, str]:
    return row | {
        "stripped": row["sentence"].strip(),
        "asked": boolq_question(row["question"]),
        "pronoun": row["span2_text"].lower(),
    }


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40)
@given(ROWS, st.integers(0, 1))
def test_templates_on_any_texts(name: str, fields: dict[str, str], label: int) -> None:
    template, verbalisers = TEMPLATES[name]
    prompt = re.sub("<([a-z0-9_]+)>", lambda found: derived(fields)[found[1]], template)
    truth = {"answer": bool(label)} if name == "boolq" else {}
    example = EXAMPLE[name](Row("x:1", {**fields, "label": label, **truth}))
    assert example.prompt == prompt.strip(" ")
    assert example.texts == tuple((prompt + one).strip(" ") for one in verbalisers.split("|"))
    assert example.gold == (1 - label if name == "boolq" else label,), "true is Yes, which stands first"


@settings(max_examples=60)
@given(ROWS, st.sampled_from(["cause", "effect"]), st.integers(0, 1))
def test_copa_on_any_texts(fields: dict[str, str], question: str, label: int) -> None:
    row = fields | {"question": question}
    prompt = copa_premise(row)
    example = EXAMPLE["copa"](Row("x:1", {**row, "label": label}))
    assert example.prompt == prompt.strip(" ")
    assert example.texts == tuple((prompt + lower_first(fields[key])).strip(" ") for key in ("choice1", "choice2"))
    assert example.gold == (label,)


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from(["a.", "@highlight\n", "\n", "@placeholder", " "]), max_size=8).map("".join),
    st.lists(st.sampled_from(["b", "@placeholder", " c "]), max_size=4).map("".join),
    st.lists(TEXT, min_size=1, max_size=5, unique=True).map(sorted),
    st.data(),
)
def test_record_on_any_texts(passage: str, query: str, entities: list[str], data: st.DataObject) -> None:
    answers = sorted(data.draw(st.sets(st.sampled_from(entities), min_size=1)))
    example = EXAMPLE["record"](
        Row("x:1", {"passage": passage, "query": query, "entities": entities, "answers": answers})
    )
    listed = "- ".join(passage.split("@highlight\n"))
    assert example.prompt == (listed + "\n-").strip(" ")
    assert list(example.texts) == [
        (listed + "\n- " + entity.join(query.split("@placeholder"))).strip(" ") for entity in entities
    ]
    assert [entities[at] for at in example.gold] == answers, "the first is trained on"


@pytest.mark.parametrize(("answers", "right"), [(["C"], ()), (["B", "C"], (0,)), (["A", "B"], (1,))])
@pytest.mark.parametrize("loss", ["lm", "classification"])
def test_an_answer_that_is_no_entity_is_trained_on_and_never_right(
    shared_data: Path, answers: list[str], right: tuple[int, ...], loss: Any
) -> None:
    entities = sorted({"B", "D"} if "A" not in answers else {"0", "B"})
    row = Row("x:1", {"passage": "p", "query": "@placeholder is", "entities": entities, "answers": answers})
    example = EXAMPLE["record"](row)
    no_entity = answers[0] not in entities
    assert example.texts[example.gold[0]] == f"p\n- {answers[0]} is"
    assert list(example.texts[: len(entities)]) == [f"p\n- {entity} is" for entity in entities]
    assert tuple(at for at in range(len(example.texts)) if at in example.gold) == right
    assert len(example.texts) == len(entities) + no_entity

    folder = shared_data / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    task = Task("record", "candidates", loss, {"test": [example]}, headline="accuracy")
    encoder = Encoder(
        AutoTokenizer.from_pretrained(folder), task, max_length=None, model_limit=512, vocabulary_size=512
    )
    (encoded,) = encoder.encode_examples([example])
    count = len(encoded.candidates)

    def scores(gold: tuple[int, ...]) -> dict[str, float]:
        return evaluate(
            model,
            task,
            {"test": [replace(encoded, gold=gold)]},
            batch_size=8,
            layout=Layout(encoder.pad_id, share_prefixes=True),
            processes=Processes(0, 1, torch.device("cpu")),
        )["test"]

    found, trained_on = scores(encoded.gold), encoded.gold[0] % count
    (chosen,) = [at for at in range(count) if scores((at,))["accuracy"]]
    assert found["loss"] == scores((trained_on,))["loss"]
    assert found["accuracy"] == (chosen in right)


@settings(max_examples=60)
@given(ROWS, st.lists(TEXT, min_size=1, max_size=3))
def test_questions_with_an_answer_in_words(fields: dict[str, str], answers: list[str]) -> None:
    row = Row("x:1", {**fields, "answers": {"text": answers}, "answers_spans": {"spans": answers}})
    prompts = {
        "squad": "Title: {title}\nContext: {context}\nQuestion: ",
        "drop": "Passage: {passage}\nQuestion: ",
    }
    for name, begin in prompts.items():
        prompt = begin.format(**fields) + fields["question"].strip() + "\nAnswer:"
        example = EXAMPLE[name](row)
        assert example.prompt == prompt
        assert example.texts == (f"{prompt} {answers[0]}\n",)
        assert example.references == tuple(answers)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("sst2", {"sentence": "good", "label": -1}, "'label', one of negative, positive, .* got -1"),
    ("rte", {"premise": "a", "label": 0}, "'hypothesis', a text .* got none; it has premise, label"),
    ("rte", {"premise": "a", "hypothesis": "b", "label": "neutral"}, "one of entailment, not_entailment.* 'neutral'"),
    ("cb", {"premise": None, "hypothesis": "b", "label": 0}, "'premise', a text .* got None"),
    ("boolq", {"passage": "a", "question": "b"}, "'answer', one of False, True"),
    ("copa", {"premise": "a", "question": "why", "label": 0}, "'question', one of cause, effect"),
    ("record", {"passage": "a", "query": "b", "entities": [], "answers": []}, "'entities', a list of one or more"),
    (
        "squad",
        {"title": "a", "context": "b", "question": "c", "answers": {"text": []}},
        r"answers: .* 'text', a list of",
    ),
    ("drop", {"passage": "a", "question": "b", "answers_spans": ["c"]}, "'answers_spans', an object"),
]


@pytest.mark.parametrize(("name", "fields", "message"), WRONG)
def test_a_row_of_another_schema_is_named(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"^train\.jsonl:17.*{message}") as caught:
        EXAMPLE[name](Row("train.jsonl:17", fields))
    assert "\n" not in str(caught.value)


def test_scores_of_an_answer_in_words() -> None:
    def scored(answer: str) -> dict[str, float]:
        return GENERATION.score(answer, Example("1", "", references=("Eiffel tower", "the tower of Paris")))

    assert scored(" the Eiffel Tower. ") == {"f1": 1, "exact_match": 1}
    assert scored(" tower") == {"f1": pytest.approx(2 / 3), "exact_match": 0}
    assert scored("") == {"f1": 0, "exact_match": 0}
    assert (GENERATION.max_new_tokens, GENERATION.stop, GENERATION.temperature) == (50, ("\n",), 0)


@pytest.mark.parametrize("tokenizer", ["models/stories260K", "tokenizers/gpt2"])
def test_every_answer_has_tokens_and_they_are_its_own(shared_data: Path, tokenizer: str, tmp_path: Path) -> None:
    """Where the protocol takes a slow tokenizer: the last tokens, decoded, are the answer and nothing else."""
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\na gripping , funny ride \t1\nno .\t0\n")
    folders = dict.fromkeys(("rte", "cb", "copa", "wsc", "boolq"), shared_data / "superglue")
    folders |= {"record": shared_data / "superglue" / "fewglue32" / "ReCoRD", "sst2": tmp_path}
    folders |= {name: shared_data / name for name in ("squad", "drop", "gsm8k")}
    read = AutoTokenizer.from_pretrained(shared_data / tokenizer)
    for name, folder in folders.items():
        config = TypeAdapter(TaskConfig).validate_python({"name": name, "data_dir": str(folder)})
        task = load_task(config, 0, ("test",))
        examples = task.splits["test"][:25]
        task = replace(task, splits={"test": examples})
        encoder = Encoder(read, task, max_length=None, model_limit=None, vocabulary_size=len(read))
        for example, encoded in zip(examples, encoder.encode()["test"], strict=True):
            for text, candidate in zip(example.texts, encoded.candidates, strict=True):
                assert candidate.scored >= 1
                assert len(candidate.ids) <= 2048
                answer = read.decode(list(candidate.ids[-candidate.scored :]))
                assert answer.strip() == text[len(example.prompt) :].strip()
