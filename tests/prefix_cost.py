"""What reading the beginning of a question once saves: tokens, and time against candidate by candidate.

    python tests/prefix_cost.py                  # needs the real data beside the project (LORASC_SHARED)

The model is a random Llama of 4096 positions with the tokenizer of stories260K; both ways score the same batches of
real rows in turn, and the ratio of times is that of the medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lorasc_ds.data import Layout, trees_of
from lorasc_ds.encoding import EncodedExample, Encoder
from lorasc_ds.evaluation import evaluate
from lorasc_ds.sharding import Processes
from lorasc_ds.task_config import ChoiceConfig
from lorasc_ds.tasks import Task, load_task

ROWS = {"rte": "superglue/RTE", "copa": "superglue/COPA", "record": "superglue/fewglue32/ReCoRD"}
Encoded = tuple[Task, Sequence[EncodedExample]]


def rows_of(name: str, data: Path, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """The test rows of a task, as tokens; of ReCoRD those with three candidates or more."""
    task = load_task(ChoiceConfig(name=name, data_dir=str(data / ROWS[name])), 0, ("test",))
    encoder = Encoder(tokenizer, task, max_length=None, model_limit=4096, vocabulary_size=len(tokenizer))
    examples = encoder.encode()["test"]
    return task, [one for one in examples if name != "record" or len(one.candidates) > 2]


def tokens(examples: Sequence[EncodedExample]) -> tuple[int, int]:
    """What the model reads where beginnings are shared, and candidate by candidate."""
    shared = sum(tree.size for e in examples for tree in set(trees_of(e.candidates, True).values()))
    return shared, sum(len(candidate.ids) for e in examples for candidate in e.candidates)


def seconds(model: LlamaForCausalLM, task: Task, examples: Sequence[EncodedExample], shared: bool) -> float:
    """Of one evaluation; candidate by candidate each is a question of its own, so that nothing is shared."""
    if not shared:
        examples = [EncodedExample(e.id, (candidate,), (0,)) for e in examples for candidate in e.candidates]
    began = time.perf_counter()
    processes = Processes(0, 1, torch.device("cpu"))
    evaluate(
        model, task, {"test": examples}, batch_size=8, layout=Layout(0, share_prefixes=shared), processes=processes
    )
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=24, help="rows of each task (default: 24)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way (default: 5)")
    options = parser.parse_args()
    data = Path(os.environ.get("LORASC_SHARED", Path(__file__).parents[2] / "shared")) / "data"
    tokenizer = AutoTokenizer.from_pretrained(data / "models" / "stories260K")
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=4096, **shape)).eval()
    for name in ROWS:
        task, examples = rows_of(name, data, tokenizer)
        examples = examples[: options.examples]
        shared, apart = tokens(examples)
        times = [[seconds(model, task, examples, way) for way in (True, False)] for _ in range(options.rounds)]
        ratio = statistics.median(one for one, _ in times) / statistics.median(other for _, other in times)
        print(
            f"{name:<7} {len(examples)} rows: {shared / apart:.3f} of the tokens, {ratio:.3f} of the time", flush=True
        )


if __name__ == "__main__":
    main()
