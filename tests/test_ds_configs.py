"""DeepSpeed settings made complete; the shipped JSONs under DeepSpeed's own parser, and their accelerate files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import deepspeed.runtime.config as deepspeed_config
import pytest
import yaml
from accelerate.utils import DeepSpeedPlugin
from conftest import ROOT

from lorasc_ds.errors import ConfigError
from lorasc_ds.sharding.engine_config import check_engine_config, fill_engine_config, load_engine_config, stage_of

SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))
LAUNCHERS = sorted((ROOT / "ds_configs" / "accelerate").glob("*.yaml"))
OWNED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def test_the_shipped_files_are_all_there() -> None:
    assert [path.stem for path in SHIPPED] == ["single_h100", "zero1", "zero2", "zero3", "zero3_offload"]
    assert {path.stem for path in LAUNCHERS} == {path.stem for path in SHIPPED} | {"ddp"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_passes_and_deepspeed_parses_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = load_engine_config(path, f"--deepspeed {path}")
    check_engine_config(content, str(path))
    assert {key: content[key] for key in (*OWNED, "bf16")} == dict.fromkeys(OWNED, "auto") | {"bf16": {"enabled": "auto"}}  # fmt: skip
    monkeypatch.setattr(deepspeed_config.dist, "get_world_size", lambda: 8)
    monkeypatch.setattr(deepspeed_config.dist, "get_rank", lambda: 0)
    filled = fill_engine_config(content, micro_batch_size=2, accumulation=4, world_size=8, max_grad_norm=1.0)
    assert '"auto"' not in json.dumps(filled)
    parsed = deepspeed_config.DeepSpeedConfig(filled)
    assert (parsed.train_batch_size, parsed.gradient_clipping) == (64, 1.0)
    assert parsed.zero_optimization_stage == stage_of(content)
    assert parsed.grad_accum_dtype == "fp32"
    assert not parsed.bfloat16_config.enabled
    assert not parsed.float16_config.enabled
    assert not parsed.timers_config.enabled
    if stage_of(content):
        assert parsed.zero_config.reduce_bucket_size == 5_000_000
    if stage_of(content) == 3:
        assert parsed.zero_config.prefetch_bucket_size == 410_000_000
        assert parsed.zero_config.param_persistence_threshold == 200_000
    if path.stem == "zero3_offload":
        settings = parsed.zero_config.model_dump()
        assert settings["offload_param"]["device"] == settings["offload_optimizer"]["device"] == "cpu"
        assert not parsed.zero_force_ds_cpu_optimizer


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_json_has_an_accelerate_configuration_that_accelerate_takes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = yaml.safe_load((ROOT / "ds_configs" / "accelerate" / f"{path.stem}.yaml").read_text())
    assert content["distributed_type"] == "DEEPSPEED"
    assert content["num_processes"] == (1 if path.stem == "single_h100" else 8)
    named = content["deepspeed_config"]["deepspeed_config_file"]
    assert (ROOT / named).samefile(path)
    # What `accelerate launch` sets; beside a file, Accelerate refuses keys that the file owns.
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", ",".join([*content["deepspeed_config"], *content]))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", named)
    assert DeepSpeedPlugin().zero_stage == stage_of(load_engine_config(path, "the file"))


def test_accelerate_launch_starts_two_processes_with_the_json(tmp_path: Path) -> None:
    script = tmp_path / "stand_in.py"
    script.write_text(
        "import os, pathlib\n"
        "names = ('WORLD_SIZE', 'ACCELERATE_USE_DEEPSPEED', 'ACCELERATE_DEEPSPEED_CONFIG_FILE', 'ACCELERATE_MIXED_PRECISION')\n"
        "said = ' '.join(os.environ[name] for name in names)\n"
        "(pathlib.Path(__file__).parent / os.environ['RANK']).write_text(said)\n"
    )
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "ds_configs/accelerate/zero2.yaml"]
    command = [*launcher, "--num_processes=2", "--main_process_port=0", str(script)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=120)
    said = {rank: (tmp_path / rank).read_text() for rank in ("0", "1")}
    assert said == dict.fromkeys("01", "2 true ds_configs/zero2.json no")


def test_filling_leaves_nothing_open_and_the_content_as_it_was() -> None:
    content = {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "data_types": {"grad_accum_dtype": "auto"},
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}},
        "timers": {"throughput": {"enabled": False}},
    } | dict.fromkeys(OWNED, "auto")
    before = json.dumps(content)
    filled = fill_engine_config(content, micro_batch_size=2, accumulation=3, world_size=4, max_grad_norm=0.5)
    assert filled == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}},
        "timers": {"throughput": {"enabled": False}},
    }
    filled["zero_optimization"]["offload_param"]["device"] = filled["timers"]["throughput"] = "changed"
    assert json.dumps(content) == before


def test_filling_an_empty_content() -> None:
    """Accelerate wants a ZeRO section even where ZeRO is off; a norm of None does not clip."""
    filled = fill_engine_config({}, micro_batch_size=1, accumulation=1, world_size=1, max_grad_norm=None)
    assert filled["zero_optimization"] == {"stage": 0}
    assert filled["gradient_clipping"] == 0.0
    assert stage_of({}) == stage_of({"zero_optimization": {}}) == 0
    assert stage_of({"zero_optimization": {"stage": 2}}) == 2


@pytest.mark.parametrize(("group", "world_size", "fits"), [(8, 16, True), (8, 12, False), (8, 4, True), (1, 3, True)])
def test_secondary_groups_divide_the_processes(group: int, world_size: int, fits: bool) -> None:
    content = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": group}}
    sizes = {"micro_batch_size": 1, "accumulation": 1, "world_size": world_size}
    if fits:
        fill_engine_config(content, **sizes, max_grad_norm=None)
    else:
        with pytest.raises(ConfigError, match=r"partition_size is 8: it does not divide the 12 processes; take"):
            fill_engine_config(content, **sizes, max_grad_norm=None)
