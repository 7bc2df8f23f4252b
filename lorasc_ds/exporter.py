"""An export, from the options to a folder that appears whole or not at all. The model is never whole in memory."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from lorasc_ds import models
from lorasc_ds.adapters import names_of, select_modules, shape_of, with_adapter
from lorasc_ds.algorithm.experts import Pair, delta_statistics
from lorasc_ds.algorithm.ledger import LedgerError, read_pair
from lorasc_ds.algorithm.low_rank import joined, noise_norm, truncated
from lorasc_ds.algorithm.tensor_files import digest, write_tensors
from lorasc_ds.classifier import SavedHead
from lorasc_ds.comparison import compare, room_for_two
from lorasc_ds.errors import ConfigError, RunError
from lorasc_ds.export_options import ExportOptions
from lorasc_ds.exported_run import ExportedRun, Replay, open_run
from lorasc_ds.model_card import card, shown_name
from lorasc_ds.pretrained import layout_of, model_with, open_pretrained, write_model

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Facts = dict[str, str]
"""What is to be known of an export, by label: printed, and in the card."""


def export(options: ExportOptions) -> None:
    """Write what is asked for, and say what it is.

    Raises:
        RunError, LedgerError: in one line; nothing is left behind.
    """
    if not sys.stderr.isatty():
        disable_progress_bar()
    run = open_run(options.run, options.expert, options.noise)
    with appearing_whole(options.output_dir) as folder:
        write = write_merged if options.kind == "merged" else write_adapter
        facts = {"experts": f"{run.expert} of {len(run.ledger.experts)}"} | write(run, options, folder)
        facts |= compared(run, options, folder)
        (folder / "README.md").write_text(card(run, options.kind, facts), encoding="utf-8")
    for label, text in facts.items():
        print(f"{label:<9} {text}")
    print(f"written   {options.output_dir}")


@contextmanager
def appearing_whole(directory: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `directory` when the block ends, and is gone after an error.

    Raises:
        ConfigError: the disk cannot be written, or is full.
    """
    temporary = directory.absolute().with_name(f".tmp-{directory.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # a killed export's
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(directory)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--output_dir {directory}: {reason}; give a folder on a disk with room") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_merged(run: ExportedRun, options: ExportOptions, folder: Path) -> Facts:
    """A plain Hugging Face model with its tokenizer."""
    ledger = run.ledger
    base = open_pretrained(run.model, {*ledger.weights, *ledger.noised})
    models.name_classes(base.model, ledger.classes)
    replay = Replay(run, base.tensor)
    write_model(folder, base.model, base.layout, replay, options.max_shard_size)
    replay.finish()
    for one in models.load_beside(run.model):
        one.save_pretrained(folder)
    save_head(run, base.model, folder)
    facts = {"noise": "in the weights" if run.noise and run.has_noise else noise_left_out(run)}
    facts["digest"] = checked_digest(run, folder)
    return facts | ({"base": f"loaded whole, since {base.loaded}"} if base.loaded else {})


def save_head(run: ExportedRun, model: PreTrainedModel, folder: Path) -> None:
    """Write the head that the run trained on text prototypes, for which the model's own files have no place."""
    if run.head and models.has_text_tower(model.config):
        SavedHead(run.head, run.ledger.classes).save_pretrained(folder)


def checked_digest(run: ExportedRun, folder: Path) -> str:
    """The sha256 of the adapted weights as they were written, compared with the run's where it has one of these.

    Raises:
        LedgerError: they differ.
    """
    written = models.pretrained_tensors(run.model.model_copy(update={"name_or_path": str(folder), "revision": None}))
    found = digest(written(name) for name in run.ledger.weights)
    same = (run.shipped if run.magnitudes else run.last) and (run.noise or not run.has_noise)
    if run.summary is None or not same:
        return f"sha256 of the adapted weights {found}; the run recorded none of these weights"
    key = "shipped_sha256" if run.magnitudes else "weights_sha256"
    if found != run.summary[key]:
        raise LedgerError(
            f"{run.ledger.directory}: the adapted weights have sha256 {found}, but {key} in summary.json is"
            f" {run.summary[key]}: the files of this run do not belong together"
        )
    return f"sha256 of the adapted weights {found}, equal to the run's {key}"


def noise_left_out(run: ExportedRun) -> str:
    """What an export without the noise lacks, in numbers: the noise's norm to expect, over that of the experts."""
    if not run.has_noise:
        return "there is none up to this expert"
    ledger, records = run.ledger, run.ledger.experts[: run.expert]
    noise = experts = 0.0
    for name, pair in joined_pairs(run):
        shape = (pair.B.shape[0], pair.A.shape[1])
        noise += noise_norm(shape, (record.noise_scale[name] for record in records)) ** 2
        experts += delta_statistics([pair], [ledger.adapter.scaling])[0].norm ** 2
    share = math.sqrt(noise / experts) if experts > 0 else math.inf
    others = f", and all of it on {len(ledger.noised)} other matrices" if ledger.noised else ""
    return (
        f"left out: on the adapted weights its norm is about {math.sqrt(noise):.3g}, {share:.1%} of what the experts"
        f" add ({math.sqrt(experts):.3g}){others}; the run trained with it"
    )


def joined_pairs(run: ExportedRun) -> Iterator[tuple[str, Pair]]:
    """All that the experts add to a weight, as one pair of rank T·r, one weight at a time."""
    files = [run.ledger.expert_file(expert) for expert in range(1, run.expert + 1)]
    for name in run.ledger.weights:
        yield name, joined([read_pair(file, name) for file in files])


def peft_targets(targets: Sequence[str], selected: Collection[str]) -> list[str]:
    """As PEFT reads them, which knows no wildcards: the layers by their paths where there are any."""
    return sorted(selected) if any("*" in target for target in targets) else list(targets)


def write_adapter(run: ExportedRun, options: ExportOptions, folder: Path) -> Facts:
    """One PEFT adapter: all the experts, or what is closest to them at a lower rank.

    Raises:
        ConfigError: the rank is too large for a weight.
    """
    ledger, adapter = run.ledger, run.ledger.adapter
    model, _ = model_with(run.model, ledger.weights)
    if run.head and not models.has_text_tower(model.config):
        raise ConfigError(
            "--as adapter: the run trained the model's classifier, which an adapter does not hold: take --as merged"
        )
    save_head(run, model, folder)
    selected = select_modules(model, run.config.adapter.target_modules)
    names = names_of(model, selected)
    rank = rank_of(run, options, {name: shape_of(selected[path]) for path, name in names.items()})
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if models.kind_of(run.model, model.config) == "text" else None,
        "base_model_name_or_path": shown_name(ledger.base.name),
        "revision": ledger.base.revision,
        "r": rank,
        "lora_alpha": adapter.scaling * rank if options.rank is None else rank,
        "use_rslora": False,
        "use_dora": bool(run.magnitudes),
        "target_modules": peft_targets(run.config.adapter.target_modules, selected),
        "inference_mode": True,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    prefixes = {name: f"base_model.model.{path}.lora_" for path, name in names.items()}
    wanted = {f"{prefixes[name]}magnitude_vector": magnitude for name, magnitude in run.magnitudes.items()}
    errors: dict[str, float] = {}
    for name, pair in joined_pairs(run):
        if options.rank is not None:
            pair, errors[name] = truncated(pair, adapter.scaling, rank)
        wanted |= {f"{prefixes[name]}A.weight": pair.A, f"{prefixes[name]}B.weight": pair.B}
    infinite = [key for key, tensor in wanted.items() if not torch.isfinite(tensor).all()]
    if infinite:
        raise LedgerError(f"{ledger.directory}: {infinite[0]} of the adapter holds a number that is not finite")
    write_tensors(folder / ADAPTER_WEIGHTS, layout_of(wanted), wanted.__getitem__, {"format": "pt"})
    facts = {"noise": noise_left_out(run), "rank": f"{rank}, all of {run.expert} x {adapter.rank}"}
    if errors:
        worst = max(errors, key=errors.__getitem__)
        facts["rank"] = (
            f"{rank} of {run.expert} x {adapter.rank}; relative Frobenius error of what the experts add: mean"
            f" {sum(errors.values()) / len(errors):.3g}, worst {errors[worst]:.3g} ({worst})"
        )
    return facts


def rank_of(run: ExportedRun, options: ExportOptions, shapes: Mapping[str, tuple[int, int]]) -> int:
    """The rank of the adapter.

    Raises:
        ConfigError: a weight cannot have it.
    """
    each, experts = run.ledger.adapter.rank, run.expert
    rank = options.rank or experts * each
    for name, shape in shapes.items():
        most = min(*shape, experts * each)
        if options.rank is None and rank > most:
            raise ConfigError(
                f"--as adapter: {experts} experts of rank {each} make rank {rank}, but {name} of {shape} has {most} at"
                f" most: take --as svd with --rank 1 to {most}, or --as merged"
            )
        if rank > most:
            raise ConfigError(
                f"--rank is {rank}, but {experts} experts of rank {each} on {name} of {shape} have {most} at most: give"
                f" 1 to {most}"
            )
    return rank


def compared(run: ExportedRun, options: ExportOptions, folder: Path) -> Facts:
    """How far the export, loaded as a user does, is from the live model; or why that was not measured.

    Raises:
        RunError: it was asked for and cannot be.
    """
    if options.compare is False:
        return {"measured": "nothing, as --compare false asks"}
    if options.compare is None and not room_for_two(run.model):
        return {
            "measured": "nothing, since memory has no room for the model twice; --compare true measures all the same"
        }
    try:
        found = compare(run, loader(run, options.kind, folder))
    except RunError as error:
        if options.compare:
            raise
        print(f"note      not measured: {error}")
        return {"measured": "nothing, since the model or the data could not be read; --compare true says why"}
    return {
        "measured": f"against the live model on dev: logits differ by at most {found.change:.3g} of their standard"
        f" deviation, loss {found.loss:.6g} instead of {found.live_loss:.6g}"
    }


def loader(run: ExportedRun, kind: str, folder: Path) -> Callable[[], nn.Module]:
    """Loads the export as a user does."""

    def merged() -> nn.Module:
        return models.load_model(run.model.model_copy(update={"name_or_path": str(folder), "revision": None}))

    return merged if kind == "merged" else lambda: with_adapter(models.load_model(run.model), folder)
