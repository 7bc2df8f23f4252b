"""The tasks, by the name in `task.name`: functions from plain settings to examples."""

from __future__ import annotations

from lorasc_ds.task_config import DigitsConfig, InstructionConfig, TaskConfig, TextConfig
from lorasc_ds.tasks.base import Example, Generation, Message, Scores, Task
from lorasc_ds.tasks.digits import digits
from lorasc_ds.tasks.instructions import instructions
from lorasc_ds.tasks.text import text

__all__ = ["Example", "Generation", "Message", "Scores", "Task", "load_task"]


def load_task(config: TaskConfig, seed: int) -> Task:
    """The examples of a configured task; `seed` draws the sample where a task draws one.

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
    raise NotImplementedError(config.name)
