"""Rows of hidden states to encoded targets, with the logits of a piece of one row at a time.

Legend: B rows, T positions, D width, C positions of a piece, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from model.codecs.base import HIDDEN_DTYPE, Codec, Encoded, ScoredPiece
from model.codecs.whole import HiddenCodec
from model.config import ModelConfig
from model.transformer import Params, unembed

# Of a piece's float32 logits: 512 tokens at a vocabulary of 256k, which keep matrix units busy.
PIECE_LOGITS_BYTES = 1 << 29


def encode_rows(
    codec: Codec,
    params: Params,
    model: ModelConfig,
    x_BTD: Float[Array, "B T D"],
    row_keys_B2: UInt32[Array, "B 2"] | UInt32[np.ndarray, "B 2"],
) -> Encoded:
    """What `codec` makes of a model's final hidden states, as arrays of leading shape [B, T].

    Whole logits [B, T, V] never exist. A piece lies within one row, so nothing of another row
    takes part in its bytes.

    Args:
        params: of `model`; its embedding is taken in the type of the hidden states.
        row_keys_B2: see `row_key`.

    Raises:
        ValueError: as `Codec.encode`.
    """
    B, T, D = x_BTD.shape
    most = max(PIECE_LOGITS_BYTES // (4 * model.vocab_size), 1)
    num_pieces = -(-T // most)
    size = -(-T // num_pieces)
    if isinstance(codec, HiddenCodec):
        x_BTD = x_BTD.astype(HIDDEN_DTYPE)  # the logits are to be those of what is sent
    x_BTD = jnp.pad(x_BTD, ((0, 0), (0, num_pieces * size - T), (0, 0)))
    embedding = {"embedding": params["embedding"].astype(x_BTD.dtype)}

    def encode_piece(piece: tuple[Array, Array, Array]) -> Encoded:
        x_CD, row_key_2, first_position = piece
        logits_CV = unembed(embedding, model, x_CD[None])[0, :, : model.vocab_size]
        return codec.encode(ScoredPiece(logits_CV, row_key_2, x_CD, first_position))

    pieces = (
        x_BTD.reshape(B * num_pieces, size, D),
        jnp.repeat(jnp.asarray(row_keys_B2), num_pieces, axis=0),
        jnp.tile(jnp.arange(num_pieces) * size, B),
    )
    encoded = jax.lax.map(encode_piece, pieces)
    return {
        name: array.reshape(B, num_pieces * size, *array.shape[2:])[:, :T]
        for name, array in encoded.items()
    }
