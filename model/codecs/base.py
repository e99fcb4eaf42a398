"""What a codec is, and the three forms of targets that the losses take.

Legend: B rows, T positions, V vocabulary, M targets per position, R embedding rows, D the
teacher's width.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, UInt32

from model.codecs.values import VALUE_TYPES

Encoded = dict[str, Array]
RowKeys = UInt32[Array, "B 2"] | UInt32[np.ndarray, "B 2"]

HIDDEN_DTYPE = jnp.bfloat16


class SparseTargets(NamedTuple):
    """Target probabilities of a few tokens per position; an id may occur more than once.

    The loss is −Σ weight · log q. With `tail_BT`, the ids are distinct and all other tokens
    together are one more target of that probability: − tail · log(1 − Σ q of the ids).
    """

    ids_BTM: Int[Array, "B T M"]
    weights_BTM: Float[Array, "B T M"]
    tail_BT: Float[Array, "B T"] | None = None


class HiddenTargets(NamedTuple):
    """A teacher's whole distribution: its final hidden state, and what makes logits of it.

    Its width and its number of embedding rows are its own, its vocabulary is the student's.
    """

    x_BTD: Float[Array, "B T D"]
    embedding_RD: Float[Array, "R D"]
    final_softcap: float | Float[Array, ""]
    log_norm_BT: Float[Array, "B T"] | None = None
    """log Σ exp of the logits over the temperature; where it is not known it is computed."""


class FullTargets(NamedTuple):
    """A teacher's whole distribution as it is: log-probabilities of every token."""

    log_probs_BTV: Float[Array, "B T V"]


Targets = SparseTargets | HiddenTargets | FullTargets


class Unembedding(NamedTuple):
    """What makes logits of a teacher's hidden states: its embedding, and its final soft-cap."""

    embedding_RD: Float[Array, "R D"]
    final_softcap: float | Float[Array, ""]


@runtime_checkable
class Codec(Protocol):
    """How a distribution becomes targets. Both methods are pure and may be called inside jit."""

    @property
    def name(self) -> str:
        """Canonical: equal exactly when kind and all parameters are equal."""
        ...

    def encode(
        self,
        logits_BTV: Float[Array, "B T V"],
        row_keys_B: RowKeys,
        x_BTD: Float[Array, "B T D"] | None = None,
        first_position: int | Int[Array, ""] = 0,
    ) -> Encoded:
        """Arrays of leading shape [B, T]; a row's bytes depend on its logits and key alone.

        Args:
            logits_BTV: soft-capped logits of the vocabulary, without surplus embedding rows.
            row_keys_B: see `row_key`.
            x_BTD: the hidden states that the logits were made of, for a codec that sends them.
            first_position: of these T in their rows, where rows are encoded piece by piece.

        Raises:
            ValueError: more entries are asked for than the vocabulary has.
        """
        ...

    def decode(
        self,
        encoded: Mapping[str, ArrayLike],
        vocab_size: int,
        unembedding: Unembedding | None = None,
    ) -> Targets:
        """What the losses take; ids are int32 and weights float32.

        Args:
            vocab_size: the V of the logits that were encoded.
            unembedding: the teacher's, for hidden states.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Named:
    """A codec's parameters: what all of them have to keep to, and the name that they make."""

    kind: ClassVar[str]

    @property
    def name(self) -> str:
        """Canonical: equal exactly when kind and all parameters are equal."""
        values = ",".join(f"{name}={value}" for name, value in sorted(vars(self).items()))
        return f"{self.kind}({values})"

    def __post_init__(self) -> None:
        params = vars(self)
        for name in params.keys() & {"k", "draws"}:
            if params[name] < 1:
                raise ValueError(f"{self.name}: {name} should be at least 1")
        if params.get("values", VALUE_TYPES[0]) not in VALUE_TYPES:
            choices = ", ".join(VALUE_TYPES)
            raise ValueError(f"{self.name}: values should be one of {choices}")
        if not params["temperature"] > 0:
            raise ValueError(
                f"{self.name}: temperature divides the logits, so give a number above 0 (1.0 "
                "leaves the teacher as it is)"
            )
        object.__setattr__(self, "temperature", float(params["temperature"]))  # 1 and 1.0 are one
