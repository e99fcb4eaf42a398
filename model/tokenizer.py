"""A SentencePiece tokenizer whose encoding of raw text round-trips and is free of control ids."""

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import sentencepiece as spm

TURN_SYMBOLS = ("<start_of_turn>", "<end_of_turn>")

# User-defined pieces that are commands to the model. Other user-defined pieces, such as the runs
# of newlines and the HTML tags of Gemma's own vocabulary, are ordinary text.
_CONTROL_NAME = re.compile(
    r"<(unused\d+|(start|end)_of_(turn|image)|mask|2mass)>|\[(@BOS@|multimodal)\]"
)
_SPACE_MARK = "\u2581"  # SentencePiece's own sign for a space
_SPACE_MARK_BYTES = tuple(_SPACE_MARK.encode())
# SentencePiece leaves out longer texts without a word; this is as high as its option goes.
_MAX_TEXT_BYTES = 2**30


class Tokenizer:
    """Text to ids and back. `encode` adds neither bos nor eos."""

    def __init__(self, model_bytes: bytes) -> None:
        self.model_bytes = model_bytes
        self._processor = spm.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model_bytes)
        except RuntimeError as error:
            raise ValueError(
                f"these {len(model_bytes)} bytes are no SentencePiece model ({error}): give the "
                "contents of a .model file"
            ) from error
        self.vocab_size: int = self._processor.vocab_size()
        self.pad_id: int = self._processor.pad_id()
        self.eos_id: int = self._processor.eos_id()
        self.bos_id: int = self._processor.bos_id()
        self.unk_id: int = self._processor.unk_id()
        self._pieces = [self._piece(i) for i in range(self.vocab_size)]
        self._byte_ids = {
            piece[0]: i for i, piece in enumerate(self._pieces) if self._processor.IsByte(i)
        }
        if len(self._byte_ids) < 256:
            raise ValueError(
                "this SentencePiece model has no byte fallback, so some text would be lost: "
                "train it with byte_fallback=True"
            )
        names = [self._processor.IdToPiece(i) for i in range(self.vocab_size)]
        literals = [re.escape(name) for name in names if _CONTROL_NAME.fullmatch(name)]
        # The look-ahead finds overlapping names too; `(?!)` never matches.
        self._control = re.compile(f"(?=({'|'.join(literals) or '(?!)'}))")

    @classmethod
    def load(cls, source: str | Path | bytes) -> Self:
        """Load from the path of a .model file or from its bytes.

        Raises:
            ValueError: no SentencePiece model, or one without byte fallback.
        """
        return cls(source if isinstance(source, bytes) else Path(source).read_bytes())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the model bytes, in hexadecimal."""
        return hashlib.sha256(self.model_bytes).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of raw text; `decode` gives the very same text back.

        A control symbol spelt out in the text is encoded as the characters it is made of.

        Raises:
            ValueError: the text holds a lone surrogate, which UTF-8 cannot carry.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text holds a lone surrogate at character {error.start}, which UTF-8 cannot "
                "carry: clean it, for instance with text.encode('utf-8', 'replace').decode()"
            ) from error
        # Cut inside each spelt-out control symbol: its halves are ordinary text.
        cuts = [match.start() + 1 for match in self._control.finditer(text)]
        ids: list[int] = []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            for i, plain in enumerate(text[start:end].split(_SPACE_MARK)):
                if i:  # a literal space mark, which as a piece would read as a space
                    ids.extend(self._byte_ids[byte] for byte in _SPACE_MARK_BYTES)
                ids.extend(self._processor.EncodeAsIds(plain))
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`; control ids vanish, bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self._pieces[i] for i in ids).decode("utf-8", errors="replace")

    def piece_bytes(self) -> np.ndarray:
        """int32[V]: UTF-8 bytes of text each id stands for, 0 for control ids."""
        return np.array([len(piece) for piece in self._pieces], np.int32)

    def _piece(self, i: int) -> bytes:
        processor, name = self._processor, self._processor.IdToPiece(i)
        if processor.IsByte(i):
            return bytes([int(name[3:-1], 16)])  # "<0x41>"
        if processor.IsControl(i) or processor.IsUnknown(i) or _CONTROL_NAME.fullmatch(name):
            return b""
        return name.replace(_SPACE_MARK, " ").encode()


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, seed: int = 0) -> bytes:
    """Train a Gemma-like vocabulary and return the SentencePiece model's bytes.

    Byte-pair merges over unnormalised text, digits apart, whitespace kept, bytes as fallback;
    pad, eos, bos and unk are 0 to 3 and `TURN_SYMBOLS` follow. The same texts in the same order
    give the same bytes.

    Raises:
        ValueError: the vocabulary is too small for the fixed pieces, or the texts too few for it.
    """
    model = io.BytesIO()
    spm.set_random_generator_seed(seed)
    try:
        spm.SentencePieceTrainer.Train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            split_digits=True,
            byte_fallback=True,
            add_dummy_prefix=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            bos_piece="<bos>",
            eos_piece="<eos>",
            user_defined_symbols=list(TURN_SYMBOLS),
            max_sentence_length=_MAX_TEXT_BYTES,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        # The text behind the last bracket is meant for people; it is empty when no text came in.
        reason = str(error).rpartition("]")[2].strip() or "no text was given"
        raise ValueError(
            f"cannot train a tokenizer of {vocab_size} pieces on these texts ({reason}): bytes, "
            "control symbols and single characters need a few hundred pieces, and many pieces "
            "need much text, so give more text or change vocab_size"
        ) from error
    return model.getvalue()
