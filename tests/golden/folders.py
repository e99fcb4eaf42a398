"""The golden models as folders that can be imported: Hugging Face's files and a tokenizer."""

import functools
import shutil
from pathlib import Path

from model.tokenizer import train_tokenizer

CASES = ("grouped", "multi_query", "multi_head")
HERE = Path(__file__).parent
VOCAB_SIZE = 320


def golden_folder(parent: Path, case: str) -> Path:
    """A copy of a golden model below `parent`, beside a tokenizer of its vocabulary."""
    folder = Path(shutil.copytree(HERE / case, parent / case))
    (folder / "tokenizer.model").write_bytes(tokenizer_bytes())
    return folder


@functools.cache
def tokenizer_bytes() -> bytes:
    letters = "abcdefghijklmnopqrstuvwxyz"
    text = " ".join(f"{one}{two}{one}" for one in letters for two in letters)
    return train_tokenizer([text], VOCAB_SIZE)
