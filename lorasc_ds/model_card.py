"""The model card of an export: what the run was, how well it did, what the export leaves out. No paths, no secrets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from lorasc_ds import models
from lorasc_ds.exported_run import ExportedRun

SHOWN_PACKAGES = ("lorasc_ds", "torch", "transformers", "peft")
PAPER = "[LoRASC](https://arxiv.org/abs/2407.01491)"


PIPELINES = {  # by what loads the model
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForImageClassification": "image-classification",
    "AutoModel": "zero-shot-image-classification",
}
TRAINED_HEAD = (
    'head = load_file(f"{FOLDER}/head.safetensors")  # a row for each class, in the order of the task',
    'pixels = processor(IMAGE, return_tensors="pt")["pixel_values"].to(model.dtype)',
    "with torch.no_grad():",
    "    features = model.get_image_features(pixel_values=pixels).pooler_output.float()",
    'logits = torch.nn.functional.normalize(features, dim=-1) @ head["weight"].T + head["bias"]',
)
PROTOTYPES = (
    'texts = [f"a photo of a {name}." for name in NAMES]  # the run took the mean over all of its prompts',
    'inputs = processor(text=texts, images=IMAGE, padding="max_length", return_tensors="pt").to(model.dtype)',
    "logits = model(**inputs).logits_per_image",
)


def shown_name(name_or_path: str) -> str:
    """A hub id as it is; of a folder only its name, since the rest is this machine's."""
    path = Path(name_or_path)
    return (
        path.resolve().name
        if path.is_dir() or path.is_absolute() or name_or_path.startswith((".", "~"))
        else name_or_path
    )


def card(run: ExportedRun, kind: str, facts: Mapping[str, str]) -> str:
    """The text of `README.md`.

    Args:
        kind: `merged`, `adapter` or `svd`.
        facts: what is to be known of this export, by label.
    """
    base = shown_name(run.ledger.base.name)
    loader = models.auto_class(run.model, models.load_architecture(run.model)).__name__
    return "\n".join(
        (
            *front_matter(base, run.config.adapter.method, kind, PIPELINES[loader]),
            f"# {base} after {run.expert} {run.ledger.strategy} {'expert' if run.expert == 1 else 'experts'}",
            "",
            f"{WHAT[kind].format(base=base)} It was trained with the strategy `{run.ledger.strategy}` of `lorasc_ds`"
            f" ({PAPER}), and exported from the run's ledger.",
            "",
            *usage(run, kind, base, loader),
            "## The export",
            "",
            *table(("", ""), facts.items()),
            "",
            "## The run",
            "",
            *table(("", ""), settings(run).items()),
            "",
            *scores(run, kind),
        )
    )


WHAT = {
    "merged": "A fine-tuned {base}: a plain model, into which all experts are merged.",
    "adapter": "One PEFT adapter for the untouched {base}, which holds all experts.",
    "svd": "One PEFT adapter for the untouched {base}, which holds the experts up to their largest singular values.",
}


def front_matter(base: str, method: str, kind: str, pipeline: str) -> list[str]:
    """Hugging Face's metadata, YAML; a JSON string is one."""
    tags = ["lorasc", "lora", *(["dora"] if method == "dora" else [])]
    library = "transformers" if kind == "merged" else "peft"
    return [
        "---",
        f"base_model: {json.dumps(base)}",
        f"library_name: {library}",
        f"pipeline_tag: {pipeline}",
        f"tags: {json.dumps(tags)}",
        "---",
        "",
    ]


def usage(run: ExportedRun, kind: str, base: str, loader: str) -> list[str]:
    """Python that makes the model; of CLIP's kind, the logits of an image too, for which it has no layer."""
    imports, dtype = [loader], f"dtype={json.dumps(run.config.model.dtype)}"
    revision = run.ledger.base.revision
    pinned = f", revision={json.dumps(revision)}" if revision else ""
    source = "FOLDER" if kind == "merged" else f"{json.dumps(base)}{pinned}"
    lines = [f"model = {loader}.from_pretrained({source}, {dtype})"]
    if kind != "merged":
        lines.append("model = PeftModel.from_pretrained(model, FOLDER)")
    if loader == "AutoModel":
        imports.append("AutoImageProcessor" if run.head else "AutoProcessor")
        lines.append(f"processor = {imports[-1]}.from_pretrained({source})")
        lines += TRAINED_HEAD if run.head else PROTOTYPES
    head = ["import torch", "from safetensors.torch import load_file"] if loader == "AutoModel" and run.head else []
    peft = ["from peft import PeftModel"] if kind != "merged" else []
    return ["```python", *head, *peft, f"from transformers import {', '.join(sorted(imports))}", "", *lines, "```", ""]


def settings(run: ExportedRun) -> dict[str, str]:
    """What the run was, by label."""
    ledger, records = run.ledger, run.ledger.experts[: run.expert]
    adapter = ledger.adapter

    def used(values: list[float]) -> str:
        return ", ".join(f"{value:g}" for value in dict.fromkeys(values))

    return {
        "base model": f"{shown_name(ledger.base.name)}, revision {ledger.base.revision or 'not given'},"
        f" {ledger.base.dtype}",
        "task": run.config.task.name,
        "strategy": f"{ledger.strategy}, {len(records)} of {len(ledger.experts)} closed experts,"
        f" {records[-1].steps[1]} optimizer steps",
        "slow retention α": used([record.slow_retention for record in records]),
        "noise intensity λ": used([record.noise_intensity for record in records]),
        "adapter": f"{adapter.method}, rank {adapter.rank}, scaling {adapter.scaling:g}, on {len(ledger.weights)}"
        f" weights ({', '.join(run.config.adapter.target_modules)})",
        "training": f"global batch {run.config.training.batch_size}, learning rate"
        f" {run.config.training.learning_rate:g}, seed {ledger.seed}",
        "made with": ", ".join(f"{name} {run.packages[name]}" for name in SHOWN_PACKAGES if name in run.packages),
    }


def scores(run: ExportedRun, kind: str) -> list[str]:
    """Those of the live model after this expert, where the run has them."""
    if not run.shipped or run.summary is None:
        return ["The run kept no scores of this expert: it did not finish, or its scores are of another one.", ""]
    after, before = run.summary["eval"], run.summary["eval_before"]
    rows = [
        (split, metric, f"{before[split][metric]:.4g}", f"{value:.4g}")
        for split, metrics in after.items()
        for metric, value in metrics.items()
    ]
    same = kind == "merged" and (run.noise or not run.has_noise)
    remark = (
        "These weights" if same else "The live model, not this export; `measured` above says how far they are apart"
    )
    return ["## Scores", "", f"{remark}.", "", *table(("split", "metric", "before", "after"), rows), ""]


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]
