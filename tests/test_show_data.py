"""The data report: golden output, numbers by hand, and what padding costs against the tensors of the run."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from conftest import RECIPE
from transformers import LlamaConfig

from lorasc_ds import models, shown_data
from lorasc_ds.cli import parse_command_line
from lorasc_ds.data import Layout, collate
from lorasc_ds.data_report import Cost, cost_of, epoch_cost, length_table, quantile, split_lines
from lorasc_ds.encoded import EncodedExample, ScoredTokens
from lorasc_ds.models import QUICKSTART_BASE
from lorasc_ds.preparation import prepare
from lorasc_ds.preview import example_lines, marked
from lorasc_ds.show_data import main
from lorasc_ds.tasks import Example, Generation, Task

HI, DOG = ("Say hi.", "Hi!"), ("Go.", "I went to the big park and saw a little dog.")
LONG = ("Go on and on. " * 5, "No.")

# By stories260K's tokenizer HI has 104 tokens with the closing one, DOG 114 without, of which 16 of the answer; LONG's
# prompt has more than 110. A batch reads all but the last token of each: HI and DOG together, then HI alone.
GOLDEN = """\
task      instructions: sequences, loss lm
protocol  train.jsonl: dev is dev.jsonl
protocol  template stanford; the loss is on the response alone (task.mask_prompt)
note      1 of 3 training examples are repetitions of others
note      1 of 1 examples of dev are training examples too: its score is no test

split  tokens of  count  min  median  90 %  99 %  max
train  sequences      3  104     104   110   110  110
train  scored         3    4       4    12    12   12
train  cut away       1    4       4     4     4    4
dev    sequences      1  104     104   104   104  104
dev    scored         1    4       4     4     4    4
train: 3 examples, 1 left out (the limit leaves nothing scored of them), 6.3% of the tokens scored, 1 truncated by 4.0 tokens on average
dev: 1 examples, 3.8% of the tokens scored

the first epoch, 2 steps of 2, in micro batches of 2 on 1 process: tokens that the model reads, and computes with padding
  packing  group_by_length  tokens  computed  efficiency
  auto     false               315       315      100.0%  configured
  auto     true                315       315      100.0%
  false    false               315       321       98.1%
  false    true                315       321       98.1%
  true     false               315       315      100.0%
  true     true                315       315      100.0%

the first examples of train; what is scored stands between [[ and ]]
train.jsonl:1
    (104 tokens, 4 scored) <s> Below is an instruction that describes a task. Write a response that appropriately completes the request.\\n\\n### Instruction:\\nSay hi.\\n\\n### Response:[[Hi!</s>]]
train.jsonl:2
    (104 tokens, 4 scored) <s> Below is an instruction that describes a task. Write a response that appropriately completes the request.\\n\\n### Instruction:\\nSay hi.\\n\\n### Response:[[Hi!</s>]]
train.jsonl:3
    (110 tokens, 12 scored) <s> Below is an instruction that describes a task. Write a response that appropriately completes the request.\\n\\n### Instruction:\\nGo.\\n\\n### Response:[[I went to the big park and saw a]]
    4 tokens are cut away
"""


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments, RECIPE)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def write(path: Path, *rows: tuple[str, str]) -> None:
    path.write_text("".join(json.dumps({"instruction": one, "output": other}) + "\n" for one, other in rows))


def test_the_report_of_a_small_file(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", HI, HI, DOG, LONG)
    write(tmp_path / "dev.jsonl", HI)
    arguments = ["--task.name=instructions", "--task.train_file=train.jsonl", "--task.eval_file=dev.jsonl", "--task.template=stanford", "--task.mask_prompt=true"]  # fmt: skip
    arguments += [f"--model.name_or_path={shared_data}/models/stories260K", "--training.max_length=110", "--training.batch_size=2"]  # fmt: skip
    code, out, errors = printed(capsys, *arguments)
    assert (code, errors) == (0, "")
    assert out == GOLDEN


def hand_made(*candidates: tuple[int, int], **fields: object) -> EncodedExample:
    """An example whose candidates have so many tokens, of which so many are scored."""
    tokens = tuple(ScoredTokens(tuple(range(length)), scored) for length, scored in candidates)
    return EncodedExample("a", tokens, (0,), **fields)  # pyright: ignore[reportArgumentType]


def test_quantiles_are_values_that_occur() -> None:
    assert [quantile(range(1, 11), share) for share in (0, 0.5, 0.9, 0.99, 1)] == [1, 5, 9, 10, 10]
    assert [quantile([7], share) for share in (0, 0.5, 1)] == [7, 7, 7]


def test_lengths_by_hand() -> None:
    splits = {
        "train": [hand_made((10, 2), (12, 3), cut=5), hand_made((20, 1), (4, 2))],
        "test": [hand_made(prompt=(1,) * 30, cut=3, shots_left_out=2), hand_made(prompt=(1,) * 9)],
    }
    assert [line.split() for line in length_table(splits)[1:]] == [
        ["train", "sequences", "4", "4", "10", "20", "20", "20"],
        ["train", "scored", "4", "1", "2", "3", "3", "3"],
        ["train", "cut", "away", "1", "5", "5", "5", "5", "5"],
        ["test", "prompts", "2", "9", "9", "30", "30", "30"],
        ["test", "cut", "away", "1", "3", "3", "3", "3", "3"],
    ]
    assert list(split_lines(splits, {"train": 5, "test": 2})) == [
        "train: 2 examples, 3 left out (the limit leaves nothing scored of them), 17.4% of the tokens scored, 1 truncated by 5.0 tokens on average",
        "test: 2 examples, 1 truncated by 3.0 tokens on average, 2 demonstrations left out of 1 prompts",
    ]


@pytest.mark.parametrize("loss", ["lm", "classification"])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("share_prefixes", [False, True])
def test_the_cost_of_a_batch_is_that_of_its_tensor(loss: str, pack: bool, share_prefixes: bool) -> None:
    draw = random.Random(0)
    examples = []
    for _ in range(20):
        begin = tuple(draw.choices(range(9), k=draw.randint(1, 30)))
        candidates = [begin + tuple(draw.choices(range(9), k=draw.randint(1, 6))) for _ in range(3)]
        examples.append(EncodedExample("", tuple(ScoredTokens(one, 1) for one in candidates), (1,)))
    layout = Layout(0, share_prefixes, pack)
    sequences = [[one.target] if loss == "lm" else one.candidates for one in examples]
    batch = collate(sequences, [0] * len(examples), layout)
    assert cost_of(examples, loss, layout) == Cost(batch.input_tokens, batch.input_ids.numel())


def test_the_cost_of_an_epoch_is_that_of_the_run(shared_data: Path, tmp_path: Path) -> None:
    """Two processes' forward passes, of the order and micro batches that they would train on; the last step is short."""
    write(
        tmp_path / "train.jsonl",
        *(
            ("Go.", "Hi! " * draw)
            for draw in random.Random(0).sample((1, 2, 3, 4, 5, 60, 70, 80, 90, 100, 110, 120, 129), 13)
        ),
    )
    arguments = ["--task.name=instructions", f"--task.train_file={tmp_path}/train.jsonl", f"--task.eval_file={tmp_path}/train.jsonl"]  # fmt: skip
    arguments += [f"--model.name_or_path={shared_data}/models/stories260K", "--training.batch_size=8", "--training.micro_batch_size=4"]  # fmt: skip
    costs = []
    padded = "--training.packing=false"
    for flags in ([], [padded], [padded, "--training.group_by_length=true"]):
        invocation = parse_command_line([*arguments, *flags], RECIPE)
        assert not isinstance(invocation, str)
        runs = [prepare(invocation.config, rank, 2) for rank in (0, 1)]
        data = runs[0].data
        steps = [run.data.step(step) for run in runs for step in range(data.steps_per_epoch)]
        batches = [one.batch for step in steps for one in step.micro_batches if one.counts]
        expected = Cost(sum(one.input_tokens for one in batches), sum(one.input_ids.numel() for one in batches))
        assert len(batches) == 4
        assert epoch_cost(data, data.order(0).tolist(), data.layout) == expected
        costs.append(expected)
    assert len({cost.valid for cost in costs}) == 1
    assert len({cost.computed for cost in costs}) == 3


def test_several_scored_parts_are_marked_and_keep_their_spaces(shared_data: Path) -> None:
    tokenizer = models.AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")
    ids = tokenizer("Once upon a time there was")["input_ids"]
    words = {str(tokenizer.decode([id])): at for at, id in enumerate(ids)}
    tokens = ScoredTokens(tuple(ids), 2, (words["time"], words["was"]))
    assert marked(tokenizer, tokens, None) == "<s> Once upon a[[ time]] there[[ was]]"


def test_an_example_with_an_answer_to_generate() -> None:
    tokenizer = models.AutoTokenizer.from_pretrained(QUICKSTART_BASE)
    source = Example("q", "a b", references=("1", "2"), details={"test": "assert\nx"})
    prompt = tuple(tokenizer("a b c")["input_ids"])
    example = EncodedExample("q", (), (0,), prompt, source, "algebra", cut=4, shots_left_out=2)
    assert list(example_lines(tokenizer, example, full=False)) == [
        "q (algebra)",
        "    prompt (4 tokens) <s> a b c",
        "    reference: 1",
        "    reference: 2",
        "    test: assert\\nx",
        "    2 demonstrations are left out of the prompt: it was too long",
        "    4 tokens are cut away",
    ]
    assert list(example_lines(tokenizer, example, full=True))[4] == "    test: assert\n        x"


def test_every_candidate_is_shown_and_the_right_one_marked(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = printed(capsys, "--task.train_examples=8", "--task.dev_examples=2", "--task.test_examples=2", "--examples=1", "--split=old_domain", "--training.packing=true")  # fmt: skip
    lines = out[out.index("the first examples of old_domain") :].splitlines()[2:]
    assert [line[-5:] for line in lines] == [f"[[ {digit}]]"[-5:] for digit in range(10)]
    assert sum(line.startswith("    gold  (67 tokens, 1 scored) <s> a a") for line in lines) == 1
    assert [line.split()[:2] for line in out.splitlines() if line.endswith("configured")] == [["true", "false"]]


def test_demonstrations_are_shown_without_weights(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """GSM8K's eight, on a model of 4096 positions of which there is nothing but the configuration."""
    folder = tmp_path / "model"
    shutil.copytree(shared_data / "models" / "stories260K", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    LlamaConfig(vocab_size=512, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, max_position_embeddings=4096).save_pretrained(folder)  # fmt: skip
    arguments = ["--task.name=gsm8k", f"--task.data_dir={shared_data}/gsm8k", f"--model.name_or_path={folder}", "--task.train_examples=8", "--task.dev_examples=4", "--split=test", "--examples=1"]  # fmt: skip
    code, out, errors = printed(capsys, *arguments, "--full")
    assert (code, errors) == (0, "")
    shown = out[out.index("the first examples of test") :]
    assert shown.count("Question: ") == 9
    assert "<s> Answer the following questions.\n        \n        Question: There are 15 trees" in shown
    assert "\n    reference: " in shown
    _, short, _ = printed(capsys, *arguments)
    assert "Answer the following questions.\\n\\nQuestion: There are 15 trees" in short
    assert " ... " in short


def test_a_benchmark_has_no_batches_to_train_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    generation = Generation(2, lambda text, example: {"accuracy": 0.0})
    splits = {"test": [Example("q:1", "a b", references=("1",), group="anatomy")]}
    task = Task("mmlu", "generation", "lm", splits, "accuracy", notes=("shots 5",), generation=generation)
    monkeypatch.setattr(shown_data, "load_task", lambda config, seed: task)
    code, out, _ = printed(capsys, "--task.name=mmlu", "--task.subjects=anatomy")
    assert code == 0
    assert out.splitlines() == [
        "task      mmlu: generation",
        "protocol  shots 5",
        "",
        "split  tokens of  count  min  median  90 %  99 %  max",
        "test   prompts        1    3       3     3     3    3",
        "test: 1 examples",
        "",
        "the first examples of test; what is scored stands between [[ and ]]",
        "q:1 (anatomy)",
        "    prompt (3 tokens) <s> a b",
        "    reference: 1",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split=tset"], "error: --split tset: task digits has train, dev, new_domain"),
        (["--examples=-1"], "error: --examples is -1: a number from 0 on is needed"),
        (["--gpus=3"], "error: training.batch_size is 4, not a multiple of 3 processes"),
        (["--gpus=0"], "error: --gpus is 0: a number from 1 on is needed"),
        (["--task.dmain=upright"], "error: unknown argument --task.dmain=upright; did you mean --task.domain?"),
        (["--task.name=instructions", "--task.train_file=none.jsonl"], "error: task.train_file 'none.jsonl': No such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    code, _, errors = printed(capsys, *arguments)
    assert code == 2
    assert errors.startswith(message)
    assert len(errors.splitlines()) == 1
