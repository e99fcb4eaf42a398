"""Storage that refuses what is written below a folder."""

from pathlib import Path


def break_storage(folder: Path) -> None:
    """Nobody, root included, can write into a folder whose name is a file's."""
    if folder.exists():
        folder.rename(folder.with_suffix(".aside"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("in the way")


def mend_storage(folder: Path) -> None:
    folder.unlink()
    aside = folder.with_suffix(".aside")
    if aside.exists():
        aside.rename(folder)
