"""One of two processes that score together: with the whole model each, then with its weights cut up by ZeRO-3."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasc_ds.harness import score
from lorasc_ds.sharding import Processes, detect, sharded_loading, start


def main(stories: str, directory: str) -> None:
    folder = Path(directory)
    whole = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)  # before an engine would cut it up
    launch = detect(folder / "zero3.json")
    accelerator = start(launch, micro_batch_size=1, accumulation=1, max_grad_norm=None, timeout_seconds=60)
    processes = Processes.of_this_run(accelerator.device)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    with sharded_loading(launch, accelerator, "float32"):
        cut = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    engine = accelerator.prepare(cut, torch.optim.AdamW([cut.get_input_embeddings().weight]))  # lives as long as this
    found = {}
    for case, model, limit in (("whole", whole, None), ("one question", whole, 1), ("cut up", cut, 9)):
        records: dict[str, object] = {}
        scores = score(
            model,
            tokenizer,
            ["yes_or_no", "stories"],
            processes=processes,
            batch_size=4,
            include_path=folder,
            limit=limit,
            sharded=case == "cut up",
            record=lambda task, one, to=records: to.update({f"{task} {one['id']}": one["answers"]}),
        )
        found[case] = [scores, records]
    del engine
    (folder / f"rank{processes.rank}.json").write_text(json.dumps(found))
