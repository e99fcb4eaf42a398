"""The files of a source, in a fixed order.

A file is named by its path below the source, never by an absolute one, so that moving a corpus
changes nothing.
"""

import re
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass

from fsspec.utils import glob_translate

from configs.data import FORMAT_ENDINGS, SourceConfig, TextFormat
from workers import storage


@dataclass(frozen=True)
class SourceFile:
    """One file of a source; `name` is its path below the source, `limit` ends it early."""

    source: str
    name: str
    url: str
    num_bytes: int
    format: TextFormat
    limit: int | None = None


def list_files(source: SourceConfig) -> list[SourceFile]:
    """The files of a source, sorted by name, up to its `max_bytes`.

    Raises:
        ValueError: the path does not exist, or no file in it matches.
    """
    root_url = source.path.replace("{stdlib}", sysconfig.get_path("stdlib"))
    fs, root = storage.open_storage(root_url)
    if not fs.exists(root):
        raise ValueError(
            f"source {source.name!r}: path {root_url} does not exist; correct the source's path"
        )
    if fs.isfile(root):
        folder_url, _, name = fs.unstrip_protocol(root).rpartition("/")
        found = {name: fs.info(root)["size"]}
    else:
        folder_url, matches = fs.unstrip_protocol(root), _matcher(source)
        listed = storage.list_tree(root_url)
        found = {name: num_bytes for name, num_bytes in listed.items() if matches(name)}
    if not found:
        wanted = f"include {list(source.include)}" if source.include else f"format {source.format}"
        raise ValueError(
            f"source {source.name!r}: no file below {root_url} matches {wanted} and escapes "
            f"exclude {list(source.exclude)}; correct the source's path, include or exclude"
        )
    files, remaining = [], source.max_bytes
    for name, num_bytes in found.items():
        if remaining is not None and remaining <= 0:
            break
        limit = remaining if remaining is not None and remaining < num_bytes else None
        format = _format_of(name) if source.format == "auto" else source.format
        url = storage.join(folder_url, name)
        files.append(SourceFile(source.name, name, url, num_bytes, format, limit))
        if remaining is not None:
            remaining -= num_bytes
    return files


def _matcher(source: SourceConfig) -> Callable[[str], bool]:
    formats = FORMAT_ENDINGS if source.format == "auto" else (source.format,)
    usual = tuple(f"**/*{ending}" for format in formats for ending in FORMAT_ENDINGS[format])
    include = re.compile("|".join(map(glob_translate, source.include or usual)))
    exclude = [re.compile(glob_translate(pattern)) for pattern in source.exclude]

    def matches(name: str) -> bool:
        hidden = any(part.startswith(".") for part in name.split("/"))
        return (
            not hidden
            and include.match(name) is not None
            and not any(pattern.match(name) for pattern in exclude)
        )

    return matches


def _format_of(name: str) -> TextFormat:
    for format, endings in FORMAT_ENDINGS.items():
        if name.lower().endswith(endings):
            return format
    return "text"
