"""Ways to compute the same attention: scaled queries in, mixed values out.

All of them take packed rows (a position looks back within its own non-zero segment), a local
window and a soft-cap on the logits, and compute the softmax in float32. What padding positions
(segment 0) get differs and means nothing.

Legend: B rows, T query and S key positions, N query heads, K key-value heads, G = N / K,
H head size.
"""

from functools import partial
from typing import Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from model.config import KernelName
from model.layers import soft_cap
from model.sharding import BATCH_AXES

Queries = Float[Array, "B T N H"]
KeysOrValues = Float[Array, "B T K H"]
Segments = Int[Array, "B T"]

# Finite, so that a padding row, which sees nothing, gets a uniform softmax and not NaN.
MASKED_LOGIT = -1e30
BLOCK = 512
# The TPU's vector registers are 128 lanes wide, and the kernel's blocks are multiples of that.
LANES = 128


@runtime_checkable
class Kernel(Protocol):
    """One way to attend; `window` None looks at the whole segment."""

    def __call__(
        self,
        q_BTNH: Queries,
        k_BTKH: KeysOrValues,
        v_BTKH: KeysOrValues,
        segments_BT: Segments,
        *,
        window: int | None,
        softcap: float,
    ) -> Queries: ...


def choose_kernel(name: KernelName, num_positions: int, mesh: Mesh | None) -> Kernel:
    """The kernel of that name; `auto` takes the one that suits platform and length.

    `auto` is `splash` on TPU where the rows are a multiple of 128 tokens, `tokamax` on GPU, and
    elsewhere `plain` up to 512 tokens and `blocked` beyond.
    """
    if name == "auto":
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        if platform == "tpu" and num_positions % LANES == 0:
            name = "splash"
        elif platform in ("gpu", "cuda", "rocm"):
            name = "tokamax"
        else:
            name = "plain" if num_positions <= BLOCK else "blocked"
    kernels: dict[str, Kernel] = {
        "plain": attend_plain,
        "blocked": attend_blocked,
        "splash": partial(_on_each_device, attend_splash, mesh),
        "tokamax": partial(_on_each_device, attend_tokamax, mesh),
    }
    return kernels[name]


def mix(
    q_BTNH: Queries,
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B T S"],
    softcap: float,
) -> Queries:
    """Attention of the queries over the keys that `mask` lets them see.

    The soft-cap bends the logits before the mask (Gemma 2 report, section 2).
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    logits_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    logits_BKGTS = jnp.where(mask_BTS[:, None, None], soft_cap(logits_BKGTS, softcap), MASKED_LOGIT)
    weights_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH).reshape(B, T, N, H)


def attend_plain(
    q_BTNH: Queries,
    k_BTKH: KeysOrValues,
    v_BTKH: KeysOrValues,
    segments_BT: Segments,
    *,
    window: int | None,
    softcap: float,
) -> Queries:
    """The readable one: logits of all positions with all, [B, N, T, T], at once."""
    mask_BTT = _visible(segments_BT, segments_BT, 0, 0, window)
    return mix(q_BTNH, k_BTKH, v_BTKH, mask_BTT, softcap)


def attend_blocked(
    q_BTNH: Queries,
    k_BTKH: KeysOrValues,
    v_BTKH: KeysOrValues,
    segments_BT: Segments,
    *,
    window: int | None,
    softcap: float,
    block: int = BLOCK,
) -> Queries:
    """Queries in blocks, each against the keys that it can reach.

    The largest intermediate is [B, N, block, min(T, window + block)], in the backward pass too,
    which computes each block anew.
    """
    shape, T = q_BTNH.shape, q_BTNH.shape[1]
    length = -(-T // block) * block
    q_BTNH, k_BTKH, v_BTKH, segments_BT = (
        jnp.pad(array, [(0, length - T if axis == 1 else 0) for axis in range(array.ndim)])
        for array in (q_BTNH, k_BTKH, v_BTKH, segments_BT)
    )
    reach = length if window is None else min(length, block + window - 1)

    @jax.checkpoint
    def one(start: Int[Array, ""]) -> Queries:
        key_start = jnp.maximum(start + block - reach, 0)
        own = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=block, axis=1)
        seen = partial(
            jax.lax.dynamic_slice_in_dim, start_index=key_start, slice_size=reach, axis=1
        )
        mask_BTS = _visible(own(segments_BT), seen(segments_BT), start, key_start, window)
        return mix(own(q_BTNH), seen(k_BTKH), seen(v_BTKH), mask_BTS, softcap)

    blocks = jax.lax.map(one, jnp.arange(0, length, block))
    return jnp.moveaxis(blocks, 0, 1).reshape(shape[0], length, *shape[2:])[:, :T]


def attend_splash(
    q_BTNH: Queries,
    k_BTKH: KeysOrValues,
    v_BTKH: KeysOrValues,
    segments_BT: Segments,
    *,
    window: int | None,
    softcap: float,
    interpret: bool = False,
) -> Queries:
    """JAX's Pallas kernel for TPU: soft-cap and window inside, blocks out of reach skipped.

    Raises:
        ValueError: the number of positions is no multiple of 128.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, N = q_BTNH.shape[1:3]
    if T % LANES:
        raise ValueError(
            f"attention kernel `splash` needs rows of a multiple of {LANES} tokens, not {T}: "
            "change data.row_length, or choose the kernel `blocked`"
        )
    # The largest block of at most 512 that divides the row.
    block = next(size for size in (4 * LANES, 2 * LANES, LANES) if T % size == 0)
    mask = splash.CausalMask((T, T))
    if window is not None and window < T:
        mask = splash.LocalMask((T, T), (window - 1, 0), 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * N),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
    )
    heads_first = (jnp.swapaxes(array, 1, 2) for array in (q_BTNH, k_BTKH, v_BTKH))
    mixed_BNTH = jax.vmap(kernel)(*heads_first, splash.SegmentIds(segments_BT, segments_BT))
    return jnp.swapaxes(cast(Array, mixed_BNTH), 1, 2)


def attend_tokamax(
    q_BTNH: Queries,
    k_BTKH: KeysOrValues,
    v_BTKH: KeysOrValues,
    segments_BT: Segments,
    *,
    window: int | None,
    softcap: float,
) -> Queries:
    """Tokamax' fused kernels for GPU.

    Raises:
        ValueError: tokamax is not installed.
    """
    try:
        import tokamax  # pyright: ignore[reportMissingImports]
        from absl import flags
    except ImportError as error:
        raise ValueError(
            "attention kernel `tokamax`, which `auto` takes on GPU, is not installed: install the "
            "extra `gpu`, or choose the kernel `blocked`"
        ) from error

    # Else tokamax takes this process' command line for its own and refuses what it finds there.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    same_B1TT = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    return tokamax.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        mask=same_B1TT,
        scale=1.0,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        logits_soft_cap=softcap,
    )


def _on_each_device(
    kernel: Kernel,
    mesh: Mesh | None,
    q_BTNH: Queries,
    k_BTKH: KeysOrValues,
    v_BTKH: KeysOrValues,
    segments_BT: Segments,
    *,
    window: int | None,
    softcap: float,
) -> Queries:
    """The compiler cannot divide a kernel: each device gets its rows and its heads."""
    attend = partial(kernel, window=window, softcap=softcap)
    if mesh is None or mesh.size == 1:
        return attend(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    if k_BTKH.shape[2] % mesh.shape["model"]:
        group = q_BTNH.shape[2] // k_BTKH.shape[2]
        k_BTKH, v_BTKH = (jnp.repeat(array, group, axis=2) for array in (k_BTKH, v_BTKH))
    heads, rows = PartitionSpec(BATCH_AXES, None, "model"), PartitionSpec(BATCH_AXES)
    divided = jax.shard_map(
        attend, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
    )
    return cast(Array, divided(q_BTNH, k_BTKH, v_BTKH, segments_BT))


def _visible(
    query_segments_BT: Segments,
    key_segments_BS: Int[Array, "B S"],
    first_query: int | Int[Array, ""],
    first_key: int | Int[Array, ""],
    window: int | None,
) -> Bool[Array, "B T S"]:
    """True where a position may look: its own non-zero segment, not ahead, within `window`."""
    query_T = first_query + jnp.arange(query_segments_BT.shape[1])
    key_S = first_key + jnp.arange(key_segments_BS.shape[1])
    distance_TS = query_T[:, None] - key_S[None, :]
    allowed_TS = distance_TS >= 0
    if window is not None:
        allowed_TS &= distance_TS < window
    same_BTS = query_segments_BT[:, :, None] == key_segments_BS[:, None, :]
    return same_BTS & (query_segments_BT != 0)[:, :, None] & allowed_TS
