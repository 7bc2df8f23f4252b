"""What is read from a launcher's environment, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import ROOT

from lorasc_ds.config import TrainingConfig
from lorasc_ds.errors import ConfigError
from lorasc_ds.preparation import micro_batch_size
from lorasc_ds.sharding import detect

ZERO3 = ROOT / "ds_configs" / "zero3.json"


def test_without_a_launcher_there_is_one_process_and_no_engine() -> None:
    launch = detect(None, {})
    assert (launch.rank, launch.world_size, launch.stage) == (0, 1, None)


def test_the_launcher_says_which_process_this_is() -> None:
    launch = detect(ZERO3, {"RANK": "5", "WORLD_SIZE": "8"})
    assert (launch.rank, launch.world_size, launch.stage) == (5, 8, 3)
    assert launch.engine == json.loads(ZERO3.read_text())


def test_accelerate_names_the_engine_by_file_or_by_flags() -> None:
    used = {"ACCELERATE_USE_DEEPSPEED": "true"}
    assert detect(None, used | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ZERO3)}).stage == 3
    assert detect(ZERO3, used | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": os.path.relpath(ZERO3)}).stage == 3
    by_flags = detect(
        None,
        used | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
    )
    assert by_flags.stage == 3
    assert by_flags.engine is not None
    assert by_flags.engine["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert detect(ZERO3, used | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}).stage == 3  # the file has more to say


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "accelerate launch --use_fsdp: FSDP is not supported; take"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "--use_megatron_lm: Megatron-LM is not supported; take"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "tensor, context and sequence parallel are not supported"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}, "--gradient_accumulation_steps 8: leave it out and set"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "--gradient_clipping 1.0: leave it out and set"),
        (
            {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
            "--dynamo_backend inductor: leave it out, or take it from the accelerate config, and set training.compile",
        ),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS is 4, but no launcher says which process this is"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2, but no launcher says which process this is"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "true"},
            "the flags of accelerate launch: accelerate launch --cpu switches DeepSpeed off; set DS_ACCELERATOR=cpu",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"},
            "the flags of accelerate launch: ",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "absent.json"},
            "accelerate's deepspeed_config_file absent.json: No such file or directory",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_no_backend_covers_is_refused_by_name(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        detect(None, environment)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_precision_that_is_not_used_is_said() -> None:
    assert detect(None, {"ACCELERATE_MIXED_PRECISION": "no"}).note is None
    note = detect(None, {"ACCELERATE_MIXED_PRECISION": "bf16"}).note
    assert note == "mixed_precision bf16 of accelerate is not used: model.dtype owns it"


def test_two_files_for_one_engine_are_refused(tmp_path: Path) -> None:
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "other.json")}
    with pytest.raises(ConfigError, match=r"--deepspeed .*zero3\.json, but accelerate launch names .*other\.json"):
        detect(ZERO3, environment)


def test_a_global_batch_is_shared_out_evenly() -> None:
    assert micro_batch_size(TrainingConfig(batch_size=12), 3) == 4
    assert micro_batch_size(TrainingConfig(batch_size=12, micro_batch_size=2), 3) == 2
    with pytest.raises(ConfigError, match=r"training\.batch_size is 12, not a multiple of 3 processes x 3 examples"):
        micro_batch_size(TrainingConfig(batch_size=12, micro_batch_size=3), 3)
    with pytest.raises(ConfigError, match=r"training\.batch_size is 2, not a multiple of 3 processes x 1 examples"):
        micro_batch_size(TrainingConfig(batch_size=2), 3)
