"""A vision-language model's own processor: texts with images as tokens, and images as pixels."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from lorasc_ds import models
from lorasc_ds.config import ModelConfig
from lorasc_ds.encoded import Visuals
from lorasc_ds.errors import ConfigError, DataError
from lorasc_ds.images import Unreadable, rgb_image
from lorasc_ds.tasks.base import ImageSource, Message
from lorasc_ds.tasks.image_text import IMAGE
from lorasc_ds.tasks.images import StoredImage

KINDS = ("token_type_ids", "mm_token_type_ids")


class ImageTextProcessor:
    """A processor for one model.

    Args:
        model: laid out on any device; its forward pass says which kinds of tokens it wants to know.

    Raises:
        ConfigError: the model reads images by other means than tokens in their places.
    """

    def __init__(self, processor: ProcessorMixin, model: PreTrainedModel) -> None:
        self.processor: Any = processor
        inputs = inspect.signature(model.forward).parameters
        token = getattr(processor, "image_token", None)
        if token is None or "cross_attention_mask" in inputs:
            raise ConfigError(
                f"model.name_or_path: {type(model).__name__} does not read images as tokens among those of the text;"
                " take a model that does, as LLaVA, Idefics3, PaliGemma, Gemma 3 or Qwen-VL"
            )
        self.token = str(token)
        self.kinds = [name for name in KINDS if name in inputs]

    @property
    def has_template(self) -> bool:
        return bool(self.processor.chat_template)

    def kind_of_answers(self, name: str) -> int:
        """Of the tokens of an answer: text. PaliGemma's text is 0 before the answer, where tokens see each other."""
        suffix = "suffix" in inspect.signature(self.processor.__call__).parameters
        return int(suffix and name == "token_type_ids")

    def placed(self, text: str) -> str:
        """The text with the model's own token where an image stands."""
        return text.replace(IMAGE, self.token)

    def rendered(self, messages: Sequence[Message], where: str, *, answering: bool) -> str:
        """A chat by the processor's template.

        Args:
            where: id of the example, for errors.
            answering: whether the assistant speaks next.

        Raises:
            DataError: the template refuses the messages.
        """

        def parts(content: str) -> list[dict[str, str]]:
            first, *texts = content.split(IMAGE)
            found = [{"type": "text", "text": first}]
            for text in texts:
                found += [{"type": "image"}, {"type": "text", "text": text}]
            return [part for part in found if part.get("text") != ""]

        chat = [{"role": message["role"], "content": parts(message["content"])} for message in messages]
        try:
            return str(self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=answering))
        except (TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{where}: the processor's chat template refuses the messages ({reason}); set task.template"
            ) from error

    def tokens(self, text: str, images: Sequence[ImageSource], special: bool) -> tuple[list[int], Visuals]:
        """Token ids of a text whose images take the places that `placed` or `rendered` left them.

        Args:
            special: whether the tokenizer adds its special tokens.

        Raises:
            Unreadable: an image cannot be decoded.
        """
        held = [held_in_memory(image) for image in images]
        settings = {"add_special_tokens": special, "return_token_type_ids": "token_type_ids" in self.kinds}
        found = self.processor(images=[list(map(rgb_image, held))], text=[text], **settings)
        kinds = tuple((name, tuple(map(int, found[name][0]))) for name in self.kinds if name in found)
        sha256 = hashlib.sha256("".join(hashlib.sha256(one.content).hexdigest() for one in held).encode()).hexdigest()
        return list(map(int, found["input_ids"][0])), Visuals(tuple(images), sha256, kinds)

    def __call__(self, rows: Sequence[Visuals]) -> dict[str, Tensor]:
        """What the model takes of the images of rows, by name: `pixel_values` and what comes with them.

        Raises:
            DataError: an image cannot be read any more.
        """
        found = self.processor.image_processor(
            images=[list(map(reread, row.images)) for row in rows], return_tensors="pt"
        )
        return {name: value for name, value in found.items() if name not in self.processor.unused_input_names}


def processor_of(config: ModelConfig, model: PreTrainedModel) -> ImageTextProcessor | None:
    """That of a vision-language model, else None.

    Raises:
        ConfigError: it cannot be loaded or used.
    """
    if models.kind_of(config, model.config) != "image_text":
        return None
    return ImageTextProcessor(models.load_processor(config), model)


def held_in_memory(image: ImageSource) -> StoredImage:
    """
    Raises:
        Unreadable: it cannot be read.
    """
    try:
        return StoredImage(image.name, image.read())
    except OSError as error:
        raise Unreadable(image.name, str(error.strerror or error)) from error


def reread(image: ImageSource) -> Image:
    try:
        return rgb_image(image)
    except Unreadable as error:
        raise DataError(f"{error}: it could be read when the run began; give it back") from error
