"""How a model is computed: what changes speed, memory and rounding, but not the function."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from model.config import KernelName, Remat

_policies = jax.checkpoint_policies
REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    "projections": _policies.dots_with_no_batch_dims_saveable,
    "layers": _policies.nothing_saveable,
}


@dataclass(frozen=True)
class Execution:
    """Settings of a forward pass; parameters are float32 whatever they say.

    `remat` says what the backward pass computes anew: `none` keeps everything, `projections`
    keeps the products with weights, `layers` only what goes from layer to layer.
    """

    dtype: DTypeLike = "float32"
    attention: KernelName = "auto"
    remat: Remat = "none"
    mesh: Mesh | None = None


DEFAULT = Execution()
