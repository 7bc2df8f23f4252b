"""Answers that a model generates, many prompts at a time: each answer is the one that its prompt alone would give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lorasc_ds.encoded import EncodedExample
from lorasc_ds.layout import Layout
from lorasc_ds.order import derived_seed
from lorasc_ds.tasks import Generation
from lorasc_ds.visuals import image_inputs


class Generator:
    """Generates by `Generation`'s settings; greedy, or by sampling that depends on the seed and the example alone.

    Args:
        model: the module whose weights may be cut up, in evaluation mode when it is called.
        layout: its `pad_id` fills prompts up at their beginning, masked.
        synced: whether every process takes part in every step of every other, as ZeRO-3 needs.
        seed: of sampling.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        generation: Generation,
        *,
        layout: Layout,
        synced: bool = False,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.generation = generation
        self.layout = layout
        self.pad_id = layout.pad_id
        self.synced = synced
        self.seed = seed
        self.ends = ids_of(tokenizer.eos_token_id) | ids_of(getattr(model.generation_config, "eos_token_id", None))

    def __call__(self, examples: Sequence[EncodedExample], positions: Sequence[int]) -> list[list[int]]:
        """The token ids of an answer to each prompt, what ends it included.

        Args:
            positions: of the examples in their split, which sampling is seeded by.
        """
        settings = self.generation
        length = max(len(example.prompt) for example in examples)
        device = self.model.device
        rows = [[self.pad_id] * (length - len(e.prompt)) + list(e.prompt) for e in examples]
        mask = [[0] * (length - len(e.prompt)) + [1] * len(e.prompt) for e in examples]
        processors = LogitsProcessorList()
        if settings.temperature:
            processors.append(Sampling(settings.temperature, [derived_seed(self.seed, at) for at in positions]))
        plain = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=settings.max_new_tokens,
            pad_token_id=self.pad_id,
            eos_token_id=sorted(self.ends) or None,
        )
        images = image_inputs([example.visuals for example in examples], length, self.layout.pixels, padded_left=True)
        own, self.model.generation_config = self.model.generation_config, plain  # the model's own sampling, penalties
        try:
            generated = cast(Any, self.model).generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([Stop(self, length)]),
                synced_gpus=self.synced,
                **{name: one.to(device) for name, one in images.items()},
            )
        finally:
            self.model.generation_config = own
        return [self.ended(answer) for answer in generated[:, length:].tolist()]

    def text(self, answer: Sequence[int]) -> str:
        """The answer up to the first stop, without special tokens."""
        text = str(self.tokenizer.decode(list(answer), skip_special_tokens=True))
        found = [text.index(stop) for stop in self.generation.stop if stop in text]
        return text[: min(found, default=len(text))]

    def stopped(self, answer: Sequence[int]) -> bool:
        text = str(self.tokenizer.decode(list(answer), skip_special_tokens=True))
        return any(stop in text for stop in self.generation.stop)

    def ended(self, answer: list[int]) -> list[int]:
        """Without what fills a row up after the answer has ended."""
        for at, id in enumerate(answer):
            if id in self.ends:
                return answer[: at + 1]
            if id == self.pad_id and self.stopped(answer[:at]):
                return answer[:at]
        return answer


def ids_of(special: Any) -> set[int]:
    return set() if special is None else {special} if isinstance(special, int) else set(special)


class Stop(StoppingCriteria):
    """Ends each row whose answer holds a stop."""

    def __init__(self, generator: Generator, prompt_length: int) -> None:
        self.generator = generator
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        answers = input_ids[:, self.prompt_length :].tolist()
        return torch.tensor([self.generator.stopped(answer) for answer in answers], device=input_ids.device)


class Sampling(LogitsProcessor):
    """Turns the greedy choice into a sample at a temperature: noise of Gumbel's distribution, each row its own."""

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.stack([torch.rand(scores.shape[1], generator=one) for one in self.generators])
        gumbel = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float32).tiny)))
        return scores.float() / self.temperature + gumbel.to(scores.device)
