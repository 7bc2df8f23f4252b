"""Vision-language models of other kinds: what they are given, and score, is what transformers' own call makes of a row."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from lorasc_ds.data import Layout, collate
from lorasc_ds.encoded import EncodedExample
from lorasc_ds.encoding import Encoder
from lorasc_ds.evaluation import check_images
from lorasc_ds.generation import Generator
from lorasc_ds.image_task_config import ImageTextConfig
from lorasc_ds.objectives import token_log_probabilities
from lorasc_ds.processing import ImageTextProcessor
from lorasc_ds.tasks import Task, load_task

WORDS = ["which", "digit", "is", "it", "?", "yes", "no", "4", "7", "user", "assistant"]
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**TOWER, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3}
SIGLIP = {**TOWER, "model_type": "siglip_vision_model", "image_size": 16}


def make_tokenizer(special: list[str], **named: str) -> Any:
    """A word each; special tokens first, some of them known by a name."""
    words = ["<s>", "</s>", "<unk>", "<pad>", *special, *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    found = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens=named,
    )
    found.add_tokens([AddedToken(one, special=True) for one in special], special_tokens=True)
    return found


Made = tuple[Any, Any]  # configuration and processor


def llava_next() -> Made:
    """Tiles of an image, as many as its shape needs."""
    tokenizer = make_tokenizer(["<image>"])
    tiles = [[16, 32], [32, 16], [32, 32]]
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=tiles
    )
    processor = hf.LlavaNextProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER, image_size=16, patch_size=8),
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        image_token_id=processor.image_token_id,
        image_grid_pinpoints=tiles,
    )
    return config, processor


def idefics3() -> Made:
    """Rows and columns of tiles, padded to the most of a batch, with tokens between them."""
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    named = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    tokenizer = make_tokenizer([*named.values(), *tiles], **named)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = hf.Idefics3Processor(images, tokenizer, image_seq_len=1)
    config = hf.Idefics3Config(
        vision_config={**TOWER, "image_size": 16, "patch_size": 8},
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return config, processor


def qwen2_vl() -> Made:
    """Pixels of all images end to end, positions in three dimensions, and a chat template."""
    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer = make_tokenizer(special)
    processor: Any = hf.Qwen2VLProcessor.__new__(hf.Qwen2VLProcessor)  # made whole, it wants torchvision for videos
    processor.tokenizer, processor.video_processor = tokenizer, None
    processor.image_processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
    )
    processor.chat_template = (
        "{% for m in messages %}{{ m.role }} {% for part in m.content %}{% if part.type == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }} {% endif %}{% endfor %}"
        "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    image, video, start, end = tokenizer.convert_tokens_to_ids(special)
    processor.image_token, processor.image_token_id = special[0], image
    processor.video_token, processor.video_token_id = special[1], video
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = hf.Qwen2VLConfig(
        text_config={**TEXT, "vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    return config, processor


def paligemma() -> Made:
    """A prompt whose tokens see each other, before an answer whose tokens do not."""
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = 4
    processor = hf.PaliGemmaProcessor(images, make_tokenizer(["<image>"]))
    text = {**TEXT, "model_type": "gemma", "head_dim": 8, "vocab_size": len(processor.tokenizer)}
    config = hf.PaliGemmaConfig(
        vision_config={**SIGLIP, "patch_size": 8},
        text_config=text,
        image_token_index=processor.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    return config, processor


def gemma3() -> Made:
    """Tokens of an image that see each other."""
    named = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<img>"}
    tokenizer = make_tokenizer([*named.values()], **named)
    processor = hf.Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 16, "width": 16}), tokenizer, image_seq_length=4
    )
    begin, end, image = tokenizer.convert_tokens_to_ids([*named.values()])
    config = hf.Gemma3Config(
        vision_config={**SIGLIP, "patch_size": 4},
        text_config={**TEXT, "vocab_size": len(tokenizer), "head_dim": 8, "sliding_window": 64},
        image_token_id=image,
        boi_token_index=begin,
        eoi_token_index=end,
        mm_tokens_per_image=4,
    )
    return config, processor


ROWS = [
    {"image": "small.png", "question": "which digit is it ?", "answer": "yes no 7"},
    {"image": "wide.png", "question": "is it 4 ?", "answer": "no yes"},
    {"image": "wide.png", "question": "which digit is it ?", "answer": "yes no 7"},
]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    for name, shape in (("small", (16, 16, 3)), ("wide", (20, 40, 3))):
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(folder / f"{name}.png")
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings: Any = {"train_file": str(file), "eval_file": str(file), "max_new_tokens": 5}
    return load_task(ImageTextConfig(name="image_text", **settings), 0)


def make_model(config: Any) -> Any:
    """Random, with weights so large that every input shows in the logits; nothing ends an answer."""
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = None
    return model


def direct(model: Any, reader: ImageTextProcessor, one: EncodedExample, answer: str) -> tuple[list[int], torch.Tensor]:
    """The ids of a row, and the log-probabilities of its answer, by transformers alone."""
    assert one.source is not None
    processor, count = reader.processor, one.target.scored
    images = [[Image.open(image.path).convert("RGB") for image in one.source.images]]
    prompt = one.source.prompt.replace("<image>", processor.image_token)
    if processor.chat_template:
        content = [
            {"type": "image"},
            {"type": "text", "text": one.source.messages[0]["content"].removeprefix("<image>")},
        ]
        chat = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    if isinstance(processor, hf.PaliGemmaProcessor):
        given = dict(processor(images=images, text=[prompt], suffix=answer))
        del given["labels"]
        given = {name: torch.from_numpy(np.array(value)) for name, value in given.items()}
    else:
        given = dict(processor(images=images, text=[prompt], return_tensors="pt"))
        ids = torch.tensor([[*processor.tokenizer(answer, add_special_tokens=False)["input_ids"], 1]])
        for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
            if name in given:
                added = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}.get(name, torch.zeros_like(ids))
                given[name] = torch.cat([given[name], added], dim=1)
    ids = given["input_ids"][0].tolist()
    with torch.no_grad():
        logits = model(**given).logits[0, -count - 1 : -1]
    return ids, logits.float().log_softmax(-1)[range(count), ids[-count:]]


@pytest.mark.parametrize("make", [llava_next, idefics3, qwen2_vl, paligemma, gemma3])
def test_tokens_scores_and_answers_are_the_model_s_own(make: Callable[[], Made], task: Task) -> None:
    """Each row by itself against a direct call, and all together against each by itself."""
    config, processor = make()
    model = make_model(config)
    reader = ImageTextProcessor(processor, model)
    size = len(processor.tokenizer)
    encoder = Encoder(
        processor.tokenizer, task, max_length=None, model_limit=512, vocabulary_size=size, processor=reader
    )
    encoded = list(encoder.encode()["train"])
    layout = Layout(encoder.pad_id, pixels=encoder.pixels)

    def scores(examples: list[EncodedExample]) -> torch.Tensor:
        batch = collate([one.candidates for one in examples], [0] * len(examples), layout)
        with torch.no_grad():
            return token_log_probabilities(model, batch)

    alone = []
    for one, row in zip(encoded, ROWS, strict=True):
        ids, expected = direct(model, reader, one, row["answer"])
        assert list(one.target.ids) == ids
        assert one.target.scored == len(row["answer"].split()) + 1
        alone.append(scores([one]))
        assert alone[-1] == pytest.approx(expected, abs=1e-5)
        check_images(model, collate([one.candidates], [0], layout))
    assert scores(encoded) == pytest.approx(torch.cat(alone), abs=1e-5)
    assert (alone[0] - alone[2]).abs().max() > 1e-2, "the image makes no difference"
    assert task.generation is not None
    generator = Generator(model, processor.tokenizer, task.generation, layout=layout)
    generator.ends = set()
    assert generator(encoded, range(3)) == [generator([one], [0])[0] for one in encoded]
