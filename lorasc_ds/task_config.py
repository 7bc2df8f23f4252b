"""The settings of every task, by `task.name`. No torch here."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lorasc_ds.image_task_config import (
    CorruptedImagesConfig,
    DigitImagesConfig,
    ImageNetConfig,
    ImagesConfig,
    ImageTextConfig,
    RobustnessConfig,
)
from lorasc_ds.section import PublicData, Section


def files_of(train_file: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The files of `task.train_file`, however it was given."""
    return (train_file,) if isinstance(train_file, str) else train_file or ()


def check_sources(train_file: str | tuple[str, ...] | None, weights: tuple[float, ...] | None, streaming: bool) -> None:
    """
    Raises:
        ValueError: the settings of the training files do not fit one another.
    """
    files = files_of(train_file)
    twice = [file for at, file in enumerate(files) if file in files[:at]]
    if twice:
        raise ValueError(f"task.train_file names {twice[0]!r} twice: leave one out, or give it more of task.weights")
    if weights is not None and len(weights) != len(files):
        raise ValueError(
            f"task.weights has {len(weights)} numbers, but task.train_file names {len(files)} files: give one for each"
        )
    other = [file for file in files if PurePath(file).suffix.lower() != ".jsonl"]
    if streaming and (other or not files):
        raise ValueError(
            f"task.streaming is true, but task.train_file is {other[0] if other else None!r}: .jsonl files are needed,"
            " whose rows can be found by themselves"
        )


class DigitsConfig(Section):
    name: Literal["digits"] = Field(
        default="digits", description="Handwritten digits as text, from one domain to another."
    )
    domain: Literal["upright", "mirrored", "rotated", "blurred"] = Field(
        default="mirrored", description="The new domain; the model in the package knows upright digits."
    )
    train_examples: int = Field(default=100, ge=1, le=296, description="Training examples in the new domain.")
    dev_examples: int = Field(
        default=100, ge=1, le=296, description="Examples for selection; 297 images are left for both."
    )
    test_examples: int = Field(default=500, ge=1, le=500, description="Test images, the same ones in every domain.")
    label_noise: float = Field(default=0.3, ge=0, le=1, description="Share of training examples with a wrong label.")
    loss: Literal["lm", "classification"] = Field(
        default="lm", description="Cross-entropy over the answer's tokens, or over the candidates."
    )

    @model_validator(mode="after")
    def enough_images(self) -> DigitsConfig:
        if self.train_examples + self.dev_examples > 297:
            raise ValueError(
                f"task.train_examples {self.train_examples} + task.dev_examples {self.dev_examples} is more than the"
                " 297 images that neither the base model nor the test has: lower one"
            )
        return self


class SampledData(PublicData):
    """Training and dev examples drawn from the public training split, test examples from the validation split."""

    train_examples: int | None = Field(default=None, ge=1, description="Training examples; null: MeZO's 1000.")
    dev_examples: int | None = Field(
        default=None, ge=1, description="Examples for selection; null: MeZO's 500, but 100 for cb and copa."
    )
    test_examples: int | None = Field(default=None, ge=1, description="Test examples; null: MeZO's 1000.")
    sample_seed: int | None = Field(
        default=None, ge=0, lt=2**32, description="Draws the examples; null: training.seed."
    )


class ChoiceConfig(SampledData):
    name: Literal["sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa", "record"] = Field(
        description="SST-2 and the tasks of SuperGLUE, by MeZO's prompts: the candidate answer of the highest mean"
        " log-probability is the prediction."
    )
    loss: Literal["lm", "classification"] | None = Field(
        default=None,
        description="Cross-entropy over the right answer's tokens, or over the candidates; null: MeZO's, which is"
        " classification, but lm for copa and record.",
    )


class AnswerConfig(SampledData):
    name: Literal["squad", "drop"] = Field(description="Questions on a passage; an answer is generated, F1.")


class Gsm8kConfig(SampledData):
    name: Literal["gsm8k"] = Field(description="Grade-school mathematics; a worked answer is generated.")
    mode: Literal["cot", "direct"] = Field(
        default="cot", description="The eight demonstrations of an evaluation are worked out, or the bare number."
    )
    target: Literal["line", "raw"] = Field(
        default="line",
        description="What is trained on: the rationale on one line and `So the answer is N.`, as the demonstrations"
        " have it; or the answer as released, and an answer then ends at an empty line.",
    )
    shots: int = Field(default=8, ge=0, le=8, description="Demonstrations of an evaluation; 0: as in training.")
    max_new_tokens: int = Field(default=512, ge=1, description="Longest answer that is generated, in tokens.")
    questions: Literal["subset", "full"] = Field(
        default="subset", description="Test questions: the 200 that the paper's number is of, or all 1319."
    )
    misspelt: bool = Field(
        default=True, description="`Quesion:` in the demonstrations of mode direct, as open-instruct has it."
    )


class OwnTest(Section):
    """What is only reported, of a task whose files are one's own."""

    test_file: str | None = Field(default=None, description="What is only reported, as the split test.")
    test_share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="In place of it: the share of train_file that is held out for test, before any is for dev; null:"
        " none.",
    )

    @model_validator(mode="after")
    def one_test(self) -> Self:
        if self.test_file is not None and self.test_share is not None:
            raise ValueError(
                f"task.test_file {self.test_file!r} and task.test_share {self.test_share:g} both say what test is:"
                " leave one out"
            )
        return self


class InstructionConfig(PublicData, OwnTest):
    name: Literal["alpaca", "instructions"] = Field(
        description="Instruction tuning: alpaca, or a file of one's own with Alpaca's fields or chat messages."
    )
    dataset: Literal["cleaned", "stanford"] = Field(
        default="cleaned", description="Which Alpaca: yahma/alpaca-cleaned or tatsu-lab/alpaca (alpaca)."
    )
    train_file: str | Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = Field(
        default=None,
        description="A .json or .jsonl file of rows with instruction, input and output, or with messages; or several.",
    )
    eval_file: str | None = Field(default=None, description="Held-out rows; null: dev_examples of the training rows.")
    weights: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False, min_length=2)] | None = Field(
        default=None, description="Shares of the train files in an epoch; null: as many rows as each has."
    )
    dev_examples: int | None = Field(
        default=None, ge=1, description="Rows held out for selection; null: MELoRA's 2000, but at most a tenth."
    )
    sample_seed: int = Field(default=42, ge=0, lt=2**32, description="Draws the rows that are held out.")
    template: Literal["alpaca", "stanford", "chat"] | None = Field(
        default=None,
        description="alpaca: MELoRA's, a newline after `### Response:`; stanford: without; chat: the tokenizer's chat"
        " template; null: alpaca, but chat for rows with messages.",
    )
    mask_prompt: bool = Field(default=False, description="Leave the prompt out of the loss.")
    streaming: bool = Field(
        default=False, description="Read and tokenise training rows when they are needed, not before."
    )

    @model_validator(mode="after")
    def consistent(self) -> InstructionConfig:
        check_sources(self.train_file, self.weights, self.streaming)
        return self


class TextConfig(OwnTest):
    name: Literal["text"] = Field(default="text", description="Causal language modelling on your own files.")
    train_file: str | Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        description="A .txt file (one document), or .jsonl with one document a row; or several."
    )
    eval_file: str | None = Field(default=None, description="Held-out text; null: the last tenth of train_file.")
    weights: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False, min_length=2)] | None = Field(
        default=None, description="Shares of the train files in an epoch; null: as much as each has."
    )
    text_field: str = Field(
        default="text", min_length=1, description="The field of a .jsonl row that holds the document."
    )
    block_size: int = Field(
        default=256, ge=2, description="Tokens in a training sequence; documents are packed end to end."
    )
    streaming: bool = Field(
        default=False, description="Read and tokenise training documents when they are needed, not before."
    )

    @model_validator(mode="after")
    def known_suffixes(self) -> TextConfig:
        files = files_of(self.train_file)
        others = ("eval_file", self.eval_file), ("test_file", self.test_file)
        for key, value in (*(("train_file", file) for file in files), *others):
            if value is not None and PurePath(value).suffix.lower() not in (".txt", ".jsonl"):
                raise ValueError(f"task.{key} is {value!r}: a name that ends in .txt or .jsonl is needed")
        check_sources(self.train_file, self.weights, self.streaming)
        return self


class MmluConfig(PublicData):
    name: Literal["mmlu"] = Field(description="MMLU, 5 shots, by InstructEval.")
    subjects: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = Field(
        default=None, description="Subjects such as anatomy; null: all there are."
    )


class BbhConfig(PublicData):
    name: Literal["bbh"] = Field(description="BIG-Bench Hard, 3 shots, by InstructEval.")
    subjects: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = Field(
        default=None, description="Tasks such as date_understanding; null: all there are."
    )


class DropFewShotConfig(PublicData):
    name: Literal["drop_few_shot"] = Field(description="DROP, 3 shots, by InstructEval.")


class HumanEvalConfig(PublicData):
    name: Literal["humaneval"] = Field(description="HumanEval, by InstructEval: programs are written and run.")
    temperature: float = Field(default=0.1, ge=0, description="Of sampling; 0: greedy.")
    sandbox: Literal["auto", "unshare", "bwrap", "none"] = Field(
        default="auto", description="What keeps a program from network and files; auto: one that works here."
    )
    confirm_run_unsafe_code: bool = Field(
        default=False, description="Programs that the model wrote are run only if this is true."
    )


TrainableTask = (
    DigitsConfig
    | TextConfig
    | ChoiceConfig
    | AnswerConfig
    | Gsm8kConfig
    | InstructionConfig
    | ImageNetConfig
    | ImagesConfig
    | DigitImagesConfig
    | ImageTextConfig
)
Benchmark = MmluConfig | BbhConfig | DropFewShotConfig | HumanEvalConfig | RobustnessConfig | CorruptedImagesConfig
TaskConfig = TrainableTask | Benchmark
