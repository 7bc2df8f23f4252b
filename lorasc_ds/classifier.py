"""A model of images with the head that makes classes of what it sees (protocols section 6.3)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorasc_ds.errors import ConfigError
from lorasc_ds.images import Preprocessing
from lorasc_ds.models import has_text_tower
from lorasc_ds.sharding import gathered
from lorasc_ds.tasks.base import Classes

Head = Literal["prototypes", "text", "classifier"]
PROMPTS_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of all classes as tokens, class by class.

    Args:
        ids, mask: int64 of (classes * templates, length); the mask is 1 where a text encoder looks.
        templates: how many there are.
    """

    ids: Tensor
    mask: Tensor | None
    templates: int


def prompts_of(classes: Classes, tokenizer: PreTrainedTokenizerBase, length: int, fill: bool = False) -> Prompts:
    """Every class in every template, as the text tower reads them.

    Args:
        length: most tokens of a prompt: the tower's positions.
        fill: pad all to `length` and mask nothing, for a tower that pools the last position; else to the longest.

    Raises:
        ConfigError: a prompt is longer.
    """
    texts = [template.replace("{}", name) for name in classes.names for template in classes.templates]
    padding: dict[str, Any] = {"padding": "max_length", "max_length": length} if fill else {"padding": "longest"}
    encoded: Any = tokenizer(texts, **padding, return_attention_mask=True, verbose=False)
    ids, masks = encoded["input_ids"], encoded["attention_mask"]
    tokens = [sum(mask) for mask in masks]
    most = max(tokens)
    if most > length:
        raise ConfigError(
            f"task.class_names: the prompt {texts[tokens.index(most)]!r} has {most} tokens, more than the text tower's"
            f" {length}: shorten the name, or task.templates"
        )
    return Prompts(torch.tensor(ids), None if fill else torch.tensor(masks), len(classes.templates))


def head_of(classes: Classes, model: PreTrainedModel) -> Head:
    """Which head the task means for this model.

    Raises:
        ConfigError: the model has no such one.
    """
    able = has_text_tower(model.config)
    head = classes.head if classes.head != "auto" else "prototypes" if able else "classifier"
    if able != (head != "classifier"):
        has = "a text tower and no classifier: give prototypes" if able else "no text tower: give classifier"
        raise ConfigError(f"task.head is {head}, but {type(model).__name__} has {has}, or auto")
    if head == "text" and classes.train_head:
        raise ConfigError(
            "task.train_head is true, but task.head text is made of the text tower at every step: set false"
        )
    return head


class ImageClassifier(nn.Module):
    """Logits of an image's classes: what an engine is given in place of the bare model.

    A model with a text tower: `exp(logit_scale) · f/‖f‖ · p`, with `f` the projected image feature and `p` the
    normalised mean of the normalised features of the class's prompts, or a trained row that began so. Others: their
    own classifier.

    Args:
        model: of kind `classes`.
        classes: of the task that is trained or scored first.
        how: gives the mean and the spread that pixels are normalised by.
        prompts: of the classes, where the head is made of text.

    Raises:
        ConfigError: see `head_of`; or the model's classifier is no linear layer.
    """

    def __init__(
        self, model: PreTrainedModel, classes: Classes, how: Preprocessing, prompts: Prompts | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.kind = head_of(classes, model)
        self.scale = 1.0 if self.kind == "classifier" else scale_of(model)
        self.mean, self.std = torch.tensor(how.mean), torch.tensor(how.std)
        self.rows: Tensor | None = None  # of the head, where it is neither trained nor the model's: (classes, features)
        self.bias: Tensor | None = None
        self.prompts: Prompts | None = None
        self.head: nn.Linear | None = None  # that is trained
        if classes.train_head:
            new = self.kind == "prototypes"
            self.head = float32_linear(model, features_of(model), len(classes.names)) if new else own_classifier(model)
        self.turn_to(classes, prompts)

    def turn_to(self, classes: Classes, prompts: Prompts | None) -> None:
        """From now on tell these classes apart; a head made of other texts is to be made anew, by `make_rows`."""
        self.chosen = None if classes.chosen is None else torch.tensor(classes.chosen)
        if self.prompts is None or prompts is None or not torch.equal(self.prompts.ids, prompts.ids):
            self.rows = self.bias = None
        self.prompts = prompts

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parts of the head that are trained."""
        return {} if self.head is None else dict(self.head.named_parameters())

    def train(self, mode: bool = True) -> ImageClassifier:
        if self.kind == "text":
            self.rows = None  # the text tower may have changed
        return super().train(mode)

    def forward(self, pixels: Tensor | None) -> Tensor:
        """
        Args:
            pixels: uint8 of (images, 3, height, width), not normalised. None: the rows of the prompts are wanted, which
                asks the text tower through an engine too.

        Returns:
            float32 of (images, classes): of the task's subset of them, where it has one.
        """
        if pixels is None:
            return self.text_rows()
        mean, std = (one.to(pixels.device)[:, None, None] for one in (self.mean, self.std))
        values = ((pixels.float() / 255 - mean) / std).to(self.model.dtype)
        logits = self.logits_of(values)
        return logits if self.chosen is None else logits[:, self.chosen.to(logits.device)]

    def logits_of(self, values: Tensor) -> Tensor:
        """Of all classes, from normalised pixels."""
        model: Any = self.model
        if self.kind == "classifier":
            return model(pixel_values=values).logits.float()
        features = functional.normalize(model.get_image_features(pixel_values=values).pooler_output.float(), dim=-1)
        if self.head is not None:
            return self.head(features)
        rows = self.rows
        if rows is None:
            rows = self.text_rows()
            if not self.training:
                self.rows = rows
        return functional.linear(features, rows, self.bias)

    def text_rows(self) -> Tensor:
        """`scale` times each class's prototype: float32 of (classes, features)."""
        prompts = self.prompts
        assert prompts is not None
        model: Any = self.model
        device = next(model.parameters()).device
        parts = []
        for at in range(0, len(prompts.ids), PROMPTS_AT_ONCE):
            chosen = slice(at, at + PROMPTS_AT_ONCE)
            mask = None if prompts.mask is None else prompts.mask[chosen].to(device)
            found = model.get_text_features(input_ids=prompts.ids[chosen].to(device), attention_mask=mask)
            parts.append(functional.normalize(found.pooler_output.float(), dim=-1))
        features = torch.cat(parts)
        means = features.view(-1, prompts.templates, features.shape[-1]).mean(dim=1)
        return self.scale * functional.normalize(means, dim=-1)


def float32_linear(model: PreTrainedModel, features: int, classes: int) -> nn.Linear:
    """On the device of the model's parameters, so that a shape stays one."""
    device = next(model.parameters()).device
    return nn.Linear(features, classes, device=device, dtype=torch.float32)


def features_of(model: PreTrainedModel) -> int:
    """Features of an image, beside which texts are embedded."""
    found = getattr(model.config, "projection_dim", None)
    return found if found is not None else model.config.vision_config.hidden_size  # SigLIP projects nothing


HEAD_FILE = "head.safetensors"  # beside a model whose own files have no place for the head


@dataclass(frozen=True, slots=True)
class SavedHead:
    """A trained head of prototypes, beside its model.

    Args:
        parts: `weight`, float32 of (classes, features), with the scale in it, and `bias`, (classes,).
        classes: what their rows stand for.
    """

    parts: Mapping[str, Tensor]
    classes: tuple[str, ...]

    def save_pretrained(self, folder: Path) -> None:
        parts = {part: tensor.detach().cpu().contiguous() for part, tensor in self.parts.items()}
        save_file(parts, folder / HEAD_FILE, {"classes": json.dumps(self.classes)})


def read_head(folder: Path) -> dict[str, Tensor]:
    """The trained head beside a model, {} where there is none."""
    return load_file(folder / HEAD_FILE) if (folder / HEAD_FILE).is_file() else {}


def classes_of_head(folder: Path) -> tuple[str, ...]:
    """What the rows of the head beside a model stand for; () where it does not say."""
    with safe_open(folder / HEAD_FILE, framework="pt") as file:
        return tuple(json.loads((file.metadata() or {}).get("classes", "[]")))


def scale_of(model: Any) -> float:
    """`exp(logit_scale)`; 1 on the meta device."""
    if model.logit_scale.is_meta:
        return 1.0
    return float(model.logit_scale.detach().float().exp())


def own_classifier(model: PreTrainedModel) -> nn.Linear:
    """Put a trained float32 copy in the place of the model's classifier; what it reads is cast.

    Raises:
        ConfigError: it has no linear one.
    """
    found = getattr(model, "classifier", None)
    if not isinstance(found, nn.Linear):
        raise ConfigError(
            f"task.train_head is true, but {type(model).__name__} has no linear layer called classifier: set it false"
        )
    head = float32_linear(model, found.in_features, found.out_features)
    with gathered(list(found.parameters())), torch.no_grad():
        head.weight.copy_(found.weight)
        head.bias.zero_() if found.bias is None else head.bias.copy_(found.bias)
    head.register_forward_pre_hook(lambda layer, inputs: (inputs[0].float(),))
    model.set_submodule("classifier", head)
    return head


def make_rows(
    network: ImageClassifier, engine: nn.Module, write: Callable[[str, Tensor], None] = lambda part, value: None
) -> None:
    """Make prototypes by the live text tower, and write them where they are trained.

    Args:
        engine: what a forward pass of `network` goes through.
        write: sets a part of a trained head, wherever it lives.
    """
    if network.kind != "prototypes" or network.rows is not None:
        return
    training = network.training
    engine.eval()
    with torch.no_grad():
        rows = engine(None)
    engine.train(training)
    if network.head is None:
        network.rows = rows
    else:
        write("weight", rows)
        write("bias", torch.zeros(len(rows), device=rows.device))


def with_head(network: ImageClassifier, head: Mapping[str, Tensor]) -> ImageClassifier:
    """A network that is only scored, with the head that a run trained: (classes, features) and (classes,)."""
    device = next(network.model.parameters()).device
    network.rows, network.bias = head["weight"].to(device), head["bias"].to(device)
    return network
