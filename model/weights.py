"""Which tensors of a Hugging Face Gemma 2 file hold which parameter, and how they are turned.

A projection is `[outputs, inputs]` in the file, inputs before outputs here, with heads and head
size apart. Layers lie in the file one by one, here in stacked pairs. Norm scales are offsets from
one in both. Legend: L stacked pairs of layers, D width, N heads, H head size, F feed-forward.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Float32

from model.config import ModelConfig
from model.sharding import STACKED
from model.transformer import init_params

# Name in the file, and how many dims of the parameter are inputs.
_PROJECTIONS = {
    "attention/query": ("self_attn.q_proj", 1),
    "attention/key": ("self_attn.k_proj", 1),
    "attention/value": ("self_attn.v_proj", 1),
    "attention/output": ("self_attn.o_proj", 2),
    "feed_forward/gate": ("mlp.gate_proj", 1),
    "feed_forward/up": ("mlp.up_proj", 1),
    "feed_forward/down": ("mlp.down_proj", 1),
}
_NORMS = {
    "pre_attention_norm/scale": "input_layernorm",
    "post_attention_norm/scale": "post_attention_layernorm",
    "pre_feed_forward_norm/scale": "pre_feedforward_layernorm",
    "post_feed_forward_norm/scale": "post_feedforward_layernorm",
}
_OUTER = {"embedding": "model.embed_tokens.weight", "final_norm/scale": "model.norm.weight"}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter and the tensors of the file that hold it."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    """Names in the file, one for each entry of the first axis where the parameter is stacked."""
    tensor_shape: tuple[int, ...]
    is_stacked: bool
    is_turned: bool
    """Whether the tensor is a projection, with its outputs first."""

    def join(self, read: Callable[[str], Float[np.ndarray, "..."]]) -> Float32[np.ndarray, "..."]:
        """The parameter; `read` gives a tensor by its name, and is asked for one at a time.

        Embedding rows that the file does not have are zero.
        """
        joined = np.zeros(self.shape, np.float32)
        for name, entry in zip(self.tensors, self._entries(joined), strict=True):
            tensor = read(name)
            if self.is_turned:
                entry[...] = tensor.T.reshape(entry.shape)
            else:
                entry[: len(tensor)] = tensor
        return joined

    def split(
        self, parameter: Float[np.ndarray, "..."]
    ) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
        """The tensors by name, views where possible; surplus embedding rows are left out."""
        for name, entry in zip(self.tensors, self._entries(parameter), strict=True):
            if self.is_turned:
                yield name, entry.reshape(self.tensor_shape[::-1]).T
            else:
                yield name, entry[: self.tensor_shape[0]]

    def _entries(self, parameter: np.ndarray) -> np.ndarray:
        assert parameter.shape == self.shape
        return parameter if self.is_stacked else parameter[None]


def leaves_of(config: ModelConfig) -> tuple[Leaf, ...]:
    """The parameters of a model, in the order of its tree."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return tuple(
        _leaf(config, tuple(key.key for key in path), leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    )


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor in a file of this model."""
    return {name: leaf.tensor_shape for leaf in leaves_of(config) for name in leaf.tensors}


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A tree that holds one value at `path`."""
    for name in reversed(path):
        value = {name: value}
    return value


def _leaf(config: ModelConfig, path: tuple[str, ...], shape: tuple[int, ...]) -> Leaf:
    if (name := "/".join(path)) in _OUTER:
        tensor_shape = (config.vocab_size, shape[1]) if name == "embedding" else shape
        return Leaf(path, shape, (_OUTER[name],), tensor_shape, False, False)
    block = "/".join(path[-2:])
    is_stacked = path[0] == STACKED
    if is_stacked:
        layers = range(path[1] == "global", config.num_layers - config.num_layers % 2, 2)
    else:
        layers = (config.num_layers - 1,)
    entry_shape = shape[is_stacked:]
    if block in _NORMS:
        inside, tensor_shape = _NORMS[block], entry_shape
    else:
        inside, num_inputs = _PROJECTIONS[block]
        tensor_shape = (math.prod(entry_shape[num_inputs:]), math.prod(entry_shape[:num_inputs]))
    tensors = tuple(f"model.layers.{layer}.{inside}.weight" for layer in layers)
    return Leaf(path, shape, tensors, tensor_shape, is_stacked, block in _PROJECTIONS)
