"""The state of an optimizer, by what it is kept for: a parameter, or several laid end to end by an engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorasc_ds.errors import ConfigError
from lorasc_ds.sharding.processes import Processes


def check_restartable(optimizer: Any) -> None:
    """Refuse an optimizer whose first state is not zero, or not known here: quantised ones, for instance.

    Raises:
        ConfigError: it is none of torch's or DeepSpeed's Adams.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # inside ZeRO's wrapper
    if not isinstance(inner, torch.optim.Adam) and type(inner).__name__ not in ("FusedAdam", "DeepSpeedCPUAdam"):
        raise ConfigError(
            f"{type(inner).__module__}.{type(inner).__name__} is not known to start anew when its state is zeroed: take"
            " torch's AdamW or Adam"
        )


class Unit(NamedTuple):
    """Parameters with one state: `key` is what the optimizer keeps it under."""

    parameters: Sequence[nn.Parameter]
    key: Tensor


def units_of(optimizer: Any) -> list[Unit]:
    """The units of torch's optimizer, or of ZeRO's wrapper around one."""
    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO-1 and 2: one for each group
        return [
            Unit(*pair) for pair in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True)
        ]
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3: one or more for each group
        return [Unit(*pair) for pair in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)]
    return [Unit([parameter], parameter) for group in optimizer.param_groups for parameter in group["params"]]


def restarting(optimizer: Any, parameters: Iterable[nn.Parameter]) -> Iterator[Unit]:
    """The units that hold nothing but `parameters`, which are all in them.

    Raises:
        ConfigError: one holds others besides, whose step count would be lost with theirs; or some are in none.
    """
    wanted = {id(parameter) for parameter in parameters}
    found = 0
    for unit in units_of(optimizer):
        inside = [id(parameter) in wanted for parameter in unit.parameters]
        found += sum(inside)
        if all(inside):
            yield unit
        elif any(inside):
            raise ConfigError(
                f"a parameter group holds {sum(inside)} parameters of LoRA pairs and {inside.count(False)} others, and"
                " this engine counts their steps together: give the optimizer the pairs in groups of their own"
            )
    if found != len(wanted):
        raise ConfigError(
            f"this {type(optimizer).__name__} has {found} of the {len(wanted)} parameters of the LoRA pairs: give it"
            " all of them, and give Cascade the optimizer that prepare returned, not the one that it was given"
        )


def empty_(optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
    """State and step counts of `parameters` as before the first step, in place.

    Zeroed, not removed: AdamW's zero state is its first state, nothing is allocated anew, and what an engine
    has linked to the tensors stays linked.
    """
    keys, tensors = set(), []
    for unit in restarting(optimizer, parameters):
        keys.add(id(unit.key))
        state = optimizer.state.get(unit.key, {})
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors.append(value)
            else:
                state[name] = type(value)(0)
    if tensors:
        torch._foreach_zero_(tensors)  # pyright: ignore[reportPrivateImportUsage]
    for group in optimizer.param_groups:
        if "step" in group and all(id(key) in keys for key in group["params"]):
            group["step"] = 0  # fused optimizers begin a new state's count there


def is_empty(optimizer: Any, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether every moment and step count of `parameters` is zero."""
    keys = {id(unit.key): unit.key for unit in restarting(optimizer, parameters)}
    values = [value for key in keys.values() for value in optimizer.state.get(key, {}).values()]
    values += [
        group.get("step", 0) for group in optimizer.param_groups if all(id(key) in keys for key in group["params"])
    ]
    return not any(bool(value.any()) if isinstance(value, Tensor) else bool(value) for value in values)


def begin_(optimizer: Any) -> None:
    """Make the state that the first step of torch's Adam would make, where it is not there yet: zeros.

    A step itself cannot be taken for that: ZeRO-3 gives the optimizer its parameters only while it steps.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # inside ZeRO's wrapper
    on_device = inner.defaults.get("fused") or inner.defaults.get("capturable")
    for unit in units_of(optimizer):
        state = optimizer.state[unit.key]
        if not state:
            state["step"] = torch.zeros((), device=unit.key.device if on_device else "cpu")
            state["exp_avg"] = torch.zeros_like(unit.key)
            state["exp_avg_sq"] = torch.zeros_like(unit.key)


def link_(optimizer: Any) -> None:
    """Let `safe_get_full_optimizer_state` and its like reach the state of every group under ZeRO-1 and 2.

    DeepSpeed 0.19 links state to parameters once, after the step of the first group, when other groups have none.
    """
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()


def step_counts(optimizer: Any, parameters: Sequence[nn.Parameter]) -> list[int]:
    """How many steps the optimizer has counted for each parameter."""
    return [int(optimizer.state.get(key, {}).get("step", 0)) for key in keys_of(optimizer, parameters)]


def write_step_counts(optimizer: Any, parameters: Sequence[nn.Parameter], counts: Sequence[int]) -> None:
    """Set what `step_counts` gives; the parameters of one unit have one count."""
    for key, count in zip(keys_of(optimizer, parameters), counts, strict=True):
        held = optimizer.state[key]["step"]
        if isinstance(held, Tensor):
            held.fill_(count)
        else:
            optimizer.state[key]["step"] = type(held)(count)


def keys_of(optimizer: Any, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """What the optimizer keeps the state of each parameter under."""
    keys = {id(parameter): unit.key for unit in units_of(optimizer) for parameter in unit.parameters}
    return [keys[id(parameter)] for parameter in parameters]


def moment_names(optimizer: Any) -> list[str]:
    """What the optimizer calls its moments: tensors as long as what they are kept for; [] before the first step."""
    for unit in units_of(optimizer):
        state = optimizer.state.get(unit.key, {})
        return [name for name, value in state.items() if isinstance(value, Tensor) and value.shape == unit.key.shape]
    return []


class OptimizerVerbs:
    """What every backend says of its optimizer in the same words: those of `Backend`."""

    def __init__(self, optimizer: Any, processes: Processes) -> None:
        self.optimizer = optimizer
        self.processes = processes

    def empty_optimizer(self, parameters: Sequence[nn.Parameter]) -> None:
        empty_(self.optimizer, parameters)

    def optimizer_is_empty(self, parameters: Sequence[nn.Parameter]) -> bool:
        return is_empty(self.optimizer, parameters)

    def begin_optimizer(self) -> None:
        begin_(self.optimizer)

    def step_counts(self, parameters: Sequence[nn.Parameter]) -> list[int]:
        return step_counts(self.optimizer, parameters)

    def write_step_counts(self, parameters: Sequence[nn.Parameter], counts: Sequence[int]) -> None:
        write_step_counts(self.optimizer, parameters, counts)
