"""Chats as tokens by the tokenizer's own template, and which of the tokens are the assistant's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lorasc_ds.errors import ConfigError, DataError
from lorasc_ds.tasks import Example, Message

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a template that says itself what the assistant's is


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """
    Raises:
        ConfigError: the tokenizer has none.
    """
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise ConfigError(
            "task.template chat, which rows with messages take, needs a tokenizer with a chat template, and that of"
            " model.name_or_path has none: name a model that has one, put a chat_template.jinja into its folder, or"
            " give rows with instruction, input and output"
        ) from error


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, example: Example, mask_prompt: bool
) -> tuple[list[int], list[bool]]:
    """A chat's tokens, and of each whether it is scored: all, or what the assistant says.

    The template alone puts special tokens, so that a first one does not stand twice. The assistant's tokens are those
    that the template marks, or that a chat gains over what stands before: a token in which both meet is scored.

    Raises:
        ConfigError: the tokenizer has no chat template, or one by which the assistant's tokens cannot be found.
        DataError: the template refuses the messages.
    """
    marks = GENERATION_MARK.search(chat_template(tokenizer)) is not None

    def render(messages: Sequence[Message], **settings: Any) -> Any:
        try:
            return tokenizer.apply_chat_template(list(messages), **settings)
        except (TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{example.id}: the tokenizer's chat template refuses the messages ({reason}); mend the row"
            ) from error

    if mask_prompt and marks:
        found = render(example.messages, return_dict=True, return_assistant_tokens_mask=True)
        return list(found["input_ids"]), [bool(one) for one in found["assistant_masks"]]

    def tokens(text: str) -> list[int]:
        return cast(list[int], tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def spans(whole: str, ids: list[int]) -> Iterator[range]:
        """The tokens of every message of the assistant."""
        for at, message in enumerate(example.messages):
            if message["role"] != "assistant":
                continue
            before = render(example.messages[:at], tokenize=False, add_generation_prompt=True)
            through = render(example.messages[: at + 1], tokenize=False)
            if not (whole.startswith(through) and through.startswith(before)):
                raise ConfigError(
                    f"task.mask_prompt is true, but {example.id}: by the tokenizer's chat template message {at + 1} of"
                    f" {len(example.messages)} does not begin or end as in the whole chat, so that its tokens cannot be"
                    " found: set mask_prompt false, or take a template with {% generation %} marks"
                )
            yield range(*(common_length(ids, tokens(text)) for text in (before, through)))

    text = render(example.messages, tokenize=False)
    ids = tokens(text)
    if not mask_prompt:
        return ids, [True] * len(ids)
    scored = {at for span in spans(text, ids) for at in span}
    return ids, [at in scored for at in range(len(ids))]


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
