"""Scores and losses against candidates scored one by one, as the protocol says."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaForCausalLM

from lorasc_ds.data import Layout, collate
from lorasc_ds.encoded import EncodedExample, ScoredTokens
from lorasc_ds.evaluation import batches, evaluate
from lorasc_ds.objectives import summed_loss
from lorasc_ds.sharding import Processes
from lorasc_ds.tasks import Example, Task

ALONE = Processes(0, 1, torch.device("cpu"))


def examples(kind: str) -> list[EncodedExample]:
    """Candidates of several lengths, some with a common input; prompts of several lengths."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for number in range(9):
        prompt = torch.randint(3, 40, (3 + number % 4,), generator=generator).tolist()
        if kind == "documents":
            made.append(EncodedExample(str(number), (ScoredTokens((0, *prompt), len(prompt)),), (0,)))
            continue
        answers = [[5], [6], [7, 8], [9, 10, 11]][: 2 + number % 3]
        candidates = tuple(ScoredTokens((0, *prompt, *answer), len(answer)) for answer in answers)
        made.append(EncodedExample(str(number), candidates, (number % len(answers),) if number else (0, 1)))
    return made


def made_task(kind: str, loss: str = "lm") -> Task:
    return Task("made", kind, loss, {"train": [], "dev": [Example("x", "", ("",))]}, headline="loss")


def alone(model: LlamaForCausalLM, sequence: ScoredTokens) -> torch.Tensor:
    """log p of the scored tokens of one sequence, by itself, float64 of (scored,)."""
    with torch.no_grad():
        log_p = model.eval()(input_ids=torch.tensor([sequence.ids])).logits[0].double().log_softmax(-1)
    end = len(sequence.ids)
    return torch.stack([log_p[at - 1, sequence.ids[at]] for at in range(end - sequence.scored, end)])


@pytest.mark.parametrize("loss", ["lm", "classification"])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_candidates_are_ranked_by_mean_log_probability(
    tiny_llama: LlamaForCausalLM, loss: str, batch_size: int
) -> None:
    made = examples("candidates")
    task = made_task("candidates", loss)
    tiny_llama.train()
    scores = evaluate(tiny_llama, task, {"dev": made}, batch_size=batch_size, layout=Layout(3), processes=ALONE)["dev"]
    assert tiny_llama.training
    log_p = [[alone(tiny_llama, candidate) for candidate in one.candidates] for one in made]
    means = [torch.stack([candidate.mean() for candidate in of_one]) for of_one in log_p]
    correct = [int(mean.argmax()) in one.gold for mean, one in zip(means, made, strict=True)]
    assert scores["accuracy"] == sum(correct) / len(made)
    assert 0 < scores["accuracy"] < 1
    if loss == "lm":
        targets = torch.cat([of_one[one.gold[0]] for of_one, one in zip(log_p, made, strict=True)])
        expected = -targets.mean()
    else:
        expected = torch.stack([-m.log_softmax(0)[one.gold[0]] for m, one in zip(means, made, strict=True)]).mean()
    assert scores["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_batch_holds_as_many_inputs_as_asked() -> None:
    made = examples("candidates")
    for size in (1, 3, 5):
        batched = [[made[at] for at in members] for members in batches(made, size, Layout(3))]
        assert sorted(int(one.id) for batch in batched for one in batch) == list(range(9))
        rows = [
            len(collate([one.candidates for one in batch], [0] * len(batch), Layout(3)).input_ids) for batch in batched
        ]
        assert all(count <= size or len(batch) == 1 for count, batch in zip(rows, batched, strict=True))


def test_perplexity_is_over_all_scored_tokens(tiny_llama: LlamaForCausalLM) -> None:
    made = examples("documents")
    task = made_task("documents")
    scores = evaluate(tiny_llama, task, {"dev": made}, batch_size=4, layout=Layout(3), processes=ALONE)["dev"]
    expected = -torch.cat([alone(tiny_llama, one.target) for one in made]).mean()
    assert scores["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


@pytest.mark.parametrize("loss", ["lm", "classification"])
def test_the_training_loss_is_the_one_that_is_evaluated(tiny_llama: LlamaForCausalLM, loss: str) -> None:
    made = examples("candidates")
    task = made_task("candidates", loss)
    gold = [one.gold[0] for one in made]
    if loss == "lm":
        batch = collate([[one.target] for one in made], [0] * len(made), Layout(3))
        count = batch.scored_tokens
    else:
        batch, count = collate([one.candidates for one in made], gold, Layout(3)), len(made)
    trained = float(summed_loss(tiny_llama.eval(), batch, loss).detach()) / count
    scores = evaluate(tiny_llama, task, {"dev": made}, batch_size=4, layout=Layout(3), processes=ALONE)["dev"]
    assert trained == pytest.approx(scores["loss"], rel=1e-5)


def test_evaluation_draws_no_random_number(tiny_llama: LlamaForCausalLM) -> None:
    task = made_task("candidates")
    before = torch.get_rng_state()
    evaluate(tiny_llama.train(), task, {"dev": examples("candidates")}, batch_size=4, layout=Layout(3), processes=ALONE)
    assert torch.equal(torch.get_rng_state(), before)
