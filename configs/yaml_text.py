"""YAML as people mean it: version 1.2's plain values, and no key twice.

PyYAML follows version 1.1, where `off` is false, `1e-3` is text and `1:30` is ninety.
"""

import re
from collections.abc import Callable
from typing import Any

import yaml

from configs.fault import cut

MOST_NESTED = 50
"""Groups and lists within each other: more than any setting has, fewer than Python can follow."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (a name of PyYAML's)
    yaml_constructors: dict[Any, Any] = {  # noqa: RUF012 (another one)
        # What a configuration can hold; every other tag is refused with its place.
        None: yaml.SafeLoader.construct_undefined,
    }
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > MOST_NESTED:
            raise yaml.constructor.ConstructorError(
                problem=f"groups or lists are nested more than {MOST_NESTED} deep",
                problem_mark=self.peek_event().start_mark,
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


# yaml.org/spec/1.2.2, section 10.3.2, without the octal and hexadecimal numbers.
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?[0-9]+", [*"-+0123456789"]),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)"
        r"|\.(nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first
    )


def _text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    value = str(loader.construct_scalar(node))
    value.encode()  # half of a surrogate pair is no text
    return value


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value)  # 1.1 reads 010 as eight


def _list(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> list[Any]:
    return loader.construct_sequence(node, deep=True)


def _map(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    doubled = next((key for key in keys if keys.count(key) > 1), None)
    if doubled is not None:
        raise yaml.constructor.ConstructorError(
            problem=f"{doubled!r} is set twice in one group", problem_mark=node.start_mark
        )
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


def _named(kind: str, construct: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Tells the place of what cannot be constructed."""

    def constructed(loader: yaml.SafeLoader, node: Any) -> Any:
        try:
            return construct(loader, node)
        except (ValueError, KeyError):
            problem = f"{cut(repr(node.value))} is no {kind}"
            mark = node.start_mark
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=mark) from None

    return constructed


for _tag, _kind, _construct in (
    ("null", "null", yaml.SafeLoader.construct_yaml_null),
    ("bool", "true or false", yaml.SafeLoader.construct_yaml_bool),
    ("int", "whole number that can be read", _int),
    ("float", "number", yaml.SafeLoader.construct_yaml_float),
    ("str", "text", _text),
    ("seq", "list", _list),
    ("map", "group", _map),
):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _named(_kind, _construct))


def parse_yaml(text: str) -> Any:
    """The value that a YAML text holds.

    Raises:
        ValueError: the text is not YAML, with the place in one sentence.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"not valid YAML: {error.problem or error.context}{place}") from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise ValueError(
            f"not valid YAML: the character {chr(error.character)!r} cannot stand in a file "
            f"(line {line}, column {column})"
        ) from None
