"""The base of every part of the configuration, and the list of its settings."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

# Of names that become folders, and parts of longer names.
NAME_PATTERN = r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$"


class Section(BaseModel):
    """A frozen group of settings that knows all of its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError(f"should be {in_words(cls.model_fields[info.field_name])}")
        return value


def changeable(default: Any = ..., **kwargs: Any) -> Any:
    """A field whose value may change when a run is resumed.

    Changing it keeps the meaning of the state and of the order of the data; the change is
    recorded as an event of the run. Every other field is fixed for the life of a run.
    """
    return Field(default, json_schema_extra={"changeable": True}, **kwargs)


@dataclass(frozen=True)
class Setting:
    """One field with its dotted path; the items of a list have the number `N`."""

    path: str
    field: FieldInfo
    group: type[BaseModel] | None
    """The class of the settings below it, if it is a group or a list of groups."""

    @property
    def changeable(self) -> bool:
        extra = self.field.json_schema_extra
        return isinstance(extra, dict) and bool(extra.get("changeable"))


def settings_of(section: type[BaseModel], prefix: str = "") -> Iterator[Setting]:
    """Every setting of a section: its own fields in order, each followed by those below it."""
    for name, field in section.model_fields.items():
        group, is_list = _group(field)
        yield Setting(prefix + name, field, group)
        if group is not None:
            yield from settings_of(group, f"{prefix}{name}.N." if is_list else f"{prefix}{name}.")


def is_index(key: str) -> bool:
    """Whether a part of a path numbers an item of a list."""
    return key.isascii() and key.isdigit() and len(key) < 10


def pattern_of(path: str) -> str:
    """The path of a setting as `settings_of` names it: numbers of items become `N`."""
    return ".".join("N" if is_index(part) else part for part in path.split("."))


def in_words(field: FieldInfo) -> str:
    """What a field takes, such as `a whole number ≥ 1`."""
    bounds = {
        sign: getattr(rule, name)
        for rule in field.metadata
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if hasattr(rule, name)
    }
    limits = " and ".join(f"{sign} {value}" for sign, value in bounds.items())
    words = [_type_in_words(part) for part in _alternatives(field.annotation)]
    some = any(getattr(rule, "min_length", 0) for rule in field.metadata)
    pattern = next((rule.pattern for rule in field.metadata if hasattr(rule, "pattern")), None)
    parts = [
        words[0] + (" that is not empty" if some else ""),
        f"like `{pattern}`" if pattern else "",
        limits,
    ]
    return " ".join(part for part in parts if part) + (" or null" if "null" in words else "")


def _group(field: FieldInfo) -> tuple[type[BaseModel] | None, bool]:
    """The section that a field holds, and whether it holds a list of them."""
    for part in _alternatives(field.annotation):
        is_list = get_origin(part) is tuple
        kind = get_args(part)[0] if is_list else part
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind, is_list
    return None, False


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _type_in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        *others, last = (f"`{choice}`" for choice in get_args(kind))
        return f"{', '.join(others)} or {last}" if others else last
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return "a list of texts" if item is str else "a list of groups"
    plain = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        NoneType: "null",
    }
    return plain.get(kind, "a group of settings")
