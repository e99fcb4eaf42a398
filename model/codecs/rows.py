"""Rows of hidden states to encoded targets, with the logits of a piece of one row at a time.

Legend: B rows, T positions, D width, n pieces, C positions of a piece, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from model.codecs.base import HIDDEN_DTYPE, Codec, Encoded, RowKeys
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
    row_keys_B: RowKeys,
) -> Encoded:
    """What `codec` makes of a model's final hidden states; [B, T, V] never exists.

    A piece lies within one row, so nothing of another row takes part in its bytes.
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
        x_1CD, key_12, first = piece
        logits_1CV = unembed(embedding, model, x_1CD)[..., : model.vocab_size]
        return codec.encode(logits_1CV, key_12, x_1CD, first)

    pieces = (
        x_BTD.reshape(B * num_pieces, 1, size, D),
        jnp.repeat(jnp.asarray(row_keys_B), num_pieces, axis=0)[:, None],
        jnp.tile(jnp.arange(num_pieces) * size, B),
    )
    encoded = jax.lax.map(encode_piece, pieces)
    return {
        name: array.reshape(B, num_pieces * size, *array.shape[3:])[:, :T]
        for name, array in encoded.items()
    }
