"""The memory plan by hand on a tiny Llama, on the shapes of Llama-2, and against what a real step holds."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import image_text_model
import pytest
import torch
from conftest import RECIPE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from lorasc_ds import memory, models
from lorasc_ds.activations import layer_bytes
from lorasc_ds.cli import parse_command_line
from lorasc_ds.dry_run import memory_lines
from lorasc_ds.duration import image_seconds, scored_in
from lorasc_ds.memory import GIB, Memory, activation_bytes, engines, gpu_bytes, memory_plan
from lorasc_ds.objectives import summed_loss
from lorasc_ds.preparation import Preparation, attach_adapters, prepare
from lorasc_ds.quickstart.make_base import make_tokenizer
from lorasc_ds.vision_tower import patches, tower_parameters

SMALL = ["--task.train_examples=12", "--task.dev_examples=8", "--task.test_examples=10"]


def prepared(*arguments: str, processes: int = 1) -> Preparation:
    invocation = parse_command_line([*arguments], RECIPE)
    assert not isinstance(invocation, str)
    return prepare(invocation.config, world_size=processes)


def tiny(folder: Path, *arguments: str, processes: int = 1) -> Preparation:
    """The tiny Llama with rank 5: q is (24, 24), v is (12, 24), in two layers; one example per process."""
    size = ["--adapter.rank=5", f"--training.batch_size={processes}", f"--model.name_or_path={folder}"]
    return prepared(*SMALL, *size, *arguments, processes=processes)


# By hand, with 1, 2 and 5 processes. Frozen: embedding and head of 960 elements, a norm of 24, and in each of 2 layers
# q, o of 576, k, v of 288, three of 768 in the MLP, two norms of 24. Pairs: A of 120 and 120, B of 120 and 60 a layer.
FROZEN, PAIRS, ADAPTED = 10104, 840, 1728
FROZEN_SLICES = {1: 10104, 2: 5052, 5: 2 * 192 + 5 + 2 * (2 * 116 + 2 * 58 + 3 * 154 + 2 * 5)}
ADAPTED_SLICES = {1: 1728, 2: 864, 5: 2 * (116 + 58)}
# A small ZeRO-3, in which norms and the B of v are kept whole, 120 elements of either kind.
ZERO3: dict[str, Any] = {
    "stage": 3,
    "reduce_bucket_size": 10,
    "stage3_param_persistence_threshold": 100,
    "stage3_max_live_parameters": 1000,
    "stage3_prefetch_bucket_size": 500,
}
OFFLOAD = ZERO3 | {"offload_param": {"device": "cpu", "pin_memory": False}}
SIZES = {"float32": 4, "bfloat16": 2}


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("processes", [1, 2, 5])
def test_engines_with_whole_weights(dtype: str, processes: int, tiny_folder: Path) -> None:
    preparation = tiny(tiny_folder, f"--model.dtype={dtype}", processes=processes)
    plain = memory_plan(preparation, {})
    assert plain.weights == SIZES[dtype] * FROZEN
    assert plain.slow_pairs == 4 * PAIRS
    assert plain.pairs == 4 * 4 * PAIRS  # pair, gradient, two moments
    assert plain.accumulators == (4 * ADAPTED if dtype == "bfloat16" else 0)
    assert (plain.copy, plain.buffers, plain.gathered, plain.host) == (0, 0, 0, 0)
    assert plain.device == plain.weights + plain.slow_pairs + plain.pairs + plain.accumulators + plain.activations
    share = 4 * PAIRS // processes
    for stage, pairs in {1: 2 * 4 * PAIRS + 3 * share, 2: 4 * PAIRS + 4 * share}.items():
        plan = memory_plan(preparation, {"stage": stage, "reduce_bucket_size": 7})
        assert plan.pairs == pairs
        assert plan.buffers == 2 * 4 * 7
        assert plan.device == plain.device - plain.pairs + pairs + 56


def test_zero_1_and_2_cut_up_all_pairs_end_to_end(tiny_folder: Path) -> None:
    """864 elements of rank 6 lack one of 5 · 173."""
    plan = memory_plan(tiny(tiny_folder, "--adapter.rank=6", processes=5), {"stage": 2, "reduce_bucket_size": 0})
    assert plan.pairs == 4 * 1008 + 4 * 4 * 202


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("processes", [1, 2, 5])
def test_zero_3(dtype: str, processes: int, tiny_folder: Path) -> None:
    size = SIZES[dtype]
    plan = memory_plan(tiny(tiny_folder, f"--model.dtype={dtype}", processes=processes), ZERO3)
    kept = 120 if processes > 1 else 0  # alone, the slice is the weight
    assert plan.weights == size * (FROZEN_SLICES[processes] + kept)
    assert plan.pairs == 5 * 4 * PAIRS // processes + 4 * kept
    assert plan.slow_pairs == 4 * PAIRS
    assert plan.accumulators == (4 * ADAPTED_SLICES[processes] if dtype == "bfloat16" else 0)
    gathered = size * (1000 + 960) + size * (500 + 960) if processes > 1 else 0
    assert plan.buffers == 80 + gathered
    assert (plan.copy, plan.gathered, plan.host) == (0, 0, 0)


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("processes", [1, 5])
def test_zero_3_with_offload(dtype: str, processes: int, tiny_folder: Path) -> None:
    size = SIZES[dtype]
    plan = memory_plan(tiny(tiny_folder, f"--model.dtype={dtype}", processes=processes), OFFLOAD)
    assert (plan.weights, plan.pairs, plan.accumulators) == (size * 120, 4 * 120, 0)
    accumulators = 4 * ADAPTED_SLICES[processes] if dtype == "bfloat16" else 0
    assert plan.host == size * FROZEN_SLICES[processes] + 6 * 4 * PAIRS // processes + accumulators
    assert plan.buffers == 80 + size * (1000 + 960) + (size * (500 + 960) if processes > 1 else 0)


def test_pinned_slices_are_powers_of_two(tiny_folder: Path) -> None:
    pinned = OFFLOAD | {"offload_param": {"device": "cpu", "pin_memory": True}}
    preparation = tiny(tiny_folder, processes=5)
    # 192 · 4 = 768, 5 · 4 = 20, 116 · 4 = 464, 58 · 4 = 232, 154 · 4 = 616 bytes
    held = 2 * 1024 + 32 + 2 * (2 * 512 + 2 * 256 + 3 * 1024 + 2 * 32)
    difference = held - 4 * FROZEN_SLICES[5]
    assert memory_plan(preparation, pinned).host - memory_plan(preparation, OFFLOAD).host == difference


def test_no_more_is_gathered_than_there_is(tiny_folder: Path) -> None:
    endless = ZERO3 | {"stage3_max_live_parameters": 10**9, "stage3_prefetch_bucket_size": 10**9}
    everything = 2 * (FROZEN - 120) + 4 * (PAIRS - 120)
    preparation = tiny(tiny_folder, "--model.dtype=bfloat16", processes=2)
    assert memory_plan(preparation, endless).buffers == 80 + 2 * everything
    all_kept = endless | {"stage3_param_persistence_threshold": 960}
    assert memory_plan(preparation, all_kept).buffers == 80
    assert memory_plan(preparation, all_kept).weights == 2 * (FROZEN + FROZEN_SLICES[2])


def test_accumulators_in_host_memory(tiny_folder: Path) -> None:
    arguments = ("--model.dtype=bfloat16", "--cascade.accumulator=host")
    for zero, elements in (({}, ADAPTED), (ZERO3, ADAPTED_SLICES[5])):
        plan = memory_plan(tiny(tiny_folder, *arguments, processes=5), zero)
        assert (plan.accumulators, plan.host) == (0, 4 * elements)
    assert memory_plan(tiny(tiny_folder, "--cascade.accumulator=host"), {}).host == 0


def test_gathered_edits_are_rank_0_s(tiny_folder: Path) -> None:
    """Whole sums, on the device even under offload, and one whole weight."""
    preparation = tiny(tiny_folder, "--model.dtype=bfloat16", "--cascade.merge_path=gather", processes=5)
    for zero in (ZERO3, OFFLOAD):
        plan = memory_plan(preparation, zero)
        assert (plan.gathered, plan.accumulators) == (2 * 2 * 576, 4 * ADAPTED)
    assert memory_plan(preparation, {}).gathered == 0
    alone = tiny(tiny_folder, "--cascade.merge_path=gather")
    assert (memory_plan(alone, ZERO3).gathered, memory_plan(alone, OFFLOAD).gathered) == (0, 2 * 4 * 576)


def test_copies_for_an_evaluation_inside_an_expert_and_for_a_selection(tiny_folder: Path) -> None:
    inside = tiny(tiny_folder, "--cascade.strategy=lora", processes=5)
    assert memory_plan(inside, {}).copy == 4 * ADAPTED
    assert memory_plan(inside, ZERO3).copy == 4 * ADAPTED_SLICES[5]
    assert memory_plan(inside, OFFLOAD).copy == 0
    ends = tiny(tiny_folder, processes=5)
    copied = memory_plan(inside, OFFLOAD).host - memory_plan(ends, OFFLOAD).host
    assert copied == 4 * ADAPTED_SLICES[5]
    assert memory_plan(tiny(tiny_folder, "--cascade.strategy=lora", "--model.dtype=bfloat16"), {}).copy == 0
    for dtype, size in SIZES.items():
        selecting = tiny(tiny_folder, "--training.select=best_dev", f"--model.dtype={dtype}", processes=5)
        assert memory_plan(selecting, {}).host == size * ADAPTED
        assert memory_plan(selecting, ZERO3).host == size * ADAPTED_SLICES[5]


def test_the_numbers_are_those_of_ds_configs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, zero in engines(2).items():
        if zero:
            section = zero | {"reduce_bucket_size": 77}
            (tmp_path / name).write_text(json.dumps({"zero_optimization": section}))
    assert [*engines(1)] == ["plain", "zero1.json", "zero2.json", "zero3.json", "zero3_offload.json"]
    assert [zero.get("stage", 0) for zero in engines(2).values()] == [0, 1, 2, 3, 3]
    monkeypatch.setattr(memory, "DS_CONFIGS", tmp_path)
    preparation = prepared(*SMALL)
    assert [memory_plan(preparation, zero).buffers for zero in engines(1).values()][:4] == [0, 616, 616, 616]


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_bytes(preparation: Preparation) -> int:
    """The most that a real forward and backward pass hold at a moment, parameters left out."""
    model = models.load_model(preparation.config.model).train()
    attach_adapters(preparation.config, model)
    if preparation.config.training.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    held = Held()
    held.known |= {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with held:
        summed_loss(model, preparation.data.step(0).micro_batches[0].batch, "lm").backward()
    return held.peak


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("dtype", SIZES)
def test_the_activation_estimate_is_near_the_truth(dtype: str, checkpointing: str, method: str) -> None:
    settings = [f"--model.dtype={dtype}", f"--training.gradient_checkpointing={checkpointing}"]
    preparation = prepared(*SMALL, *settings, f"--adapter.method={method}")
    assert activation_bytes(preparation) == pytest.approx(peak_bytes(preparation), rel=0.15)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("target", ["q_proj,v_proj", "language_model.*.q_proj"])
def test_images_of_a_vision_language_model_are_counted(
    target: str, checkpointing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """36 patches of an image, which leave more than the text does where the tower is adapted too."""
    monkeypatch.setattr(image_text_model, "SIDE", 48)
    processor = image_text_model.make_processor()
    image_text_model.make_model(processor.tokenizer.get_vocab()).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    rows = image_text_model.write_rows(tmp_path, "upright", range(24), "train")
    preparation = prepared(
        f"--model.name_or_path={tmp_path}", "--task.name=image_text", f"--task.train_file={rows}",
        "--task.dev_examples=4", "--task.max_new_tokens=4", f"--adapter.target_modules={target}", f"--training.gradient_checkpointing={checkpointing}",
    )  # fmt: skip
    assert patches(preparation.shape, preparation.reading) == (36, 3 * 48 * 48)
    model = models.load_model(preparation.config.model)
    of_images = {
        name: one.numel() for name, one in model.named_parameters() if "vision_tower" in name or "projector" in name
    }
    assert tower_parameters(model) == sum(of_images.values())
    assert image_seconds(scored_in(preparation), 10) == pytest.approx(
        2 * 10 * 36 * tower_parameters(preparation.shape) / (0.4 * 67e12)
    )
    assert activation_bytes(preparation) == pytest.approx(peak_bytes(preparation), rel=0.2)


def test_an_evaluation_may_need_more_than_a_training_step(tiny_folder: Path) -> None:
    """Logits of 66 positions in bfloat16; of the ten scored answers again, and twice in float32."""
    preparation = tiny(tiny_folder, "--model.dtype=bfloat16", "--training.eval_batch_size=1000", processes=2)
    logits = 1000 * 40 * (2 * 66 + 10 * (2 + 8))
    assert [memory_plan(preparation, zero).activations for zero in ({}, ZERO3)] == [logits, logits]


LLAMA_2: dict[str, dict[str, Any]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8},
}  # fmt: skip
PARAMETERS = {"7b": 6_738_415_616, "70b": 68_976_648_192}


def llama_2(folder: Path, name: str, *arguments: str, processes: int = 1) -> Preparation:
    """The shape of Llama-2 in bfloat16 over blocks of 1024 tokens, one in a micro batch; there are no weights."""
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=4096, **LLAMA_2[name])
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "a.txt").write_text("a b c d e f g h " * 4096)
    return prepared(
        f"--model.name_or_path={folder}", "--model.dtype=bfloat16", "--task.name=text",
        f"--task.train_file={folder / 'a.txt'}", "--task.block_size=1024", "--training.batch_size=8",
        "--training.micro_batch_size=1", "--training.eval_batch_size=1", *arguments, processes=processes,
    )  # fmt: skip


def fitting(preparation: Preparation, gib: int = 80) -> list[str]:
    plans = {name: memory_plan(preparation, zero) for name, zero in engines(preparation.data.world_size).items()}
    return [name for name, plan in plans.items() if plan.device <= 0.9 * gib * GIB]


def last_line(preparation: Preparation) -> str:
    *_, line = memory_lines(preparation, 80 * GIB)
    return line


def test_llama_2_7b_fits_one_gpu(tmp_path: Path) -> None:
    preparation = llama_2(tmp_path, "7b")
    assert layer_bytes(preparation, 4096, 11008, 32) == 99 * 1024  # test_kernels.py counts as much
    plan = memory_plan(preparation, {})
    assert plan.weights == 2 * PARAMETERS["7b"]
    assert plan.pairs == 16 * 4_194_304
    assert plan.accumulators == 4 * 64 * 4096 * 4096
    assert fitting(preparation)[0] == "plain"
    assert fitting(preparation, gib=16) == ["zero3_offload.json"]


def test_llama_2_70b_needs_zero_3(tmp_path: Path) -> None:
    preparation = llama_2(tmp_path, "70b", processes=8)
    assert memory_plan(preparation, {}).weights == 2 * PARAMETERS["70b"]
    assert fitting(preparation) == ["zero3.json", "zero3_offload.json"]
    assert last_line(preparation) == (
        "take: accelerate launch --num_processes 8 launch/train.py --deepspeed ds_configs/zero3.json"
    )
    plan = memory_plan(preparation, engines(8)["zero3.json"])
    assert plan.weights == pytest.approx(2 * PARAMETERS["70b"] / 8, rel=1e-3)
    assert fitting(llama_2(tmp_path, "70b")) == ["zero3_offload.json"]
    assert fitting(llama_2(tmp_path, "70b", "--training.micro_batch_size=4")) == []
    less = llama_2(tmp_path, "70b", "--training.micro_batch_size=4", "--training.gradient_checkpointing=true")
    assert fitting(less) == ["zero3_offload.json"]
    assert last_line(less) == (
        "take: accelerate launch --num_processes 1 launch/train.py --deepspeed ds_configs/zero3_offload.json;"
        f" every process needs {memory_plan(less, engines(1)['zero3_offload.json']).host / GIB:.2f}G of host memory"
    )


def test_more_gpus_need_no_more_of_each_and_larger_runs_no_less(tmp_path: Path) -> None:
    def plans(*arguments: str, processes: int = 2) -> list[Memory]:
        preparation = llama_2(tmp_path, "7b", *arguments, processes=processes)
        return [memory_plan(preparation, zero) for zero in engines(processes).values()]

    two, four, eight = plans(), plans(processes=4), plans(processes=8)
    for fewer, more in ((two, four), (four, eight)):
        assert all(a.device >= b.device and a.host >= b.host for a, b in zip(fewer, more, strict=True))
        assert all(a.device > b.device for a, b in zip(fewer[1:4], more[1:4], strict=True))
    for larger in (
        "--adapter.rank=16",
        "--model.dtype=float32",
        "--training.micro_batch_size=4",
        "--task.block_size=2048",
    ):
        assert all(a.device < b.device for a, b in zip(two, plans(larger), strict=True)), larger
    checkpointing = plans("--training.gradient_checkpointing=true")
    assert all(a.activations > 5 * b.activations for a, b in zip(two, checkpointing, strict=True))


def test_the_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_bytes(1.5) == 3 * 2**29
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_bytes(None) == 80 * GIB

    class Properties:
        total_memory = 1234

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert gpu_bytes(None) == 1234
    assert gpu_bytes(2) == 2 * GIB
