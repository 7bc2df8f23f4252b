"""Questions about images as tokens: the places of images widened by the model's processor, the answer scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lorasc_ds.chat import common_length
from lorasc_ds.encoded import EncodedExample, Visuals
from lorasc_ds.errors import ConfigError, DataError
from lorasc_ds.images import Unreadable
from lorasc_ds.tasks import Example

if TYPE_CHECKING:
    from lorasc_ds.encoding import Encoder


def encode_image_text(encoder: Encoder, examples: Sequence[Example]) -> list[EncodedExample]:
    """Rows without those whose images cannot be decoded, which `Encoder.unreadable` says; or they end the run.

    Raises:
        ConfigError: the model reads no images.
        DataError: a row cannot be used.
    """
    encoded = []
    for example in examples:
        try:
            encoded.append(encode(encoder, example))
        except Unreadable as error:
            if encoder.task.unreadable == "refuse":
                raise DataError(f"{example.id}: {error}; mend the image, or set task.unreadable skip") from error
            encoder.unreadable.append(Unreadable(example.id, str(error)))
    return encoded


def encode(encoder: Encoder, example: Example) -> EncodedExample:
    """One row. Scored is what its tokens gain over the prompt's; a token in which both meet is the answer's.

    Where there are images nothing is cut: their tokens and pixels belong together.
    """
    prompt, whole, closed = texts_of(encoder, example)
    bos = encoder.tokenizer.bos_token
    special = not (bos and prompt.startswith(str(bos)))  # a chat template may have put it there
    asked, full = (encoder.without_end(ids) for ids in encoder.encode_texts([prompt, whole], special))
    full = full if closed else [*full, *encoder.end]
    common = common_length(asked, full)
    scored, seen = len(full) - common, None
    if example.images:
        assert encoder.processor is not None
        widened, seen = encoder.processor.tokens(prompt, example.images, special)
        widened = encoder.without_end(widened)
        seam = len(widened) - len(asked) + common
        if widened[seam:] != asked[common:]:
            raise DataError(f"{example.id}: the processor changes the end of the prompt; set task.template to another")
        asked, full = widened, [*widened[:seam], *full[common:]]
        if encoder.limit is not None and len(full) > encoder.limit:
            raise DataError(
                f"{example.id}: {len(full)} tokens, but there is room for {encoder.limit}, and a row with images is not"
                " cut: raise training.max_length, lower task.max_new_tokens, or give it fewer or smaller images"
            )
    encoder.check_vocabulary(full, example.id)
    target = encoder.truncate(full, scored, example.id)
    if encoder.limit is not None:
        asked = encoder.cut(asked, min(len(asked), encoder.limit))
    return EncodedExample(
        example.id,
        (replace(target, visuals=None if seen is None else continued(encoder, seen, len(full) - scored, scored)),),
        (0,),
        prompt=tuple(asked),
        source=example,
        group=example.group,
        cut=len(full) - len(target.ids),
        visuals=seen,
    )


def texts_of(encoder: Encoder, example: Example) -> tuple[str, str, bool]:
    """The prompt, the prompt with the answer, and whether a chat template closed that.

    Raises:
        ConfigError: the model reads no images, or by its chat template a chat does not begin with its prompt.
    """
    processor = encoder.processor
    if processor is None:
        if example.images:
            raise ConfigError(
                f"task {encoder.task.name} has images, but the model of model.name_or_path reads text alone: name a"
                " vision-language model (with model.kind image_text where it is known as a language model too), or set"
                " task.use_images false"
            )
        return example.prompt, example.texts[0], False
    if not (example.messages and processor.has_template):
        return processor.placed(example.prompt), processor.placed(example.texts[0]), False
    prompt = processor.rendered(example.messages[:-1], example.id, answering=True)
    whole = processor.rendered(example.messages, example.id, answering=False)
    if not whole.startswith(prompt):
        raise ConfigError(
            f"task.template is null, but {example.id}: by the chat template of model.name_or_path the chat does not"
            " begin with what an answer is generated from: set task.template"
        )
    if whole.rstrip().endswith(example.messages[-1]["content"]):
        return prompt, whole.rstrip(), False
    return prompt, whole, True


def continued(encoder: Encoder, seen: Visuals, length: int, scored: int) -> Visuals:
    """Of the first `length` tokens of a prompt and the scored ones after them."""
    assert encoder.processor is not None
    kinds = ((name, (*of[:length], *[encoder.processor.kind_of_answers(name)] * scored)) for name, of in seen.kinds)
    return replace(seen, kinds=tuple(kinds))
