"""What a codec is, what it encodes, and the three forms of targets that the losses take.

Legend: B rows, T positions, C positions of a piece of one row, V vocabulary, M targets per
position, R embedding rows, D the teacher's width.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Int, UInt32

from model.codecs.values import VALUE_TYPES

Encoded = dict[str, Array]

HIDDEN_DTYPE = jnp.bfloat16


class ScoredPiece(NamedTuple):
    """Neighbouring positions of one row, as the teacher has scored them."""

    logits_CV: Float32[Array, "C V"]
    """Soft-capped, of the vocabulary alone, without surplus embedding rows."""
    row_key_2: UInt32[Array, "2"] | UInt32[np.ndarray, "2"]
    """Of the row's random numbers: see `row_key`."""
    x_CD: Float[Array, "C D"] | None = None
    """The hidden states that the logits were made of, for a codec that sends them."""
    first_position: int | Int[Array, ""] = 0
    """Where in its row the piece begins."""


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


@dataclasses.dataclass(frozen=True)
class Codec(abc.ABC):
    """How a distribution becomes targets: a kind, and its parameters.

    `encode` and `decode` are pure and may be called inside jit.

    Args:
        temperature: divides the logits before they are encoded.

    Raises:
        ValueError: a parameter that its kind cannot have.
    """

    kind: ClassVar[str]
    temperature: float = dataclasses.field(default=1.0, kw_only=True)

    @property
    def name(self) -> str:
        """Canonical: equal exactly when kind and all parameters are equal."""
        values = ",".join(f"{name}={value}" for name, value in sorted(vars(self).items()))
        return f"{self.kind}({values})"

    @abc.abstractmethod
    def encode(self, piece: ScoredPiece) -> Encoded:
        """Arrays of leading shape [C], a function of the piece's values and place alone.

        Raises:
            ValueError: more entries are asked for than the vocabulary has.
        """

    @abc.abstractmethod
    def decode(
        self,
        encoded: Mapping[str, ArrayLike],
        vocab_size: int,
        unembedding: Unembedding | None = None,
    ) -> Targets:
        """What the losses take; ids are int32 and weights float32.

        Args:
            encoded: of whole rows, arrays of leading shape [B, T].
            vocab_size: the V of the logits that were encoded.
            unembedding: the teacher's, for hidden states.
        """

    def __post_init__(self) -> None:
        params = vars(self)
        for name in ("k", "draws"):
            if params.get(name, 1) < 1:
                raise ValueError(f"{self.name}: {name} should be at least 1")
        if "values" in params and params["values"] not in VALUE_TYPES:
            choices = ", ".join(VALUE_TYPES)
            raise ValueError(f"{self.name}: values should be one of {choices}")
        if not self.temperature > 0:
            raise ValueError(
                f"{self.name}: temperature divides the logits, so give a number above 0 (1.0 "
                "leaves the teacher as it is)"
            )
        object.__setattr__(self, "temperature", float(self.temperature))  # 1 and 1.0 are one
