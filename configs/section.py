"""The base of every part of the configuration."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A frozen group of settings that knows all of its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def changeable(default: Any = ..., **kwargs: Any) -> Any:
    """A field whose value may change when a run is resumed.

    Changing it keeps the meaning of the state and of the order of the data; the change is
    recorded as an event of the run. Every other field is fixed for the life of a run.
    """
    return Field(default, json_schema_extra={"changeable": True}, **kwargs)
