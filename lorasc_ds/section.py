"""What all parts of a configuration are made of. No torch here."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class PublicData(Section):
    """A public data set: from the hub, or from the files of its original release."""

    data_dir: str | None = Field(
        default=None, description="Folder with the files of the original release; null: from the hub."
    )
    revision: str | None = Field(
        default=None, description="Branch, tag or commit of the hub data set; null: the one the task names."
    )
