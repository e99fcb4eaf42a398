"""How many floating-point operations a model asks for, whatever it is computed on.

A product of [m, k] with [k, n] counts 2·m·k·n; what is not a matrix product (norms, softmax,
activations, embedding look-ups) is left out, and so is what rematerialisation does twice.
Attention counts the keys that a position may see, not those that a kernel masks away.
"""

from model.config import ModelConfig


def mean_visible(num_positions: int, window: int | None = None) -> float:
    """Keys that a position sees, its own among them, on average over one full row."""
    reach = num_positions if window is None else min(window, num_positions)
    ramp = reach * (reach + 1) / 2  # the first `reach` positions see 1, 2, … keys
    return (ramp + (num_positions - reach) * reach) / num_positions


def forward_flops(config: ModelConfig, num_keys_local: float, num_keys_global: float) -> float:
    """FLOPs of one token's forward pass, logits included, if each sees that many keys."""
    c = config
    projections = 2 * c.width * (c.num_heads + c.num_kv_heads) * c.head_dim
    weights = c.num_layers * (projections + 3 * c.width * c.feed_forward)
    num_global = c.num_layers // 2
    num_keys = (c.num_layers - num_global) * num_keys_local + num_global * num_keys_global
    attention = 2 * c.num_heads * c.head_dim * num_keys  # queries by keys, weights by values
    return 2 * (weights + attention + c.embedding_rows * c.width)


def training_flops(config: ModelConfig, row_length: int) -> float:
    """FLOPs per token of a training step on full rows: the backward pass costs two forwards."""
    local, whole = mean_visible(row_length, config.window), mean_visible(row_length)
    return 3 * forward_flops(config, local, whole)
