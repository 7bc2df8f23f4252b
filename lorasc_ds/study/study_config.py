"""What a study is, as its YAML says it: tasks x adapters x strategies x sweeps x grids x seeds. No torch here."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from lorasc_ds.section import Section

Settings = dict[str, Any]  # dotted key -> value
Axes = dict[str, Annotated[tuple[Any, ...], Field(strict=False, min_length=1)]]  # dotted key -> values
Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
PLAIN = "plain"  # the strategy whose row has the adapter's name alone


class Variant(Section):
    """A member of an axis."""

    set: Settings = Field(default_factory=dict, description="Settings, laid over the recipe's.")
    grid: Axes = Field(
        default_factory=dict, description="Values of which dev chooses, for every row and task by itself."
    )


class TaskVariant(Variant):
    scores: dict[str, str] | None = Field(default=None, description="In place of the study's.")
    select_by: str | None = Field(default=None, description="In place of the study's.")


class StrategyVariant(Variant):
    sweep: Axes = Field(default_factory=dict, description="As the study's, for this strategy alone.")
    adapters: Names | None = Field(default=None, description="Those that it is tried with; null: all.")


class StudyConfig(Section):
    """A study. Later settings win: recipe, `set`, task, adapter, strategy, sweep, grid, command line."""

    title: str = Field(description="Heading of the tables.")
    recipe: str = Field(description="What all runs begin from, as a path from the study's file.")
    set: Settings = Field(default_factory=dict, description="Settings of all runs, laid over the recipe's.")
    tasks: dict[str, TaskVariant] = Field(description="Columns: name -> what makes the task.", min_length=1)
    adapters: dict[str, Variant] = Field(
        default_factory=lambda: {"LoRA": Variant()}, description="Blocks of rows.", min_length=1
    )
    strategies: dict[str, StrategyVariant] = Field(
        description="Rows; `plain` has the adapter's name. The first, with the first adapter, is what others are"
        " compared with.",
        min_length=1,
    )
    sweep: Axes = Field(
        default_factory=dict, description="Values that each make a row of their own; one key at a time, not crossed."
    )
    grid: Axes = Field(default_factory=dict, description="Values of which dev chooses, for all runs.")
    seeds: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] = Field(description="training.seed of each.")
    scores: dict[str, str] = Field(
        description="What is reported: name -> SPLIT/METRIC of the run, TASK/SPLIT/METRIC of `evaluate`, ledger/MEASURE"
        " of `inspect`, or the difference `A - B` of two of them.",
        min_length=1,
    )
    trade_off: Annotated[tuple[str, str], Field(strict=False)] | None = Field(
        default=None, description="Two of the scores, across and up, drawn against each other at every learning rate."
    )
    select_by: str = Field(default="dev/accuracy", description="The metric on dev that chooses from the grids.")
    evaluate: Settings = Field(
        default_factory=dict, description="Flags of launch/evaluate.py, for every run when it is trained."
    )
    deepspeed: str | None = Field(default=None, description="DeepSpeed settings of all runs, as in ds_configs/.")
    inspect: bool = Field(default=False, description="Measure every run's ledger, as launch/inspect_ledger.py does.")
    paper: str | None = Field(default=None, description="The table of the paper that is quoted beside ours.")

    @field_validator("select_by")
    @classmethod
    def by_dev(cls, value: str) -> str:
        if not value.startswith("dev/"):
            raise ValueError(
                f"select_by is {value!r}: a metric of dev such as dev/accuracy is needed; test is reported"
            )
        return value

    @model_validator(mode="after")
    def consistent(self) -> StudyConfig:
        for name, task in self.tasks.items():
            if task.select_by is not None and not task.select_by.startswith("dev/"):
                raise ValueError(f"tasks.{name}.select_by is {task.select_by!r}: a metric of dev is needed")
            if task.scores is not None and task.scores.keys() != self.scores.keys():
                raise ValueError(
                    f"tasks.{name}.scores names {', '.join(task.scores)}: the study's names are needed,"
                    f" {', '.join(self.scores)}"
                )
        if self.trade_off is not None and len({*self.trade_off} & self.scores.keys()) < 2:
            named, known = ", ".join(self.trade_off), ", ".join(self.scores)
            raise ValueError(f"trade_off names {named}: two different ones of {known} are needed")
        for name in (*self.tasks, *self.adapters, *self.strategies):
            if "," in name:  # of the command line's lists
                raise ValueError(f"the name {name!r} has a comma: write it without")
        for name, strategy in self.strategies.items():
            for adapter in strategy.adapters or ():
                if adapter not in self.adapters:
                    raise ValueError(
                        f"strategies.{name}.adapters names {adapter!r}: one of {', '.join(self.adapters)} is needed"
                    )
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} names one twice: leave it out")
        return self
