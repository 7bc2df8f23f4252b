"""A DeepSpeed JSON, checked before anything is loaded: settings of the engine only, and one owner for each number."""

from __future__ import annotations

import copy
import difflib
import json
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasc_ds.errors import ConfigError

if TYPE_CHECKING:
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

AVERAGED = "gradients of the float32 pairs are averaged over the processes once, in float32"
CHECKPOINTS = "the trainer writes its own files, with the merged weights that DeepSpeed's can lose"
LEAVES = "with frozen embeddings DeepSpeed frees the first layer's weights before its backward pass needs them"
NVME = "asynchronous I/O storage (NVMe) is not supported"
PARALLEL = "weights can be merged into under data parallel and ZeRO, not where they are cut up in another way"
PRECISION = "model.dtype owns the precision; the pairs stay float32 and the engine casts nothing"
QUANTISED = "an expert cannot be merged exactly into quantised weights"
RECORDS = "metrics.jsonl and tracking.tensorboard hold the records"
REMOVED = "DeepSpeed 0.19 no longer has it"
WORKER = "its optimizer works in another process, where a boundary cannot empty it"

# What this trainer has to say about DeepSpeed's keys: the values it takes (none: leave the key out), and why no
# others. A key of SECTIONS that has no row is DeepSpeed's own business, and its models check it.
ROWS: list[tuple[str, tuple[Any, ...], str]] = [
    ("train_batch_size", ("auto",), "training.batch_size owns this number"),
    ("train_micro_batch_size_per_gpu", ("auto",), "training.micro_batch_size owns this number"),
    ("gradient_accumulation_steps", ("auto",), "training.micro_batch_size owns this number"),
    ("gradient_clipping", ("auto",), "training.max_grad_norm owns this number"),
    ("optimizer", (), "training.learning_rate and training.weight_decay own the optimizer, AdamW"),
    ("scheduler", (), "training.schedule owns the learning rate"),
    ("bf16.enabled", ("auto", False), PRECISION),
    ("fp16.enabled", ("auto", False), f"float16 weights cannot be merged into exactly; {PRECISION}"),
    ("bf16.bf16_master_weights_and_grads bf16.bf16_optimizer_states", (False,), PRECISION),
    ("fp16.fp16_master_weights_and_grads", (False,), PRECISION),
    ("bfloat16 amp torch_autocast msamp data_types.param_dtype data_types.buffer_dtype", (), PRECISION),
    ("data_types.keep_in_fp32_modules", ("auto",), PRECISION),
    ("data_types.grad_accum_dtype", ("auto", "fp32"), AVERAGED),
    ("communication_data_type", ("fp32",), AVERAGED),
    ("prescale_gradients zero_optimization.zero_quantized_gradients", (False,), AVERAGED),
    ("gradient_predivide_factor", (1,), AVERAGED),
    ("gradient_allreduce_op", ("mean",), AVERAGED),
    ("managed_gradient_accumulation", (True,), "the trainer tells DeepSpeed where accumulation ends"),
    ("tensor_parallel expert_parallel pipeline", (), PARALLEL),
    ("sequence_parallel_size", (1,), PARALLEL),
    ("seq_parallel_communication_data_type", ("fp32",), PARALLEL),
    ("use_data_before_expert_parallelism", (False,), PARALLEL),
    ("weight_quantization compression_training quantize_training", (), QUANTISED),
    ("hybrid_engine", (), "it adds LoRA to the weights and subtracts it again, which does not restore them"),
    ("compile", (), "training.compile is what compiles layers"),
    ("data_efficiency dataloader_drop_last", (), "the trainer owns the data and their order"),
    ("autotuning", (), "it changes the batch, which training.batch_size owns"),
    ("checkpoint datastates_ckpt nebula", (), CHECKPOINTS),
    ("tensorboard wandb csv_monitor comet flops_profiler", (), RECORDS),
    ("steps_per_print", (), f"Accelerate switches DeepSpeed's own report off; {RECORDS}"),
    ("wall_clock_breakdown", (False,), f"it waits for the GPU in every step, for a report that is off; {RECORDS}"),
    ("activation_checkpointing", (), "transformers does not read it; set training.gradient_checkpointing"),
    ("aio", (), NVME),
    ("disable_allgather vocabulary_size", (), "DeepSpeed does nothing with it"),
    ("disable_python_gc", (False,), "memory would grow without the garbage collector"),
    ("sparse_attention sparse_gradients eigenvalue curriculum_learning", (), REMOVED),
    ("elasticity progressive_layer_drop graph_harvesting", (), REMOVED),
    ("memory_breakdown dump_state zero_force_ds_cpu_optimizer", (True, False), "it is a switch"),
    ("zero_allow_untested_optimizer", (True,), "Accelerate sets it"),
    ("log_level", ("debug", "info", "warning", "error", "critical"), "DeepSpeed's log has no such level"),
    ("zero_optimization.stage", (0, 1, 2, 3), "ZeRO has the stages 0 to 3, and nothing else chooses one"),
    ("zero_optimization.zero_quantized_nontrainable_weights", (False,), QUANTISED),
    ("zero_optimization.zero_quantized_weights", (False,), f"forward passes would see rounded weights; {QUANTISED}"),
    ("zero_optimization.offload_param.device zero_optimization.offload_optimizer.device", ("cpu", "none"), NVME),
    ("zero_optimization.offload_optimizer.ratio", (1,), "Twin-Flow's second optimizer is not emptied at boundaries"),
    ("zero_optimization.offload_optimizer.super_offload", (False,), WORKER),
    ("zero_optimization.zenflow", (), WORKER),
    ("zero_optimization.mics_shard_size zero_optimization.mics_hierarchical_params_gather", (), f"{REMOVED} (MiCS)"),
    ("zero_optimization.zeropp_loco_param", (), REMOVED),
    ("zero_optimization.cpu_offload", (), 'its name is now offload_optimizer: {"device": "cpu"}'),
    ("zero_optimization.cpu_offload_param", (), 'its name is now offload_param: {"device": "cpu"}'),
    ("zero_optimization.cpu_offload_use_pin_memory", (), "its name is now pin_memory, in the offload sections"),
    ("zero_optimization.leaf_module", (), LEAVES),
    ("zero_optimization.stage3_module_granularity_threshold", (0,), LEAVES),
    ("zero_optimization.module_granularity_threshold", (0,), LEAVES),
    ("zero_optimization.stage3_gather_16bit_weights_on_model_save", (False,), CHECKPOINTS),
    ("zero_optimization.gather_16bit_weights_on_model_save", (False,), CHECKPOINTS),
    ("zero_optimization.stage3_gather_fp16_weights_on_model_save", (False,), CHECKPOINTS),
    ("zero_optimization.elastic_checkpoint zero_optimization.pipeline_loading_checkpoint", (False,), CHECKPOINTS),
    ("zero_optimization.legacy_stage1", (False,), "the old ZeRO-1 is untested here"),
    ("zero_optimization.save_muon_momentum_buffer_in_memory", (False,), "the optimizer is AdamW"),
    ("zero_optimization.compute_grad_norm", (True,), "the trainer records the norm, and stops where it is not finite"),
]
RULES = {key: (values, reason) for keys, values, reason in ROWS for key in keys.split()}
EARLIEST_STAGE = {"offload_optimizer": 1, "offload_param": 3, "zero_hpz_partition_size": 3}
PROBLEM = re.compile(r"^(?P<key>\S+)\n +(?P<need>.+) \[type=\w+, input_value=(?P<value>.+), input_type=\w+\]$", re.M)


def load_engine_config(path: Path, source: str) -> dict[str, Any]:
    """The content of a DeepSpeed JSON; strict JSON, since Accelerate and DeepSpeed do not read the same extensions.

    Args:
        source: how errors call it, like `--deepspeed ds_configs/zero3.json`.

    Raises:
        ConfigError: the file cannot be read, is not JSON, or holds a key twice.
    """

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise problem(source, f"{key} stands twice in one section; remove one")
        return dict(pairs)

    def no_constant(word: str) -> Any:
        raise ValueError(f"{word} is not a number that JSON knows")

    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=without_duplicates, parse_constant=no_constant)
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}; give the path of a DeepSpeed JSON") from error
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{source}, line {error.lineno} is not JSON: {error.msg}; no comments, no comma before a bracket"
        ) from error
    except (ValueError, RecursionError) as error:
        raise problem(source, f"it is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f'{source} holds {shown(content)}; sections like "zero_optimization" are needed')
    return content


def check_engine_config(content: dict[str, Any], source: str) -> None:
    """Refuse settings with another owner, settings that boundaries cannot work with, and keys that do not exist.

    Args:
        source: how errors call the content, like `--deepspeed ds_configs/zero3.json`.

    Raises:
        ConfigError: one line with the source, the key, its value, what is needed and what to do.
    """
    sections = section_models()
    check_section(content, "", source, sections)
    stage = stage_of(content)
    for key, least in EARLIEST_STAGE.items():
        value = content.get("zero_optimization", {}).get(key, 0)
        idle = value.get("device", "none") == "none" if isinstance(value, dict) else int(value) <= 1
        if stage < least and not idle:
            text = f"zero_optimization.{key} is {shown(value)}: ZeRO-{stage} ignores it; leave it out or take stage"
            raise problem(source, f"{text} {' or '.join(map(str, range(least, 4)))}")


def section_models() -> dict[str, type[DeepSpeedConfigModel] | None]:
    """The sections that are taken, each with DeepSpeed's own model where it has one."""
    # Imported here: a run without DeepSpeed must not wait for it.
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "data_types": None,
        "timers": None,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }


def check_section(
    section: dict[str, Any], path: str, source: str, sections: dict[str, type[DeepSpeedConfigModel] | None]
) -> None:
    """Check one section and those in it; `path` is empty, or ends in a dot."""
    known = {*RULES, *sections}
    for name, model in sections.items():
        for field, about in model.model_fields.items() if model else ():
            known |= {f"{name}.{field}", f"{name}.{about.alias or field}"}
    for key, value in section.items():
        name = path + key
        if name not in known:
            siblings = [one.removeprefix(path) for one in known if one.rpartition(".")[0] == path.rstrip(".")]
            close = [path + one for one in difflib.get_close_matches(key, siblings, n=1)]
            close += sorted(one for one in known if one.endswith(f".{key}"))
            hint = f"did you mean {close[0]}?" if close else "leave it out"
            raise problem(source, f"unknown key {name}, with the value {shown(value)}; {hint}")
        values, reason = RULES.get(name, ((value,), ""))
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values):
            remedy = f"take {' or '.join(map(shown, values))}, or leave it out" if values else "leave it out"
            raise problem(source, f"{name} is {shown(value)}: {reason}; {remedy}")
        if value == "auto" and name not in RULES:
            raise problem(source, f'{name} is "auto": nothing sets it; write a value, like those in ds_configs/')
        if name in sections:
            if not isinstance(value, dict):
                raise problem(source, f"{name} is {shown(value)}: a section with keys of its own is needed")
            check_section(value, f"{name}.", source, sections)
    model = sections.get(path.rstrip("."))
    if model is not None:
        try:
            model(**section)
        except ValueError as error:
            # pydantic's text: below a heading, the key and what is wrong with it, for each error
            found = PROBLEM.search(str(error))
            text = f"{path}{found['key']} is {found['value']}: {found['need']}" if found else f"{path} {error}"
            raise problem(source, f"{text}; correct it or leave it out") from None


def fill_engine_config(
    content: dict[str, Any], *, micro_batch_size: int, accumulation: int, world_size: int, max_grad_norm: float | None
) -> dict[str, Any]:
    """A copy of checked settings in which nothing is left open.

    Args:
        micro_batch_size: examples in a forward pass of one process.
        accumulation: forward passes of one process in an optimizer step.
        max_grad_norm: None does not clip.

    Raises:
        ConfigError: ZeRO's secondary groups do not divide the processes.
    """
    zero = {"stage": 0} | content.get("zero_optimization", {})
    group = int(zero.get("zero_hpz_partition_size", 1))
    if group > 1 and world_size % min(group, world_size):
        raise ConfigError(
            f"zero_optimization.zero_hpz_partition_size is {group}: it does not divide the {world_size} processes; take"
            " the number of GPUs in a node"
        )
    return copy.deepcopy(content) | {
        "zero_optimization": copy.deepcopy(zero),
        "train_batch_size": micro_batch_size * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm or 0.0,
        # A bfloat16 backbone too is left as it was loaded: its dtype is the loader's, the pairs are float32.
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def stage_of(content: dict[str, Any]) -> int:
    """The ZeRO stage; 0 partitions nothing."""
    return int(content.get("zero_optimization", {}).get("stage", 0))


def shown(value: Any) -> str:
    return textwrap.shorten(json.dumps(value), 60, placeholder=" ...")


def problem(source: str, text: str) -> ConfigError:
    """One line, whatever the file holds."""
    return ConfigError(" ".join(f"{source}: {text}".split()))
