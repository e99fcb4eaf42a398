"""What is wrong with a configuration, in words for the person who wrote it."""

import json
from dataclasses import dataclass
from typing import Any, Final

from pydantic_core import PydanticCustomError

NO_VALUE: Final = object()


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong; `involves` names the other settings that it depends on."""

    path: str
    value: Any
    message: str
    involves: tuple[str, ...] = ()

    def __str__(self) -> str:
        value = "" if self.value is NO_VALUE else f"{shown(self.value)} "
        return f"{self.path}: {value}{self.message}" if self.path else f"{value}{self.message}"

    def touches(self, paths: set[str]) -> bool:
        """Whether it depends on any of `paths`, on a part of one or on a group around one."""
        return any(
            own == path or own.startswith(f"{path}.") or path.startswith(f"{own}.")
            for own in (self.path, *self.involves)
            for path in paths
        )


class ConfigError(ValueError):
    """A configuration that cannot be run; its message lists every fault that was found."""

    def __init__(self, where: str, faults: list[Fault]):
        self.faults = faults
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        super().__init__("\n".join([f"{where}: {count}", *(f"  {fault}" for fault in faults)]))


def shown(value: Any) -> str:
    """A value as one would write it in a file, cut to 60 characters."""
    return cut(json.dumps(value, ensure_ascii=False, default=str))


def cut(text: str) -> str:
    """The text, or its beginning where it is longer than 60 characters."""
    return text if len(text) <= 60 else text[:57] + "…"


def group_fault(setting: str, message: str, *involves: str) -> PydanticCustomError:
    """What a validator of a whole group raises to blame one of the group's settings."""
    # As ctx, not as text: pydantic would fill in braces of the message.
    context = {"setting": setting, "message": message, "involves": involves}
    return PydanticCustomError("group_fault", "{message}", context)
