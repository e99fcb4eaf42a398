"""The tokenizer: raw text round-trips, control ids stay out, training is reproducible."""

import io

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.tokenizer import TURN_SYMBOLS, Tokenizer, train_tokenizer

TEXTS = [
    f"def {noun}_{verb}(it):\n    return 3.14159 * {verb}ed ** {noun} # ünïcode ☃ <b>{noun}</b>\n"
    for noun in ("area", "circle", "radius", "quotient", "vector")
    for verb in ("measur", "comput", "stor", "invert", "multipli")
]
TRAPS = [
    *TURN_SYMBOLS,
    "<<start_of_turn>",
    "<start_of_turn><start_of_turn",
    "<start_<end_of_turn>of_turn>",
    "<pad><eos><bos><unk></s>",
    "<0x41>",
    "\u2581",
    "a \u2581\u2581 b",
    "\x00",
    "  leading, trailing  ",
    "\r\n\t\n\n\n",
    "\ufffd",
    "e\u0301 \u200d\U0001f9d1\u200d\U0001f680",
]


@pytest.fixture(scope="module")
def model_bytes():
    return train_tokenizer(TEXTS, 400)


@pytest.fixture(scope="module")
def tokenizer(model_bytes):
    return Tokenizer.load(model_bytes)


def with_traps(test):
    for trap in TRAPS:
        test = example(text=trap)(test)
    return test


text = st.text(st.characters(exclude_categories=["Cs"]))
spliced = st.lists(st.sampled_from([*TRAPS, " ", "<", "start_of_turn>"]) | text).map("".join)


@with_traps
@given(text=text | spliced)
@settings(max_examples=200, deadline=None)
def test_raw_text_round_trips_without_control_ids(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    sizes = tokenizer.piece_bytes()[ids]
    assert (sizes > 0).all()  # controls have no bytes
    assert sizes.sum() == len(text.encode())


def test_special_ids_are_those_of_gemma(tokenizer):
    ids = (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id)
    assert ids == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 400
    sizes = tokenizer.piece_bytes()
    assert sizes.dtype == np.int32 and sizes.shape == (400,)
    assert (sizes[:6] == 0).all() and (sizes[6:] > 0).all()  # 4 specials, 2 turn symbols
    assert tokenizer.decode([2, 4, *tokenizer.encode("hi"), 5, 1]) == "hi"


def test_digits_stay_apart_and_frequent_words_come_together(tokenizer):
    assert len(tokenizer.encode("31415")) == 5
    assert len(tokenizer.encode("return")) == 1


def test_user_defined_text_pieces_are_text_and_unused_ones_control():
    """As in Gemma's own vocabulary, where runs of newlines and tags are user-defined pieces."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<unused7>", "<mask>", "[multimodal]", "\n\n", "<table>"],
        minloglevel=2,
    )
    tokenizer = Tokenizer.load(model.getvalue())
    text = "<table>\n\n<unused7><mask>[multimodal]"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    names = [tokenizer._processor.IdToPiece(i) for i in ids]
    assert names[:2] == ["<table>", "\n\n"]
    assert not {"<unused7>", "<mask>", "[multimodal]"} & set(names)


def test_training_is_reproducible_and_the_digest_names_the_model(model_bytes, tokenizer, tmp_path):
    assert train_tokenizer(iter(TEXTS), 400) == model_bytes
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_bytes)
    loaded = Tokenizer.load(path)
    assert loaded.digest == tokenizer.digest and len(loaded.digest) == 64
    assert loaded.model_bytes == model_bytes
    assert Tokenizer.load(train_tokenizer(TEXTS, 390)).digest != loaded.digest


def test_long_texts_are_not_left_out():
    text = "".join(f"{word} " for word in ["zebra", "quagga"] * 1000)
    tokenizer = Tokenizer.load(train_tokenizer([text], 285))
    assert len(tokenizer.encode("zebra")) < 5


def test_training_says_what_to_do_when_text_and_size_do_not_fit(capfd):
    with pytest.raises(ValueError, match=r"100000 pieces.*give more text"):
        train_tokenizer(TEXTS, 100_000)
    with pytest.raises(ValueError, match=r"20 pieces.*change vocab_size"):
        train_tokenizer(TEXTS, 20)
    with pytest.raises(ValueError, match="no text was given"):
        train_tokenizer([], 400)
    assert capfd.readouterr().err == ""


def test_bytes_that_are_no_model_and_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(ValueError, match="no SentencePiece model"):
        Tokenizer.load(b"not a model")
    with pytest.raises(ValueError, match="surrogate at character 2"):
        tokenizer.encode("ab\ud800")


def test_a_model_without_byte_fallback_is_refused():
    model = io.BytesIO()
    spm.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=120,
        model_type="bpe",
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="byte_fallback=True"):
        Tokenizer.load(model.getvalue())
