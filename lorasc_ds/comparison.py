"""How far an exported model is from the live one: logits and loss on the run's dev split, both loaded as users do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorasc_ds import models
from lorasc_ds.cascade import relative_change
from lorasc_ds.classifier import make_rows, with_head
from lorasc_ds.config import ModelConfig
from lorasc_ds.evaluation import evaluate, evaluation_mode, for_the_loss_alone
from lorasc_ds.exported_run import ExportedRun, Replay
from lorasc_ds.image_reading import ImageReading
from lorasc_ds.objectives import probe_logits
from lorasc_ds.preparation import Preparation, prepare
from lorasc_ds.pretrained import saved_tensors
from lorasc_ds.sharding import Processes

EXAMPLES = 4
TOKENS = 256


@dataclass(frozen=True, slots=True)
class Comparison:
    """On the dev split of the run.

    Args:
        change: max |Δ logit| / std(logits) over the last scored tokens of a few examples.
        live_loss, loss: of the live model and of the exported one.
    """

    change: float
    live_loss: float
    loss: float


def room_for_two(config: ModelConfig) -> bool:
    """Whether memory has room for the model twice."""
    return 2 * bytes_of(models.load_shape(config)) < psutil.virtual_memory().available


def bytes_of(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def device_for(model: nn.Module) -> torch.device:
    """A GPU that has room for the model and half as much again, or else the CPU."""
    fits = torch.cuda.is_available() and 1.5 * bytes_of(model) < torch.cuda.mem_get_info()[0]
    return torch.device("cuda" if fits else "cpu")


def live_model(run: ExportedRun) -> nn.Module:
    """The model as the run had it after its expert: noise included, whatever was exported."""
    model = models.load_model(run.model)
    tensors = saved_tensors(model)
    replay = Replay(replace(run, noise=True), tensors.__getitem__)
    with torch.no_grad():
        head = [name for name in tensors if name.startswith(models.CLASSIFIER)] if run.head else []
        for name in [*sorted(replay.changed), *head]:
            tensors[name].copy_(replay(name))
    replay.finish()
    return model


def compare(run: ExportedRun, load: Callable[[], nn.Module]) -> Comparison:
    """Measure both, one after the other; on a GPU, if there is one with room.

    Args:
        load: the exported model, as a user loads it.

    Raises:
        RunError: the run's data are not there any more.
    """
    preparation = prepare(run.config.model_copy(update={"model": run.model}))
    device = device_for(preparation.shape)

    def of(model: nn.Module) -> tuple[Tensor, float]:
        model.to(device)
        return measured(network_of(cast(PreTrainedModel, model), run, preparation), preparation, device)

    live_logits, live_loss = of(live_model(run))
    logits, loss = of(load())
    return Comparison(relative_change(live_logits, logits), live_loss, loss)


def network_of(model: PreTrainedModel, run: ExportedRun, preparation: Preparation) -> nn.Module:
    """What makes logits of the run's examples: the model, of images with the run's head."""
    reading = preparation.reading
    if not isinstance(reading, ImageReading):
        return model
    scored = replace(reading, classes=replace(reading.classes, train_head=False))
    network = scored.network(model)
    if run.head and reading.head == "prototypes":
        return with_head(network, run.head)
    make_rows(network, network)
    return network


def measured(model: nn.Module, preparation: Preparation, device: torch.device) -> tuple[Tensor, float]:
    """Logits of a few dev examples, float32 of (tokens, vocabulary), and the loss on all; without dev, of test."""
    task = preparation.task
    split = task.evaluation_splits[0]
    with evaluation_mode(model):
        logits = probe_logits(model, preparation.reading.probe(split, EXAMPLES, TOKENS).to(device))
    scores = evaluate(
        model,
        task,
        {split: for_the_loss_alone(preparation.splits[split], task)},
        batch_size=preparation.config.training.eval_batch_size,
        layout=preparation.reading.layout,
        processes=Processes(0, 1, device),
    )
    return logits.cpu(), scores[split]["loss"]
