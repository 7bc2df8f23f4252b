"""DeepSpeed JSONs: every refusal by name, and numbers with one owner."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed.runtime.config as deepspeed_config
import pytest
from conftest import ROOT

from lorasc_ds.errors import ConfigError
from lorasc_ds.sharding.engine_config import (
    RULES,
    check_engine_config,
    fill_engine_config,
    load_engine_config,
    section_models,
)

OWNED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
ZERO = "zero_optimization."


def nested(key: str, value: Any) -> dict[str, Any]:
    """A content that holds `key` (dotted) and, for keys of ZeRO, a stage that does not ignore it."""
    names = key.split(".")
    for name in reversed(names):
        value = {name: value}
    if names[0] == "zero_optimization":
        value["zero_optimization"] = {"stage": 3} | value["zero_optimization"]
    return value


def refusal(content: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as raised:
        check_engine_config(content, "--deepspeed x.json")
    message = str(raised.value)
    assert message.startswith("--deepspeed x.json: ")
    assert len(message.splitlines()) == 1
    return message


REFUSED = {  # dotted key: a value that is refused, and why
    "train_batch_size": (32, r"training\.batch_size owns this number; take \"auto\", or leave it out"),
    "train_micro_batch_size_per_gpu": (4, r"training\.micro_batch_size owns this number"),
    "gradient_accumulation_steps": (2, r"training\.micro_batch_size owns this number"),
    "gradient_clipping": (1.0, r"training\.max_grad_norm owns this number"),
    "optimizer": ({"type": "AdamW"}, r"training\.learning_rate"),
    "scheduler": ({"type": "WarmupLR"}, r"training\.schedule"),
    "bf16.enabled": (True, r"model\.dtype owns the precision"),
    "bf16.bf16_master_weights_and_grads": (True, r"model\.dtype owns the precision"),
    "bf16.bf16_optimizer_states": (True, r"model\.dtype owns the precision"),
    "fp16.enabled": (True, r"float16 weights cannot be merged into exactly; model\.dtype"),
    "fp16.fp16_master_weights_and_grads": (True, r"model\.dtype owns the precision"),
    "bfloat16": ({"enabled": "auto"}, r"model\.dtype owns the precision"),
    "amp": ({"enabled": True}, r"model\.dtype owns the precision"),
    "torch_autocast": ({"enabled": True, "dtype": "bfloat16"}, r"model\.dtype owns the precision"),
    "msamp": ({"enabled": True}, r"model\.dtype owns the precision"),
    "data_types.param_dtype": ("bf16", r"model\.dtype owns the precision"),
    "data_types.buffer_dtype": ("bf16", r"model\.dtype owns the precision"),
    "data_types.keep_in_fp32_modules": (["norm"], r"model\.dtype owns the precision"),
    "data_types.grad_accum_dtype": ("bf16", r"in float32; take \"auto\" or \"fp32\", or leave it out"),
    "communication_data_type": ("bf16", r"gradients of the float32 pairs are averaged"),
    "prescale_gradients": (True, r"gradients of the float32 pairs are averaged"),
    "gradient_predivide_factor": (2.0, r"gradients of the float32 pairs are averaged"),
    "gradient_allreduce_op": ("sum", r"gradients of the float32 pairs are averaged"),
    "managed_gradient_accumulation": (False, r"where accumulation ends"),
    "tensor_parallel": ({"autotp_size": 2}, r"weights can be merged into under data parallel and ZeRO"),
    "expert_parallel": ({"enabled": True}, r"weights can be merged into under data parallel and ZeRO"),
    "pipeline": ({"stages": 2}, r"weights can be merged into under data parallel and ZeRO"),
    "sequence_parallel_size": (2, r"weights can be merged into under data parallel and ZeRO"),
    "seq_parallel_communication_data_type": ("bf16", r"data parallel and ZeRO"),
    "use_data_before_expert_parallelism": (True, r"data parallel and ZeRO"),
    "weight_quantization": ({"quantized_initialization": {}}, r"cannot be merged exactly into quantised weights"),
    "compression_training": ({}, r"cannot be merged exactly into quantised weights"),
    "quantize_training": ({}, r"cannot be merged exactly into quantised weights"),
    "hybrid_engine": ({"enabled": True}, r"subtracts it again, which does not restore them"),
    "compile": ({"deepcompile": True}, r"training\.compile is what compiles layers"),
    "data_efficiency": ({"enabled": True}, r"owns the data"),
    "dataloader_drop_last": (True, r"owns the data"),
    "autotuning": ({"enabled": True}, r"training\.batch_size owns"),
    "checkpoint": ({"load_universal": True}, r"writes its own files"),
    "datastates_ckpt": ({}, r"writes its own files"),
    "nebula": ({"enabled": True}, r"writes its own files"),
    "tensorboard": ({"enabled": True}, r"tracking\.tensorboard hold the records"),
    "wandb": ({"enabled": True}, r"hold the records"),
    "csv_monitor": ({"enabled": True}, r"hold the records"),
    "comet": ({"enabled": True}, r"hold the records"),
    "flops_profiler": ({"enabled": True}, r"hold the records"),
    "steps_per_print": (100, r"Accelerate switches DeepSpeed's own report off"),
    "wall_clock_breakdown": (True, r"waits for the GPU in every step"),
    "activation_checkpointing": ({"cpu_checkpointing": True}, r"set training\.gradient_checkpointing"),
    "aio": ({"queue_depth": 8}, r"asynchronous I/O storage \(NVMe\) is not supported"),
    "disable_allgather": (True, r"does nothing with it"),
    "vocabulary_size": (32000, r"does nothing with it"),
    "disable_python_gc": (True, r"memory would grow"),
    "sparse_attention": ({"mode": "fixed"}, r"no longer has it"),
    "sparse_gradients": (True, r"no longer has it"),
    "eigenvalue": ({"enabled": True}, r"no longer has it"),
    "curriculum_learning": ({"enabled": True}, r"no longer has it"),
    "elasticity": ({"enabled": True}, r"no longer has it"),
    "progressive_layer_drop": ({"enabled": True}, r"no longer has it"),
    "graph_harvesting": (True, r"no longer has it"),
    "memory_breakdown": ("yes", r"a switch; take true or false"),
    "dump_state": ("auto", r"a switch"),
    "zero_force_ds_cpu_optimizer": ("false", r"a switch"),
    "zero_allow_untested_optimizer": (False, r"Accelerate sets it"),
    "log_level": ("loud", r"no such level"),
    ZERO + "stage": (4, r"the stages 0 to 3.*take 0 or 1 or 2 or 3"),
    ZERO + "zero_quantized_nontrainable_weights": (True, r"cannot be merged exactly into quantised weights"),
    ZERO + "zero_quantized_weights": (True, r"forward passes would see rounded weights"),
    ZERO + "zero_quantized_gradients": (True, r"gradients of the float32 pairs are averaged"),
    ZERO + "offload_param.device": ("nvme", r"\(NVMe\) is not supported; take \"cpu\""),
    ZERO + "offload_optimizer.device": ("nvme", r"\(NVMe\) is not supported; take \"cpu\""),
    ZERO + "offload_optimizer.ratio": (0.5, r"Twin-Flow"),
    ZERO + "offload_optimizer.super_offload": (True, r"another process, where a boundary cannot empty it"),
    ZERO + "zenflow": ({"topk_ratio": 0.1}, r"another process, where a boundary cannot empty it"),
    ZERO + "mics_shard_size": (8, r"no longer has it \(MiCS\)"),
    ZERO + "mics_hierarchical_params_gather": (True, r"no longer has it \(MiCS\)"),
    ZERO + "zeropp_loco_param": ({"err_beta": 0.8}, r"no longer has it"),
    ZERO + "cpu_offload": (True, r'its name is now offload_optimizer: \{"device": "cpu"\}'),
    ZERO + "cpu_offload_param": (True, r"its name is now offload_param"),
    ZERO + "cpu_offload_use_pin_memory": (True, r"its name is now pin_memory"),
    ZERO + "leaf_module": ({"classes": ["LlamaDecoderLayer"]}, r"frees the first layer's weights"),
    ZERO + "stage3_module_granularity_threshold": (6_000_000, r"frees the first layer's weights"),
    ZERO + "module_granularity_threshold": (6_000_000, r"frees the first layer's weights"),
    ZERO + "stage3_gather_16bit_weights_on_model_save": (True, r"the trainer writes its own files"),
    ZERO + "gather_16bit_weights_on_model_save": (True, r"the trainer writes its own files"),
    ZERO + "stage3_gather_fp16_weights_on_model_save": (True, r"the trainer writes its own files"),
    ZERO + "elastic_checkpoint": (True, r"the trainer writes its own files"),
    ZERO + "pipeline_loading_checkpoint": (True, r"the trainer writes its own files"),
    ZERO + "legacy_stage1": (True, r"untested here"),
    ZERO + "save_muon_momentum_buffer_in_memory": (True, r"the optimizer is AdamW"),
    ZERO + "compute_grad_norm": (False, r"stops where it is not finite"),
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_a_refusal_names_the_key_the_value_the_reason_and_the_remedy(key: str) -> None:
    value, reason = REFUSED[key]
    message = refusal(nested(key, value))
    assert message.startswith(f"--deepspeed x.json: {key} is {json.dumps(value)}: "), message
    assert re.search(reason, message), message
    assert message.endswith("leave it out"), message


def test_every_rule_has_its_refusal_above() -> None:
    assert set(REFUSED) == set(RULES)


@pytest.mark.parametrize("key", [key for key, (values, _) in RULES.items() if values])
def test_the_values_that_a_rule_names_are_taken(key: str) -> None:
    for value in RULES[key][0]:
        check_engine_config(nested(key, value), "x.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nested(ZERO + "stage", "auto"), r"stage is \"auto\": ZeRO has the stages 0 to 3, and nothing else chooses one"),
        (nested(ZERO + "stage", "3"), r"stage is \"3\": ZeRO has the stages"),
        (nested(ZERO + "stage", True), r"stage is true: ZeRO has the stages"),
        (nested(ZERO + "stage", None), r"stage is null: ZeRO has the stages"),
        (nested("gradient_clipping", None), r"gradient_clipping is null"),
        (nested("bf16.enabled", "true"), r"bf16\.enabled is \"true\": model\.dtype"),
        (nested("gradient_predivide_factor", True), r"gradient_predivide_factor is true"),
    ],
)  # fmt: skip
def test_values_that_only_look_right(content: dict[str, Any], message: str) -> None:
    assert re.search(message, refusal(content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimisation": {"stage": 3}}, r"unknown key zero_optimisation, with .*did you mean zero_optimization\?"),
        ({"train_batchsize": "auto"}, r"unknown key train_batchsize, .*did you mean train_batch_size\?"),
        ({"qqq": 1}, r"unknown key qqq, with the value 1; leave it out"),
        ({"two\nlines": 1}, r"unknown key two lines, "),
        (nested(ZERO + "overlap_com", True), r"unknown key zero_optimization\.overlap_com, .*did you mean zero_optimization\.overlap_comm\?"),
        (nested(ZERO + "stage3_prefetch_bucket", 1), r"did you mean zero_optimization\.stage3_prefetch_bucket_size\?"),
        (nested(ZERO + "offload_param.pin_memmory", True), r"unknown key zero_optimization\.offload_param\.pin_memmory, .*did you mean zero_optimization\.offload_param\.pin_memory\?"),
        (nested(ZERO + "offload_optimizer.devise", "cpu"), r"did you mean zero_optimization\.offload_optimizer\.device\?"),
        ({"bf16": {"enable": "auto"}}, r"unknown key bf16\.enable, .*did you mean bf16\.enabled\?"),
        ({"comms_logger": {"enabled": True, "verbos": True}}, r"did you mean comms_logger\.verbose\?"),
        ({"timers": {"throughputs": {}}}, r"did you mean timers\.throughput\?"),
        ({"timers": {"throughput": {"synchronised": False}}}, r"did you mean timers\.throughput\.synchronized\?"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, r"did you mean data_types\.grad_accum_dtype\?"),
        ({"overlap_comm": True}, r"unknown key overlap_comm, .*did you mean zero_optimization\.overlap_comm\?"),
        ({"stage": 3}, r"unknown key stage, .*did you mean zero_optimization\.stage\?"),
    ],
)  # fmt: skip
def test_a_key_that_does_not_exist(content: dict[str, Any], message: str) -> None:
    assert re.search(message, refusal(content)), refusal(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nested(ZERO + "reduce_bucket_size", 0), r"zero_optimization\.reduce_bucket_size is 0: Input should be greater than 0; correct it or leave it out"),
        (nested(ZERO + "reduce_bucket_size", "many"), r"zero_optimization\.reduce_bucket_size is 'many': Input should be a valid integer"),
        (nested(ZERO + "overlap_comm", "perhaps"), r"zero_optimization\.overlap_comm is 'perhaps': Input should be a valid boolean"),
        (nested(ZERO + "zero_hpz_partition_size", -1), r"zero_optimization\.zero_hpz_partition_size is -1"),
        (nested(ZERO + "offload_param.pin_memory", "maybe"), r"zero_optimization\.offload_param\.pin_memory is 'maybe'"),
        (nested("comms_logger.prof_ops", "all_reduce"), r"comms_logger\.prof_ops is 'all_reduce': Input should be a valid list"),
        (nested("timers.throughput.enabled", "maybe"), r"timers\.throughput\.enabled is 'maybe'"),
        (nested("fp16.loss_scale", -1), r"fp16\.loss_scale is -1: .*must be >= 0"),
        (nested(ZERO + "offload_param", "cpu"), r"zero_optimization\.offload_param is \"cpu\": a section with keys"),
        (nested(ZERO + "offload_param", None), r"zero_optimization\.offload_param is null: a section with keys"),
        ({"zero_optimization": True}, r"zero_optimization is true: a section with keys"),
        ({"bf16": "auto"}, r"bf16 is \"auto\""),
        ({"timers": []}, r"timers is \[\]: a section with keys"),
        (nested(ZERO + "reduce_bucket_size", "auto"), r"reduce_bucket_size is \"auto\": nothing sets it; write a value, like those in ds_configs/"),
        (nested(ZERO + "stage3_param_persistence_threshold", "auto"), r"is \"auto\": nothing sets it"),
        (nested(ZERO + "offload_param.pin_memory", "auto"), r"is \"auto\": nothing sets it"),
    ],
)  # fmt: skip
def test_a_value_that_deepspeed_cannot_use(content: dict[str, Any], message: str) -> None:
    assert re.search(message, refusal(content)), refusal(content)


@pytest.mark.parametrize(
    ("stage", "section", "taken"),
    [
        (2, {"offload_param": {"device": "cpu"}}, False),
        (3, {"offload_param": {"device": "cpu"}}, True),
        (2, {"offload_param": {"device": "none"}}, True),
        (2, {"offload_param": {}}, True),
        (0, {"offload_optimizer": {"device": "cpu"}}, False),
        (1, {"offload_optimizer": {"device": "cpu"}}, True),
        (2, {"zero_hpz_partition_size": 8}, False),
        (3, {"zero_hpz_partition_size": 8}, True),
        (2, {"zero_hpz_partition_size": 1}, True),
    ],
)
def test_settings_that_the_stage_ignores(stage: int, section: dict[str, Any], taken: bool) -> None:
    content = {"zero_optimization": {"stage": stage} | section}
    if taken:
        check_engine_config(content, "x.json")
    else:
        assert re.search(rf"{next(iter(section))} is .*: ZeRO-{stage} ignores it; leave it out or take stage", refusal(content))  # fmt: skip


def test_a_full_content_is_taken() -> None:
    """What other trainers' JSONs hold without harm, aliases and other spellings included."""
    content = {
        "bf16": {"enabled": "auto", "check_grad_overflow": True},
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1},
        "zero_optimization": {
            "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": 5e6,
            "prefetch_bucket_size": 1000, "stage3_max_reuse_distance": 0, "zero_hpz_partition_size": 8, "enable_sanity_checks": True,
            "offload_param": {"device": "none", "nvme_path": None, "buffer_count": 5},
        },
        "comms_logger": {"enabled": True, "verbose": False, "prof_all": True},
        "communication_data_type": "fp32",
    }  # fmt: skip
    check_engine_config(content, "x.json")
    check_engine_config({}, "x.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n  "a": 1,\n  "b": 2,\n}', r"x\.json, line 4 is not JSON: "),
        ('{\n  // why\n  "a": 1}', r"x\.json, line 2 is not JSON: .*no comments"),
        ("", r"x\.json, line 1 is not JSON"),
        ('{"bf16": {}, "fp16": {}, "bf16": {}}', r"bf16 stands twice in one section; remove one"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', r"stage stands twice"),
        ('{"zero_optimization": {"reduce_bucket_size": NaN}}', r"it is not JSON: NaN is not a number that JSON knows"),
        ("[1]", r"holds \[1\]; sections like"),
        ("[" * 100_000, r"it is not JSON"),
    ],
)
def test_a_file_that_is_not_json(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        load_engine_config(path, f"--deepspeed {path}")
    assert str(raised.value).startswith(f"--deepspeed {path}")
    assert len(str(raised.value).splitlines()) == 1


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file or directory; give the path of a DeepSpeed JSON"):
        load_engine_config(tmp_path / "absent.json", f"--deepspeed {tmp_path / 'absent.json'}")
    with pytest.raises(ConfigError, match=r"Is a directory"):
        load_engine_config(tmp_path, "--deepspeed ")
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(ConfigError, match=r"it is not JSON: 'utf-8' codec"):
        load_engine_config(tmp_path / "latin.json", "--deepspeed latin.json")


def test_deepspeed_reads_no_key_that_is_not_known_here() -> None:
    """A key that a later DeepSpeed begins to read is put among those taken or those refused, on purpose."""

    class Recording(dict[str, Any]):
        def __init__(self, content: dict[str, Any]) -> None:
            super().__init__(content)
            self.read: set[str] = set()

        def __contains__(self, key: object) -> bool:
            self.read.add(str(key))
            return super().__contains__(key)

        def __getitem__(self, key: str) -> Any:
            self.read.add(key)
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            self.read.add(key)
            return super().get(key, default)

        def keys(self) -> Any:  # `key in content.keys()` is a reading too
            return self

    content = Recording(fill_engine_config({}, micro_batch_size=1, accumulation=1, world_size=1, max_grad_norm=1.0))
    deepspeed_config.DeepSpeedConfig(content)
    assert {"zero_optimization", "aio", "amp", "tensor_parallel", "optimizer"} <= content.read
    assert content.read <= {*RULES, *section_models()}


def test_a_run_without_deepspeed_does_not_import_it() -> None:
    program = "import sys, lorasc_ds.sharding.engine_config; sys.exit('deepspeed' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)
