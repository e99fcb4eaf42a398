"""Small runs for tests: text, settings, and a teacher, without a cluster."""

import shutil
from pathlib import Path
from typing import Any

from benchmarks.bare import train_here
from configs.load import parse_run

VOCAB_SIZE = 320


def text_folder(path: Path) -> Path:
    """Forty small files of made-up prose; always the same."""
    folder = path / "text"
    folder.mkdir(exist_ok=True)
    words = [
        "the",
        "still",
        "house",
        "keeps",
        "its",
        "fire",
        "low",
        "and",
        "the",
        "copper",
        "warm",
        "until",
        "the",
        "morning",
        "run",
    ]
    for number in range(40):
        chosen = [words[(number * 7 + i * i) % len(words)] for i in range(120)]
        (folder / f"{number:02d}.txt").write_text(" ".join(chosen) + ".\n")
    return folder


def tiny_values(storage: Path, name: str) -> dict[str, Any]:
    """A next-token run of seconds on `text_folder`; change what a test is about."""
    return {
        "name": name,
        "storage": str(storage),
        "steps": 4,
        "model": {"preset": "tiny", "vocab_size": VOCAB_SIZE},
        "data": {
            "sources": [{"name": "prose", "path": str(storage / "text")}],
            "tokenizer": {"kind": "train", "vocab_size": VOCAB_SIZE},
            "row_length": 32,
            "held_out_fraction": 0.2,
            "held_out_rows": 8,
        },
        "batch": {"rows": 8},
        "checkpoint": {"every_steps": 2, "snapshot_every_steps": None},
        "evaluation": {"rows_per_batch": 4},
        "tracking": {"wandb": "off"},
        "record": {"flush_s": 0.2},
    }


def make_teacher(storage: Path, text: Path, name: str = "teacher") -> str:
    """A run `name` with a checkpoint, trained for a few steps in this process; its state digest."""
    assert text.parent == storage
    values = tiny_values(storage, name) | {"cluster": {"devices_per_host": 8}}
    return train_here(parse_run(values, "test")).finish.digest


def copy_storage(storage: Path, to: Path) -> Path:
    """A storage of one's own with all that another one holds, below `to`, which is there."""
    shutil.copytree(storage, to, dirs_exist_ok=True)
    for config in (to / "runs").glob("*/config.yaml"):
        config.write_text(config.read_text().replace(str(storage), str(to)))
    return to
