"""Steps at the shapes of Llama-2-7B and CLIP ViT-bigG/14, random weights: G1 to G4 and G8 to G11.

With `--quick` the same code runs on small shapes, on whatever device there is.
"""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import CLIPConfig, LlamaConfig

from lorasc_ds.benchmark import data, peers
from lorasc_ds.benchmark.memory import PeakBytes
from lorasc_ds.benchmark.ours import Steps, compile_afresh, make_trainer, prepared, text_of, word_tokenizer, write_model
from lorasc_ds.benchmark.results import Result, Spread, Target, ratio
from lorasc_ds.benchmark.setting import Setting
from lorasc_ds.benchmark.shapes import SCORED, llama2_7b
from lorasc_ds.benchmark.timing import apart_in_turns
from lorasc_ds.data import collate
from lorasc_ds.encoded import ScoredTokens
from lorasc_ds.layout import Layout
from lorasc_ds.objectives import attention_bias, summed_loss
from lorasc_ds.tasks import Task
from lorasc_ds.trainer import Trainer

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@dataclass(frozen=True, slots=True)
class Shape:
    """What is measured.

    Args:
        tokens: of a step.
        lengths: of its sequences, a measurement for each; the last is the one with a target.
        images: of a step of the model of images.
    """

    llama: LlamaConfig
    clip: CLIPConfig
    tokens: int
    lengths: tuple[int, ...]
    images: int


def shape_of(setting: Setting) -> Shape:
    if not setting.quick:
        return Shape(llama2_7b(), bigg_14(), 8192, (512, 1024, 2048), 64)
    small = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
    )
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = clip_of(tower | {"image_size": 32, "patch_size": 8}, tower | {"vocab_size": 128}, 16)
    return Shape(small, clip, 64, (32,), 4)


def clip_of(vision: dict[str, Any], text: dict[str, Any], projection: int) -> CLIPConfig:
    common = {"projection_dim": projection, "hidden_act": "gelu"}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return CLIPConfig(vision_config=vision | common, text_config=text | common | ends, projection_dim=projection)


def bigg_14() -> CLIPConfig:
    """laion/CLIP-ViT-bigG-14-laion2B-39B-b160k's towers."""
    vision = {"hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48, "num_attention_heads": 16}
    text = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    return clip_of(vision | {"image_size": 224, "patch_size": 14}, text | {"vocab_size": 49408}, 1280)


def packed_run(
    setting: Setting, length: int, *, compiled: bool = False, accumulator: str = "device", recomputed: bool = False
) -> Trainer:
    """A run on blocks of `length` tokens, all scored, `Shape.tokens` of them a step."""
    shape, folder = shape_of(setting), setting.fresh("packed")
    file = folder / "text.txt"
    file.write_text(text_of(4 * shape.tokens, 0, shape.llama.vocab_size))
    settings = {
        "model": {"dtype": "bfloat16"},
        "task": {"name": "text", "train_file": str(file), "block_size": length},
        "cascade": {"strategy": "lorasc", "experts": 50, "accumulator": accumulator, "max_boundary_drift": 10.0},
        "training": {"batch_size": shape.tokens // length, "gradient_checkpointing": recomputed},
    }
    trainer = make_trainer(prepared(write_model(folder, shape.llama), settings), folder, setting.device)
    if compiled:
        compile_afresh(trainer.module, setting.compiler)
    return trainer


class Closing:
    """Optimizer steps of a run that ends with them."""

    def __init__(self, trainer: Trainer) -> None:
        self.steps = Steps(trainer)
        self.close = trainer.batches.close

    def __call__(self) -> None:
        self.steps()


def random_ids(shape: Shape, length: int, device: torch.device) -> list[ScoredTokens]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, shape.llama.vocab_size, (shape.tokens // length, length), generator=generator)
    return [ScoredTokens(tuple(one), length - 1) for one in ids.tolist()]


def assembled(setting: Setting, length: int, *, liger: bool = False, compiled: bool = False) -> peers.PlainLoop:
    """A loop of PEFT's, without recomputation."""
    shape = shape_of(setting)
    model = peers.random_model(shape.llama, torch.bfloat16, setting.device)
    model = peers.with_peft(peers.with_liger(model) if liger else model)
    if compiled:
        torch._dynamo.reset()
        peers.regionally_compiled(model, setting.compiler)
    sequences = random_ids(shape, length, setting.device)
    return peers.PlainLoop(model, lambda: sequences)


def default_peer(setting: Setting, length: int) -> peers.TrainerBlock:
    """HF Trainer with PEFT and recomputation, as most recipes have it; one step."""
    shape, folder = shape_of(setting), setting.fresh("peer")
    model = peers.random_model(shape.llama, torch.bfloat16, setting.device)
    rows = peers.rows_of([list(one.ids) for one in random_ids(shape, length, setting.device)])
    batch = {"per_device_train_batch_size": shape.tokens // length, "gradient_checkpointing": True}
    with peers.quietly():
        tokenizer = word_tokenizer(shape.llama.vocab_size)
        return peers.TrainerBlock(peers.hf_trainer(model, tokenizer, rows, folder, 1, **batch))


def flops_per_token(llama: LlamaConfig, length: int) -> float:
    """Of a step that trains pairs alone: twice the forward pass's, and causal attention's three times."""
    width, layers = llama.hidden_size, llama.num_hidden_layers
    matrices = layers * (4 * width**2 + 3 * width * llama.intermediate_size) + llama.vocab_size * width
    return 4.0 * matrices + 6.0 * length * width * layers


def throughput(setting: Setting) -> Iterator[Result]:
    """G1 and G2: each variant is made, warmed up, timed and dropped in every turn, since two may not fit."""
    shape = shape_of(setting)
    for length in shape.lengths:
        makers: dict[str, Callable[[], Callable[[], object]]] = {
            "ours": lambda: Closing(packed_run(setting, length)),  # noqa: B023 (called within the turn)
            "ours, compiled": lambda: Closing(packed_run(setting, length, compiled=True)),  # noqa: B023
            "HF Trainer + PEFT": lambda: default_peer(setting, length),  # noqa: B023
            "PEFT loop": lambda: assembled(setting, length),  # noqa: B023
            "PEFT loop, compiled": lambda: assembled(setting, length, compiled=True),  # noqa: B023
        }
        if peers.installed("liger_kernel"):
            makers["PEFT + Liger, compiled"] = lambda: assembled(setting, length, liger=True, compiled=True)  # noqa: B023
        turns = 1 if setting.quick else 2
        seconds = apart_in_turns(makers, turns=turns, calls=setting.options.repetitions, device=setting.device)
        yield from (setting.judged(one) for one in rates(setting, shape, length, seconds))


def rates(setting: Setting, shape: Shape, length: int, seconds: dict[str, list[float]]) -> Iterator[Result]:
    """What the times of the variants' steps mean."""
    median = {name: statistics.median(found) for name, found in seconds.items()}
    best = min((name for name in median if name.startswith("ours")), key=median.__getitem__)
    assembled_best = min((name for name in median if "PEFT" in name), key=median.__getitem__)
    spread = Spread.of([shape.tokens / one for one in seconds[best]])
    last = length == shape.lengths[-1]
    title = f"tokens a second, sequences of {length}, {shape.tokens} a step: {best}"
    told = "; ".join(f"{name}: {shape.tokens / one:,.0f}/s" for name, one in median.items() if name != best)
    target = Target(">=", 19_500) if last else None
    yield Result("G1", title, spread.median, "tokens/s", spread.low, spread.high, target, peer=told)
    for peer, bound in (("HF Trainer + PEFT", 2.0), (assembled_best, 1.10)):
        yield ratio("G1", f"step of {length}: {peer} / {best}", seconds, (peer, best), Target(">=", bound))
    if last:
        done = flops_per_token(shape.llama, length) * spread.median / 1e12
        share = done / setting.ceilings["matmul_tflops"]
        title = f"share of the matmul ceiling, sequences of {length}"
        yield Result("G2", title, share, "", target=Target(">=", 0.70), ours=f"{done:.4g} TFLOP/s")


def pairs(setting: Setting) -> Iterator[Result]:
    """G3: a step, over a forward and backward pass of the model without pairs, gradients of activations kept."""
    shape = shape_of(setting)
    length = shape.lengths[-1]
    trainer = packed_run(setting, length)
    with closing(trainer.batches):
        model = peers.random_model(shape.llama, torch.bfloat16, setting.device).requires_grad_(False)
        given = peers.padded(random_ids(shape, length, setting.device), setting.device)

        def bare() -> None:
            embedded = model.get_input_embeddings()(given["input_ids"]).requires_grad_()
            model(inputs_embeds=embedded, labels=given["labels"], use_cache=False).loss.backward()

        seconds = setting.in_turns({"ours": Steps(trainer), "without pairs": bare})
    title = f"step of {length} / the model without pairs"
    yield setting.judged(ratio("G3", title, seconds, ("ours", "without pairs"), Target("<=", 1.03)))


def memory(setting: Setting) -> Iterator[Result]:
    """G4: the most that is held in a step."""
    shape = shape_of(setting)
    for title, bound, accumulator, recomputed in (
        ("accumulator on the device", 47.0, "device", False),
        ("accumulator in host memory", 43.0, "host", False),
        ("accumulator in host memory, recomputing", 20.0, "host", True),
    ):
        trainer = packed_run(setting, shape.lengths[-1], accumulator=accumulator, recomputed=recomputed)
        with closing(trainer.batches):
            step = Steps(trainer)
            step()
            peak = peak_of(step, trainer, setting.device) / 1e9
        del trainer, step
        gc.collect()
        title = f"peak memory of a step of {shape.tokens} tokens, {title}"
        yield setting.judged(Result("G4", title, peak, "GB", target=Target("<=", bound)))


def peak_of(work: Callable[[], object], trainer: Trainer, device: torch.device) -> int:
    """Bytes: allocated on the GPU; on a CPU the parameters and what is made inside."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    with PeakBytes() as made:
        work()
    return made.peak + sum(one.nbytes for one in trainer.module.parameters())


def attention(setting: Setting) -> Iterator[Result]:
    """G8: forward and backward pass of one layer's attention over packed sequences, by each backend that works."""
    shape = shape_of(setting)
    length, heads = shape.lengths[0], shape.llama.num_attention_heads
    rows, width = shape.tokens // length, shape.llama.hidden_size // heads
    device, dtype = setting.device, torch.bfloat16
    flat = [torch.randn(1, heads, shape.tokens, width, device=device, dtype=dtype) for _ in range(3)]
    batch = [one.view(1, heads, rows, length, width)[0].transpose(0, 1).contiguous() for one in flat]
    places = torch.arange(shape.tokens, device=device)
    segments = torch.stack((places % length, places // length, torch.zeros_like(places)))[:, None]
    bias = attention_bias(segments, dtype)
    starts = torch.arange(0, shape.tokens + 1, length, device=device, dtype=torch.int32)

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        rows_of = (one[0].transpose(0, 1) for one in (q, k, v))
        return varlen_attn(*rows_of, starts, starts, length, length, window_size=(-1, 0))  # type: ignore[return-value]

    backends: dict[str, tuple[list[Tensor], Callable[..., Tensor], Any]] = {
        "SDPA with a mask, one row": (flat, lambda *qkv: scaled_dot_product_attention(*qkv, attn_mask=bias), None),
        "SDPA causal, a row each": (batch, lambda *qkv: scaled_dot_product_attention(*qkv, is_causal=True), None),
        "cuDNN causal, a row each": (
            batch,
            lambda *qkv: scaled_dot_product_attention(*qkv, is_causal=True),
            SDPBackend.CUDNN_ATTENTION,
        ),
        "varlen_attn, one row": (flat, varlen, None),
    }
    variants = {}
    for name, (given, call, backend) in backends.items():
        inputs = [one.clone().requires_grad_() for one in given]

        def work(inputs: list[Tensor] = inputs, call: Any = call, backend: Any = backend) -> None:
            with sdpa_kernel(backend) if backend else nullcontext():
                call(*inputs).sum().backward()

        try:
            work()
        except (RuntimeError, NotImplementedError, TypeError) as error:
            yield Result("G8", f"attention, {name}", missing=" ".join(str(error).split())[:80])
        else:
            variants[name] = work
    for name, found in setting.in_turns(variants).items():
        spread = Spread.of([1e3 * one for one in found])
        title = f"attention of a layer, sequences of {length}, {shape.tokens} tokens: {name}"
        yield Result("G8", title, spread.median, "ms", spread.low, spread.high)


def labelled(setting: Setting) -> Iterator[Result]:
    """G9: forward and backward pass with 70 % of the tokens a prompt: logits of all rows, over those scored."""
    shape = shape_of(setting)
    length = shape.lengths[-1]
    trainer = packed_run(setting, length)
    with closing(trainer.batches):
        model, scored = trainer.engine.model, round(SCORED * length)
        sequences = [ScoredTokens(one.ids, scored) for one in random_ids(shape, length, setting.device)]
        batch = collate([[one] for one in sequences], [0] * len(sequences), Layout(0)).to(setting.device)
        given = peers.padded(sequences, setting.device)

        def ours() -> None:
            (summed_loss(model, batch, "lm") / batch.scored_tokens).backward()

        def all_rows() -> None:
            model(**given, use_cache=False).loss.backward()

        seconds = setting.in_turns({"ours": ours, "all rows": all_rows})
    title = f"step of {length}, 70 % prompt: logits of all rows / of scored ones"
    yield setting.judged(ratio("G9", title, seconds, ("all rows", "ours"), Target(">=", 1.025)))


def images(setting: Setting) -> Iterator[Result]:
    """G10: training steps on the vision tower, images from the package decoded as a run does."""
    shape, folder = shape_of(setting), setting.fresh("images")
    vision: Any = shape.clip.vision_config
    text: Any = shape.clip.text_config
    size = vision.image_size
    model = write_model(folder, shape.clip, text.vocab_size)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    (model / "preprocessor_config.json").write_text(json.dumps(processor))
    settings = {
        "model": {"dtype": "bfloat16"},
        "adapter": {"target_modules": ["vision_model.*.q_proj", "vision_model.*.v_proj"]},
        "task": {"name": "digit_images", "templates": "simple"},
        "cascade": {"max_boundary_drift": 10.0},
        "training": {"batch_size": shape.images},
    }
    if setting.quick:
        settings["training"]["data_workers"] = 0
    trainer = make_trainer(prepared(model, settings), folder, setting.device)
    with closing(trainer.batches):
        numbers = iter(range(10_000))
        seconds = setting.in_turns({"ours": lambda: trainer.training_step(next(numbers), 1e-4)})["ours"]
    spread = Spread.of([shape.images / one for one in seconds])
    title = f"images a second, batches of {shape.images} of {size} x {size} pixels"
    found = Result("G10", title, spread.median, "images/s", spread.low, spread.high, Target(">=", 250))
    yield setting.judged(found)


def candidates(setting: Setting) -> Iterator[Result]:
    """G11: four candidates of 25 tokens after 80, one by one over with a shared beginning."""
    shape = shape_of(setting)
    model = peers.random_model(shape.llama, torch.bfloat16, setting.device).eval()
    task = Task("made up", "candidates", "classification", {}, "accuracy")
    examples = data.made_up(80, 25, 4, 1 if setting.quick else 64, shape.llama.vocab_size)
    seconds = setting.in_turns(
        {
            "ours": lambda: data.score(model, task, examples, True),
            "one by one": lambda: data.score(model, task, examples, False),
        }
    )
    title = "scoring 4 candidates of 25 tokens after 80: one by one / shared"
    yield setting.judged(ratio("G11", title, seconds, ("one by one", "ours"), Target(">=", 2.0)))
