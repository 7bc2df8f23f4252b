"""HumanEval: functions that a model completes, and tests that they pass or not (protocols 5)."""

from __future__ import annotations

from typing import Literal

from lorasc_ds.errors import ConfigError
from lorasc_ds.sandbox import Kind, choose
from lorasc_ds.tasks.base import Example, Generation, Task
from lorasc_ds.tasks.rows import Row, hub_rows, local_file, read_rows

INSTRUCTION = (
    "Please complete the following Python code without providing any additional tasks such as testing or explanations\n"
)
SECONDS = 3.0
NEEDED = ("prompt", "test", "entry_point")


def example_of(row: Row) -> Example:
    details = {key: row.text(key) for key in NEEDED}
    return Example(row.text("task_id"), INSTRUCTION + details["prompt"], details=details)


def completion_of(answer: str) -> str:
    """The body of the function: what stands before the first empty line, each line indented by an even number.

    A tokenizer of Llama's kind leaves the first space of an answer out.
    """
    lines = answer.split("\n")
    even = [" " * ((len(line) - len(line.lstrip(" "))) % 2) + line for line in lines]
    return "\n".join(even).lstrip("\n").split("\n\n")[0]


def program_of(completion: str, example: Example) -> str:
    problem = example.details
    return f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})"


def humaneval(
    *,
    data_dir: str | None,
    revision: str | None,
    temperature: float,
    sandbox: Literal["auto"] | Kind,
    confirm_run_unsafe_code: bool,
) -> Task:
    """
    Raises:
        ConfigError: it is not confirmed that programs may be run, or they cannot be shut in.
        DataError: rows cannot be had or used.
    """
    if not confirm_run_unsafe_code:
        raise ConfigError(
            "task humaneval runs programs that the model wrote, in a sandbox (--sandbox, task.sandbox), and"
            " task.confirm_run_unsafe_code is false: give --confirm_run_unsafe_code if that is all right"
        )
    if data_dir is None:
        rows = hub_rows("openai/openai_humaneval", None, "test", revision)
    else:
        rows = read_rows(local_file(data_dir, ["HumanEval.jsonl"]), "task.data_dir")
    examples = [example_of(row) for row in rows]
    box = choose(sandbox)

    def score(answer: str, example: Example) -> dict[str, float]:
        return {"pass@1": float(box.run(program_of(completion_of(answer), example), SECONDS).result == "passed")}

    sampled = f"a sample at temperature {temperature:g}, top_p 1" if temperature else "greedy, not at temperature 0.1"
    shut = "limits alone: programs run as you, with your files and network" if box.kind == "none" else box.kind
    return Task(
        name="humaneval",
        kind="generation",
        loss="lm",
        splits={"test": examples},
        headline="pass@1",
        notes=(f"one answer to a problem, {sampled}; {SECONDS:g} s for its tests", f"sandbox: {shut}"),
        generation=Generation(max_new_tokens=512, score=score, temperature=temperature),
    )
