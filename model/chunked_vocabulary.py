"""One device's share of an output vocabulary: logits of its embedding rows, and what all share.

Legend: C tokens, D width, R embedding rows on this device, K ids per token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.kernels import MASKED_LOGIT
from model.layers import soft_cap


class VocabularyShare(NamedTuple):
    """Embedding rows in the type of the products; `axes` name the mesh axes that divide them."""

    embedding_RD: Float[Array, "R D"]
    final_softcap: float | Float[Array, ""]
    vocab_size: int
    axes: tuple[str, ...]

    def logits(self, x_CD: Float[Array, "C D"]) -> Float[Array, "C R"]:
        """Soft-capped float32 logits as `transformer.unembed` makes them, of these rows."""
        product_CR = jnp.einsum(
            "CD,RD->CR", x_CD, self.embedding_RD, preferred_element_type=jnp.float32
        )
        real_R = self._first() + jnp.arange(len(self.embedding_RD)) < self.vocab_size
        return jnp.where(real_R, soft_cap(product_CR, self.final_softcap), MASKED_LOGIT)

    def slope(self, logits: Float[Array, "C n"]) -> Float[Array, "C n"]:
        """The derivative of the soft-cap where it gave `logits`; 0 for a row never predicted."""
        return jnp.maximum(1 - jnp.square(logits / self.final_softcap), 0)

    def total(self, values_CR: Float[Array, "C R"]) -> Float[Array, " C"]:
        """The sum over the whole vocabulary."""
        return jax.lax.psum(values_CR.sum(axis=-1), self.axes)

    def log_norm(self, logits_CR: Float[Array, "C R"]) -> Float[Array, " C"]:
        """log Σ exp over the whole vocabulary."""
        peak_C = jax.lax.pmax(logits_CR.max(axis=-1), self.axes)
        return peak_C + jnp.log(self.total(jnp.exp(logits_CR - peak_C[:, None])))

    def pick(self, logits_CR: Float[Array, "C R"], ids_CK: Int[Array, "C K"]) -> Array:
        """The logits [C, K] of `ids_CK`, whichever device has them; 0 of an id that none has."""
        mine_CK = jnp.take_along_axis(
            logits_CR, self._local(ids_CK), axis=-1, mode="fill", fill_value=0.0
        )
        return jax.lax.psum(mine_CK, self.axes)

    def without(
        self, logits_CR: Float[Array, "C R"], ids_CK: Int[Array, "C K"]
    ) -> Float[Array, "C R"]:
        """Logits with those of `ids_CK` so low that their probability is exactly zero."""
        tokens_C1 = jnp.arange(len(logits_CR))[:, None]
        return logits_CR.at[tokens_C1, self._local(ids_CK)].set(MASKED_LOGIT, mode="drop")

    def subtract(
        self, values_CR: Float[Array, "C R"], ids_CK: Int[Array, "C K"], less_CK: Array
    ) -> Float[Array, "C R"]:
        """`values_CR` less `less_CK` at `ids_CK`; an id that occurs twice counts twice."""
        tokens_C1 = jnp.arange(len(values_CR))[:, None]
        return values_CR.at[tokens_C1, self._local(ids_CK)].add(-less_CK, mode="drop")

    def _first(self) -> Int[Array, ""] | int:
        return jax.lax.axis_index(self.axes) * len(self.embedding_RD)

    def _local(self, ids_CK: Int[Array, "C K"]) -> Int[Array, "C K"]:
        """Row numbers here; one past the last for ids that lie elsewhere."""
        local_CK, num_rows = ids_CK - self._first(), len(self.embedding_RD)
        return jnp.where((local_CK >= 0) & (local_CK < num_rows), local_CK, num_rows)
