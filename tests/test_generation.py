"""Generated answers on a real pretrained model: many at a time give what each alone gives, whatever the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Start
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lorasc_ds.data import Layout
from lorasc_ds.encoding import EncodedExample
from lorasc_ds.evaluation import Record, evaluate
from lorasc_ds.generation import Generator, Sampling
from lorasc_ds.sharding import Processes
from lorasc_ds.tasks import Example, Generation, Task

ALONE = Processes(0, 1, torch.device("cpu"))
PROMPTS = (
    "Once upon a time",
    "Lily and Ben went to the park. They saw a big",
    "The dog",
    "Tom had a red ball. He liked to play with his ball every day. One day",
    "She said",
)


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = shared_data / "models" / "stories260K"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


Stories = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def words(text: str, example: Example) -> dict[str, float]:
    return {"exact_match": float(text.strip() in example.references)}


def generator_of(stories: Stories, **options: object) -> Generator:
    model, tokenizer = stories
    settings = {"max_new_tokens": 24, "score": words, "stop": (".",)} | options
    return Generator(model, tokenizer, Generation(**settings), layout=Layout(0))


def encoded(stories: Stories, references: tuple[str, ...] = ()) -> list[EncodedExample]:
    sources = [Example(str(n), text, references=references, group="ab"[n % 2]) for n, text in enumerate(PROMPTS)]
    return [EncodedExample(s.id, (), (0,), tuple(stories[1](s.prompt)["input_ids"]), s, s.group) for s in sources]


def greedy_by_hand(stories: Stories, prompt: tuple[int, ...], tokens: int, stop: str) -> str:
    """Token by token without a cache, a batch or `generate`."""
    model, tokenizer = stories
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        text = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        if stop in text or ids[-1] == tokenizer.eos_token_id:
            return text.split(stop)[0]
    return text


@pytest.mark.parametrize("stop", [".", "nd", "\x00"], ids=["a sentence", "inside words", "never"])
def test_a_batch_gives_what_each_prompt_alone_gives(stories: Stories, stop: str) -> None:
    generator, examples = generator_of(stories, stop=(stop,)), encoded(stories)
    together = [generator.text(answer) for answer in generator(examples, range(5))]
    assert together == [greedy_by_hand(stories, example.prompt, 24, stop) for example in examples]
    assert [generator.text(answer) for one in examples for answer in generator([one], [0])] == together


def test_an_answer_ends_at_the_end_of_text(stories: Stories) -> None:
    """A token of the greedy answer is made the end-of-text token of the model."""
    generator, examples = generator_of(stories, stop=()), encoded(stories)
    whole = generator(examples, range(5))
    generator.ends = {whole[0][3]}
    for before, after in zip(whole, generator(examples, range(5)), strict=True):
        at = before.index(whole[0][3]) if whole[0][3] in before else len(before) - 1
        assert after == before[: at + 1]


def test_a_pad_token_inside_an_answer_is_not_its_end(stories: Stories) -> None:
    generator, examples = generator_of(stories, stop=()), encoded(stories)
    whole = generator(examples, range(5))
    generator.pad_id = whole[1][2]
    assert generator(examples, range(5)) == whole


def test_the_model_s_own_sampling_and_penalties_are_not_used_and_stay(stories: Stories) -> None:
    model, _ = stories
    generator, examples = generator_of(stories), encoded(stories)
    expected = generator(examples, range(5))
    own = model.generation_config
    changed = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 5.0, "min_new_tokens": 20}
    saved = {key: getattr(own, key) for key in changed}
    own.update(**changed)
    state = torch.get_rng_state()
    try:
        assert generator(examples, range(5)) == expected
        assert model.generation_config is own
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        own.update(**saved)


def test_sampling_depends_on_the_seed_and_the_example_alone(stories: Stories) -> None:
    examples, state = encoded(stories), torch.get_rng_state()
    generator = generator_of(stories, temperature=1.0)
    together = generator(examples, range(5))
    alone = [answer for at in (4, 2, 0, 3, 1) for answer in generator([examples[at]], [at])]
    assert alone == [together[at] for at in (4, 2, 0, 3, 1)]
    assert together != generator_of(stories)(examples, range(5))
    other = Generator(*stories, generator.generation, layout=Layout(0), seed=1)
    assert together != other(examples, range(5))
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_have_the_model_s_probabilities() -> None:
    """4000 draws of three tokens at temperature 0.5, within four standard deviations."""
    logits = torch.tensor([1.0, 0.0, 0.5])
    drawn = Sampling(0.5, range(4000))(torch.zeros(4000, 1), logits.repeat(4000, 1)).argmax(dim=1)
    counts = torch.bincount(drawn, minlength=3) / 4000
    expected = (logits / 0.5).softmax(0)
    assert ((counts - expected).abs() < 4 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_answers_are_scored_and_recorded_by_example_and_group(stories: Stories) -> None:
    model, _ = stories
    generator = generator_of(stories)
    right = generator.text(generator([encoded(stories)[1]], [0])[0]).strip()
    examples = encoded(stories, references=(right,))
    task = Task("made", "generation", "lm", {}, headline="exact_match", generation=generator.generation)
    kept: list[Record] = []
    for batch_size in (1, 2, 5):
        kept.clear()
        scores = evaluate(
            model,
            task,
            {"test": examples},
            batch_size=batch_size,
            layout=Layout(0),
            processes=ALONE,
            generator=generator,
            record=lambda split, example, one: kept.append(one),
        )
        assert scores == {"test": {"exact_match": 0.2, "exact_match/a": 0.0, "exact_match/b": 0.5}}
        assert [one.metrics["exact_match"] for one in kept] == [0, 1, 0, 0, 0]
        assert str(kept[1].prediction).strip() == right
    macro = Task("made", "generation", "lm", {}, headline="x", generation=generator.generation, average="macro")
    scores = evaluate(
        model, macro, {"test": examples}, batch_size=2, layout=Layout(0), processes=ALONE, generator=generator
    )
    assert scores["test"]["exact_match"] == 0.25


def test_answers_generated_in_a_run_leave_it_as_it_is(run: Start, shared_data: Path) -> None:
    """With dropout and answers at every epoch or only at the end: the same weights to the bit."""
    settings = {
        "model.name_or_path": shared_data / "models" / "stories260K",
        "task.name": "gsm8k",
        "task.data_dir": shared_data / "gsm8k",
        "task.shots": 0,
        "task.max_new_tokens": 8,
        "task.train_examples": 4,
        "task.dev_examples": 2,
        "task.test_examples": 2,
        "adapter.dropout": 0.2,
        "training.epochs": 2,
    }
    often, seldom = (run(**settings, **{"training.evaluate": evaluate}) for evaluate in ("epoch", "end"))
    assert len(often.metrics("eval")) == len(seldom.metrics("eval")) + 1
    assert often.summary["weights_sha256"] == seldom.summary["weights_sha256"]
    assert often.summary["eval"] == seldom.summary["eval"]
    assert set(often.summary["eval"]["test"]) == {"exact_match", "loss"}
