"""Model sizes as data: one frozen configuration for every Gemma 2 style network."""

from typing import Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

KernelName = Literal["auto", "plain", "blocked", "splash", "tokamax"]
"""The kernels of attention, see `model.kernels`."""
Remat = Literal["none", "projections", "layers"]
"""What the backward pass computes anew, see `model.execution`."""
DivergenceName = Literal["forward_kl", "reverse_kl", "jsd"]
"""How far a student is from its teacher, see `model.chunked_objective`."""
ValueType = Literal["bfloat16", "uint8", "float32"]
"""How probabilities are sent, see `model.codecs.values`."""


class ModelConfig(BaseModel):
    """Sizes and constants of a Gemma 2 style decoder (arXiv 2408.00118, section 2)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_layers: int = Field(gt=0, description="layers, local and global ones in turn")
    width: int = Field(gt=0, description="D, the residual stream")
    feed_forward: int = Field(gt=0, description="F, of each of the two branches")
    num_heads: int = Field(gt=0, description="N, query heads")
    num_kv_heads: int = Field(gt=0, description="K, each shared by N / K query heads")
    head_dim: int = Field(gt=0, description="H, the size of one head")
    vocab_size: int = Field(gt=0, description="V, what the tokenizer can emit")
    num_embeddings: int | None = Field(
        default=None, gt=0, description="rows of the embedding table; null: vocab_size"
    )
    context_length: int = Field(default=8192, gt=0, description="longest row, in tokens")
    window: int = Field(
        default=4096, gt=0, description="tokens a local layer sees, its own among them"
    )
    rope_base: float = Field(
        default=10000.0, gt=0, description="base of the wavelengths of the rotary embedding"
    )
    query_scale: float | None = Field(
        default=None, gt=0, description="factor on the queries; null: head_dim ** -0.5"
    )
    attention_softcap: float = Field(
        default=50.0, gt=0, description="bound on attention logits: cap · tanh(logit / cap)"
    )
    final_softcap: float = Field(
        default=30.0, gt=0, description="the same bound on the logits of the vocabulary"
    )
    norm_eps: float = Field(
        default=1e-6, gt=0, description="added to the mean square in each RMS norm"
    )

    @model_validator(mode="after")
    def _sizes_fit_together(self) -> Self:
        faults = []
        if self.num_heads % self.num_kv_heads:
            faults.append(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads="
                f"{self.num_kv_heads}: every key-value head serves the same number of query "
                "heads, so choose a num_kv_heads that divides num_heads"
            )
        if self.head_dim % 2:
            faults.append(
                f"head_dim={self.head_dim} is odd: rotary embedding turns two halves of each "
                "head, so choose an even head_dim"
            )
        if self.num_embeddings is not None and self.num_embeddings < self.vocab_size:
            faults.append(
                f"num_embeddings={self.num_embeddings} is smaller than vocab_size="
                f"{self.vocab_size}: raise num_embeddings, or leave it out to get one row per token"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def embedding_rows(self) -> int:
        """Rows of the embedding table; those from vocab_size on are never predicted."""
        return self.vocab_size if self.num_embeddings is None else self.num_embeddings

    @property
    def query_factor(self) -> float:
        """What queries are multiplied by after the rotary embedding."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale


class ParamCount(NamedTuple):
    """Numbers of parameters, split as in table 2 of arXiv 2408.00118."""

    embedding: int
    other: int
    total: int


def param_count(config: ModelConfig) -> ParamCount:
    """Count the parameters of `config` from its shapes; nothing is allocated."""
    c = config
    attention = 2 * c.width * (c.num_heads + c.num_kv_heads) * c.head_dim
    layer = attention + 3 * c.width * c.feed_forward + 4 * c.width
    embedding = c.embedding_rows * c.width
    other = c.num_layers * layer + c.width
    return ParamCount(embedding, other, embedding + other)


MODEL_PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        num_layers=2,
        width=32,
        feed_forward=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=512,
        context_length=256,
        window=64,
    ),
    # arXiv 2408.00118: sizes in table 1, embedding rows from the counts of table 2. The report
    # prints the feed-forward of both branches together, half of it stands here.
    "gemma2-2b": ModelConfig(
        num_layers=26,
        width=2304,
        feed_forward=18432 // 2,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        vocab_size=256_000,
        num_embeddings=256_128,
    ),
    "gemma2-9b": ModelConfig(
        num_layers=42,
        width=3584,
        feed_forward=28672 // 2,
        num_heads=16,
        num_kv_heads=8,
        head_dim=256,
        vocab_size=256_000,
        num_embeddings=256_128,
    ),
    "gemma2-27b": ModelConfig(
        num_layers=46,
        width=4608,
        feed_forward=73728 // 2,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        vocab_size=256_000,
        num_embeddings=256_128,
        # By width / num_heads, not by head_dim (google-deepmind/gemma, gm/nn/_gemma.py).
        query_scale=(4608 / 32) ** -0.5,
    ),
    # A teacher that two CPU cores train in under two minutes, and a student small enough to see
    # distillation win within 300 steps of four rows. Both for a 2,048-piece vocabulary.
    "teacher-small": ModelConfig(
        num_layers=3,
        width=128,
        feed_forward=384,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        vocab_size=2048,
        context_length=256,
        window=128,
    ),
    "student-small": ModelConfig(
        num_layers=2,
        width=64,
        feed_forward=192,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        vocab_size=2048,
        context_length=256,
        window=128,
    ),
}
