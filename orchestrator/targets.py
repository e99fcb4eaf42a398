"""Stored targets as users see them: what there is, whether it is sound, and what may go."""

from collections.abc import Callable, Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from orchestrator.prune_targets import keys_in_use, to_prune
from workers.target_store import (
    Damage,
    Stored,
    describe_targets,
    find_damage,
    remove_targets,
    stored_keys,
)
from workers.targets_protocol import TargetSpec

MISSING = "–"


def targets_list(storage_url: str) -> Group:
    """What is stored: the classes of each teacher, codec, data set and seed."""
    groups: dict[str, list[Stored]] = {}
    for key in stored_keys(storage_url):
        stored = describe_targets(storage_url, key)
        groups.setdefault(_heading(stored.spec), []).append(stored)
    if not groups:
        return Group(Text(f"No targets are stored below {storage_url}"))
    parts: list[Text | Table] = []
    for heading, keys in sorted(groups.items()):
        parts += [Text(heading), _classes_table(keys), Text()]
    return Group(*parts[:-1])


def _heading(spec: TargetSpec | None) -> str:
    if spec is None:
        return "of unknown origin: spec.json is missing or damaged"
    return (
        f"{spec.codec}, seed {spec.seed}\n"
        f"teacher {spec.teacher_digest}\ndata set {spec.dataset_digest}"
    )


def _classes_table(keys: Sequence[Stored]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("key", no_wrap=True)
    table.add_column("class", overflow="fold")
    for name in ("rows", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("damaged", no_wrap=True)
    for stored in keys:
        sameness = MISSING if stored.spec is None else stored.spec.sameness
        damaged = f"{stored.num_damaged} files" if stored.num_damaged else ""
        numbers = [f"{stored.num_rows:,}", f"{stored.num_bytes:,}", damaged]
        table.add_row(*map(Text, (stored.key, sameness, *numbers)))
    return table


def verify_targets(
    storage_url: str, keys: Sequence[str], repair: bool, console: Console
) -> list[Damage]:
    """Reads all rows of some keys, or of all, and names what is damaged.

    With `repair`, damaged files are removed, so that their rows are asked for again.

    Raises:
        ValueError: there is no such key.
    """
    found: list[Damage] = []
    for key in keys or stored_keys(storage_url):
        check_key(storage_url, key)
        of_key = list(find_damage(storage_url, key))
        for damage in of_key:
            row = f" row {damage.row.source}-{damage.row.index}" if damage.row else ""
            console.print(f"{key}/{damage.file}{row} {damage.reason}", highlight=False)
        for file in sorted({damage.file for damage in of_key} if repair else ()):
            remove_targets(storage_url, key, file)
            console.print(f"{key}/{file} is removed", highlight=False)
        if not of_key:
            console.print(f"{key} is sound", highlight=False)
        found += of_key
    return found


def prune_targets(
    storage_url: str, keep_bytes: int, confirm: Callable[[str], None], console: Console
) -> None:
    """Removes whole keys until at most `keep_bytes` are left; those of runs under way stay.

    Args:
        confirm: asked before anything is removed; raises to end it.
    """
    keys = keys_in_use(storage_url)
    chosen = to_prune(keys, keep_bytes)
    for key in chosen:
        console.print(f"{key.key} {key.num_bytes:,} bytes, {key.last_use}", highlight=False)
    if chosen:
        confirm(f"Remove these targets below {storage_url}?")
    for key in chosen:
        remove_targets(storage_url, key.key)
    left_bytes = sum(key.num_bytes for key in keys if key not in chosen)
    console.print(f"{len(chosen)} keys are removed, {left_bytes:,} bytes stay", highlight=False)
    if left_bytes > keep_bytes:
        runs = sorted({run for key in keys for run in key.under_way})
        console.print(f"The rest is used by runs under way: {', '.join(runs)}", highlight=False)


def check_key(storage_url: str, key: str) -> None:
    """Raises ValueError, which names those that there are, for a key without targets."""
    known = stored_keys(storage_url)
    if key not in known:
        raise ValueError(
            f"There are no targets {key!r} below {storage_url} (keys: {', '.join(known) or 'none'})"
        )
