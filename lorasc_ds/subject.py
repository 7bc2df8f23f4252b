"""What is scored: a model, an adapter on one, or a run at one of its experts; and its weights in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorasc_ds import models
from lorasc_ds.adapters import other_matrices, with_adapter
from lorasc_ds.classifier import HEAD_FILE, classes_of_head, read_head
from lorasc_ds.config import ModelConfig
from lorasc_ds.errors import ConfigError
from lorasc_ds.evaluate_options import EvaluateOptions
from lorasc_ds.exported_run import ExportedRun, Replay, open_run
from lorasc_ds.preparation import Reading
from lorasc_ds.pretrained import open_pretrained
from lorasc_ds.sharding import Launch, overwriting, place, sharded_loading


@dataclass(frozen=True, slots=True)
class Subject:
    """What is scored.

    Args:
        description: of it, for the table and the record.
        model: whose files are loaded.
        adapter: folder of a PEFT adapter that is put on it.
        run: whose ledger is replayed onto it.
        head: of an image model's text prototypes, as a run trained it: `weight` and `bias`; {} where none did.
        classes: what the outputs of that head, or of the run's classifier, stand for; None: as the model says.
    """

    description: str
    model: ModelConfig
    adapter: Path | None = None
    run: ExportedRun | None = None
    head: Mapping[str, Tensor] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None


def subject_of(options: EvaluateOptions) -> Subject:
    """
    Raises:
        ConfigError: there is no such expert, or flags do not fit the subject.
        LedgerError: the run's ledger is damaged.
    """
    folder = Path(options.subject)
    is_run, is_adapter = (folder / "config.yaml").is_file(), (folder / "adapter_config.json").is_file()
    if options.expert is not None and not is_run:
        raise ConfigError(f"--expert {options.expert}: {options.subject} is no run directory; leave --expert out")
    if options.base is not None and not is_adapter:
        raise ConfigError(f"--base {options.base}: {options.subject} is no PEFT adapter; leave --base out")
    dtype: Literal["float32", "bfloat16"] = options.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    if is_run:
        return run_of(options, folder)
    name = (options.base or base_of(folder)) if is_adapter else options.subject
    model = ModelConfig(
        name_or_path=name, revision=options.revision, dtype=dtype, trust_remote_code=options.trust_remote_code
    )
    if is_adapter:
        return with_head_of(folder, Subject(f"adapter {folder} on {name}", model, adapter=folder))
    return with_head_of(folder, Subject(f"model {name}", model))


def with_head_of(folder: Path, subject: Subject) -> Subject:
    """With the head that was trained, where one lies in the folder.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        head = read_head(folder)
        if not head:
            return subject
        classes = classes_of_head(folder)
        rows = len(head["weight"])
        if head["bias"].shape != (rows,) or len(classes) not in (0, rows):
            raise ValueError(f"{rows} rows, {len(head['bias'])} biases and {len(classes)} names of classes")
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{folder / HEAD_FILE} cannot be read: {error!r}; export the run again") from error
    return replace(subject, description=f"{subject.description}, with its trained head", head=head, classes=classes)


def base_of(adapter: Path) -> str:
    """The model that an adapter says it belongs to."""
    try:
        name = json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{adapter / 'adapter_config.json'} cannot be read: {error}; give a whole adapter") from error
    if not name:
        raise ConfigError(f"{adapter / 'adapter_config.json'} names no base model: give --base")
    return name


def run_of(options: EvaluateOptions, folder: Path) -> Subject:
    """A run as it ships, or after the expert that is asked for."""
    if options.revision is not None:
        raise ConfigError(f"--revision {options.revision}: {folder} is a run, which knows its model's; leave it out")
    run = open_run(folder, options.expert, noise=True)
    if options.dtype not in (None, run.model.dtype):
        raise ConfigError(
            f"--dtype {options.dtype}: the weights of {folder} are {run.model.dtype}; leave --dtype out, or export it"
        )
    shipped = folder / "model"
    if options.expert is None and run.summary is not None and (shipped / "config.json").is_file():
        model = run.model.model_copy(update={"name_or_path": str(shipped), "revision": None})
        return with_head_of(shipped, Subject(f"run {folder}, as it ships ({run.summary['shipped']['select']})", model))
    description = f"run {folder}, after expert {run.expert} of {len(run.ledger.experts)}"
    beside = run.head and models.has_text_tower(models.load_architecture(run.model))
    head = run.head if beside else {}
    return Subject(description, run.model, run=run, head=head, classes=run.ledger.classes or None)


def load(
    subject: Subject, launch: Launch, accelerator: Accelerator, reading: Reading | None
) -> tuple[PreTrainedModel, nn.Module, nn.Module]:
    """The model with its weights, the network of it, and what a forward pass goes through: under ZeRO-3 an engine.

    Args:
        reading: says what the network is; None: the model itself.

    Raises:
        ConfigError: it cannot be loaded.
        LedgerError: the run's ledger does not belong to it.
    """
    with sharded_loading(launch, accelerator, subject.model.dtype):
        model = models.load_model(subject.model)
    if subject.run is not None:
        replay_onto(model, subject.run, launch)
    if subject.adapter is not None:
        with models.loading(f"the adapter {subject.adapter}", subject.model):
            model = cast(PreTrainedModel, cast(Any, with_adapter(model, subject.adapter)).get_base_model())
    network = (model if reading is None else reading.network(model)).eval().requires_grad_(False)
    return model, network, place(accelerator, launch, network)


def replay_onto(model: PreTrainedModel, run: ExportedRun, launch: Launch) -> None:
    """Set the weights that the run changed to what they were after its expert, one at a time."""
    ledger = run.ledger
    parameters = other_matrices(model, [])
    for name, parameter in model.named_parameters():
        if name.startswith(models.CLASSIFIER) and run.head:
            with overwriting(launch, parameter) as mine, torch.no_grad():
                if mine:
                    parameter.copy_(run.head[name.removeprefix(models.CLASSIFIER)])
    replay: Replay | None = None
    if launch.stage != 3 or launch.rank == 0:
        replay = Replay(run, open_pretrained(run.model, {*ledger.weights, *ledger.noised}).tensor)
    for name in sorted({*ledger.weights, *ledger.noised}):
        with overwriting(launch, parameters[name]) as mine, torch.no_grad():
            if mine and replay is not None:
                parameters[name].copy_(replay(name))
    if replay is not None:
        replay.finish()
