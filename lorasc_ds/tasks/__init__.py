"""The tasks, by the name in `task.name`: functions from plain settings to examples."""

from __future__ import annotations

from collections.abc import Collection

from lorasc_ds.image_task_config import (
    CorruptedImagesConfig,
    DigitImagesConfig,
    ImageNetConfig,
    ImagesConfig,
    ImageTextConfig,
    RobustnessConfig,
)
from lorasc_ds.task_config import (
    AnswerConfig,
    BbhConfig,
    ChoiceConfig,
    DigitsConfig,
    DropFewShotConfig,
    Gsm8kConfig,
    HumanEvalConfig,
    InstructionConfig,
    MmluConfig,
    SampledData,
    TaskConfig,
    TextConfig,
)
from lorasc_ds.tasks.answers import answers
from lorasc_ds.tasks.base import Example, Generation, Message, Scores, Task
from lorasc_ds.tasks.bbh import bbh
from lorasc_ds.tasks.choices import choices
from lorasc_ds.tasks.digit_images import digit_images
from lorasc_ds.tasks.digits import digits
from lorasc_ds.tasks.drop_few_shot import drop_few_shot
from lorasc_ds.tasks.gsm8k import gsm8k
from lorasc_ds.tasks.humaneval import humaneval
from lorasc_ds.tasks.image_classes import imagenet, images
from lorasc_ds.tasks.image_text import image_text
from lorasc_ds.tasks.instructions import instructions
from lorasc_ds.tasks.mezo import Request
from lorasc_ds.tasks.mmlu import mmlu
from lorasc_ds.tasks.robustness import corrupted_images, robustness
from lorasc_ds.tasks.text import text

__all__ = ["Example", "Generation", "Message", "Scores", "Task", "load_task"]


def load_task(config: TaskConfig, seed: int, splits: Collection[str] = ("train", "dev", "test")) -> Task:
    """The examples of a configured task; `seed` draws the sample where a task draws one.

    Args:
        splits: what is wanted of a public data set; files of other splits need not be there.

    Raises:
        DataError: a file, or a row of it, cannot be used.
    """
    match config:
        case DigitsConfig():
            return digits(seed=seed, **config.model_dump(exclude={"name"}))
        case TextConfig():
            return text(**config.model_dump(exclude={"name", "block_size"}))
        case InstructionConfig():
            return instructions(**config.model_dump())
        case ImageTextConfig():
            return image_text(**config.model_dump(exclude={"name"}))
        case ChoiceConfig():
            return choices(config.name, config.loss, requested(config, seed, splits))
        case AnswerConfig():
            return answers(config.name, requested(config, seed, splits))
        case Gsm8kConfig():
            settings = config.model_dump(exclude={"name", *SampledData.model_fields})
            return gsm8k(request=requested(config, seed, splits), **settings)
        case MmluConfig():
            return mmlu(**config.model_dump(exclude={"name"}))
        case BbhConfig():
            return bbh(**config.model_dump(exclude={"name"}))
        case DropFewShotConfig():
            return drop_few_shot(**config.model_dump(exclude={"name"}))
        case HumanEvalConfig():
            return humaneval(**config.model_dump(exclude={"name"}))
        case DigitImagesConfig():
            return digit_images(seed=seed, **config.model_dump(exclude={"name"}))
        case ImageNetConfig():
            return imagenet(splits, **config.model_dump(exclude={"name"}))
        case ImagesConfig():
            return images(splits, **config.model_dump(exclude={"name"}))
        case RobustnessConfig():
            return robustness(**config.model_dump())
        case CorruptedImagesConfig():
            return corrupted_images(**config.model_dump(exclude={"name"}))


def requested(config: SampledData, seed: int, splits: Collection[str]) -> Request:
    sizes = config.model_dump(include={"train_examples", "dev_examples", "test_examples"})
    drawn_by = seed if config.sample_seed is None else config.sample_seed
    return Request(splits, drawn_by, config.data_dir, config.revision, **sizes)
