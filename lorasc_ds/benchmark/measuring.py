"""Measures the rows that are asked for, one after the other, and writes all results anew after each."""

from __future__ import annotations

import gc
import importlib
import os
import platform
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers.utils import logging

from lorasc_ds.benchmark.catalogue import ROWS
from lorasc_ds.benchmark.options import Options
from lorasc_ds.benchmark.peers import installed
from lorasc_ds.benchmark.report import write
from lorasc_ds.benchmark.results import Result, table
from lorasc_ds.benchmark.setting import Setting
from lorasc_ds.benchmark.timing import ceilings
from lorasc_ds.run_directory import environment

PEERS = ("trl", "liger_kernel")


def conditions(options: Options, device: torch.device) -> dict[str, Any]:
    """What the numbers were measured with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    found = environment()
    found["packages"] |= {name: version(name) for name in PEERS if installed(name)}
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(options).items()}
    hardware = {"device": f"{device.type}: {name}", "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return hardware | found | {"options": asked}


def measure(options: Options) -> list[Result]:
    """Every row asked for; what is written is `report.write`'s."""
    logging.set_verbosity_error()
    disable_progress_bars()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = conditions(options, device)
    about["ceilings"] = ceilings(device, options.quick)
    options.output_dir.mkdir(parents=True)
    results: list[Result] = []
    print(introduction(about), flush=True)
    with tempfile.TemporaryDirectory(prefix="lorasc-benchmark-") as temporary:
        setting = Setting(options, Path(temporary), device, about["ceilings"])
        done: set[str] = set()
        for id in options.rows:
            row = ROWS[id]
            if row.function in done:  # it gave several rows
                continue
            done.add(row.function)
            if row.needs_gpu and device.type != "cuda" and not options.quick:
                alike = [one for one in options.rows if ROWS[one].function == row.function]
                found = [Result(one, ROWS[one].title, missing="needs a GPU") for one in alike]
            else:
                module, name = row.function.split(":")
                function = getattr(importlib.import_module(f"lorasc_ds.benchmark.{module}"), name)
                gc.collect()
                gc.freeze()  # what the imports made is not looked through at every collection
                found = [one for one in function(setting) if one.row in options.rows]
            results = sorted([*results, *found], key=lambda one: list(ROWS).index(one.row))
            print("".join(f"{line}\n" for line in table(found).splitlines()[2:]), end="", flush=True)
            write(options.output_dir, results, about)
    print(f"in {options.output_dir}: benchmark.json, benchmark.md, benchmark.png")
    return results


def introduction(about: dict[str, Any]) -> str:
    """What the numbers were measured with, in words."""
    limits = about["ceilings"]
    return "\n".join(
        (
            f"device    {about['device']}, {about['threads']} of {about['cores']} threads",
            f"versions  {', '.join(f'{name} {number}' for name, number in about['packages'].items())}",
            f"ceilings  {limits['matmul_tflops']:.4g} TFLOP/s in a matrix product,"
            f" {limits['copy_gigabytes_per_second']:.3g} GB/s in a copy",
        )
    )
