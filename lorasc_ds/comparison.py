"""How far an exported model is from the live one: logits and loss on the run's dev split, both loaded as users do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil
import torch
from torch import Tensor, nn

from lorasc_ds import models
from lorasc_ds.cascade import relative_change
from lorasc_ds.config import ModelConfig
from lorasc_ds.evaluation import evaluate, evaluation_mode, for_the_loss_alone
from lorasc_ds.exported_run import ExportedRun, Replay
from lorasc_ds.objectives import scored_logits
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
        for name in sorted(replay.changed):
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
    live_logits, live_loss = measured(live_model(run).to(device), preparation, device)
    logits, loss = measured(load().to(device), preparation, device)
    return Comparison(relative_change(live_logits, logits), live_loss, loss)


def measured(model: nn.Module, preparation: Preparation, device: torch.device) -> tuple[Tensor, float]:
    """Logits of a few dev examples, float32 of (tokens, vocabulary), and the loss on all of them."""
    dev, task, data = preparation.splits["dev"], preparation.task, preparation.data
    with evaluation_mode(model):
        logits = scored_logits(model, data.collate(dev[:EXAMPLES]).last_scored(TOKENS).to(device))
    scores = evaluate(
        model,
        task,
        {"dev": for_the_loss_alone(dev, task)},
        batch_size=preparation.config.training.eval_batch_size,
        layout=data.layout,
        processes=Processes(0, 1, device),
    )
    return logits.cpu(), scores["dev"]["loss"]
