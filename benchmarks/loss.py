"""What the chunked loss saves in memory and costs in time, against the loss from whole logits.

    python -m benchmarks.loss

Both arms compute loss and gradients in hidden states and embedding, at Gemma 2's vocabulary and
with 48 sparse targets per token or a teacher's hidden states. Memory is what the compiler plans
for 8 rows of 1,024 tokens; nothing of that size is run. Time is that of 512 tokens, turn by turn,
the chunked arm in two chunks, so that it has to add up gradients as a longer batch has to.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.figures import Figure, show, tell
from model.chunked_loss import HiddenTargets, Targets, chunked_loss
from model.chunked_objective import Objective
from model.config import MODEL_PRESETS, ModelConfig
from model.losses import distillation_loss, full_cross_entropy, next_token_loss
from model.targets import SparseTargets
from model.transformer import unembed

VOCABULARY = 256_128
NUM_TARGETS = 48
PLANNED = (8, 1024)
TIMED = (1, 512)
ARMS = ("naive", "chunked")
# Kind of targets, width, turns of each arm.
CASES = (("sparse", 256, 5), ("sparse", 1024, 3), ("sparse", 2304, 2), ("hidden", 256, 3))


def main() -> None:
    figures: dict[str, Figure] = {}
    memory = []
    for kind in ("sparse", "hidden"):
        naive, chunked = (_planned_bytes(arm, kind) for arm in ARMS)
        memory.append([kind, naive / 1e9, chunked / 1e9, chunked / naive])
        figures[_name("temp_memory_over_naive", kind)] = Figure(chunked / naive, "1", "< 0.05")
    columns = ["targets", "naive, GB", "chunked, GB", "ratio"]
    show("Temporary memory, 8,192 tokens of width 256", columns, memory)
    times = []
    for kind, width, turns in CASES:
        taken = _times(kind, width, turns)
        ratio = statistics.median(ours / naive for naive, ours in taken)
        naive_s, chunked_s = (statistics.median(arm) for arm in zip(*taken, strict=True))
        times.append([f"{kind}, width {width}", naive_s, chunked_s, ratio])
        goal = "<= 1.1" if width == 256 else ""
        name = "time_over_naive" if width == 256 else f"time_over_naive_width_{width}"
        figures[_name(name, kind)] = Figure(ratio, "1", goal)
    show("Seconds for 512 tokens", ["case", "naive, s", "chunked, s", "ratio"], times)
    tell(figures)


def _name(figure: str, kind: str) -> str:
    return figure if kind == "sparse" else f"{figure}_{kind}"


def _planned_bytes(arm: str, kind: str) -> int:
    arrays = jax.eval_shape(lambda: _inputs(kind, 256, PLANNED))
    analysis = _arm(arm, 256, None).lower(*arrays).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def _times(kind: str, width: int, turns: int) -> list[tuple[float, ...]]:
    """Seconds of both arms per turn; the first turn is not counted."""
    arrays = jax.block_until_ready(jax.jit(lambda: _inputs(kind, width, TIMED))())
    arms = [_arm(arm, width, TIMED[1] // 2).lower(*arrays).compile() for arm in ARMS]
    naive, chunked = (float(arm(*arrays)[0][0]) for arm in arms)
    assert math.isclose(naive, chunked, rel_tol=1e-5), f"the arms differ: {naive}, {chunked}"
    return [tuple(_seconds(arm, arrays) for arm in arms) for _ in range(turns)]


def _seconds(arm: Callable[..., Any], arrays: Any) -> float:
    began = time.perf_counter()
    jax.block_until_ready(arm(*arrays))
    return time.perf_counter() - began


def _inputs(kind: str, width: int, shape: tuple[int, int]) -> tuple[Any, ...]:
    keys = iter(jax.random.split(jax.random.key(0), 6))
    embedding_RD = jax.random.normal(next(keys), (VOCABULARY, width)) * width**-0.5
    x_BTD = jax.random.normal(next(keys), (*shape, width))
    labels_BT = jax.random.randint(next(keys), shape, 0, VOCABULARY)
    if kind == "hidden":
        targets = HiddenTargets(x_BTD[..., ::-1], embedding_RD[::-1], 30.0)
    else:
        ids_BTM = jax.random.randint(next(keys), (*shape, NUM_TARGETS), 0, VOCABULARY)
        weights_BTM = jax.nn.softmax(jax.random.normal(next(keys), ids_BTM.shape))
        targets = SparseTargets(ids_BTM, weights_BTM)
    return x_BTD, embedding_RD, labels_BT, targets


def _arm(name: str, width: int, chunk_tokens: int | None) -> Any:
    """The jitted ((loss, label loss), gradients) of hidden states and embedding."""
    model = MODEL_PRESETS["tiny"].model_copy(update={"width": width, "vocab_size": VOCABULARY})

    def chunked(x_BTD: Any, embedding_RD: Any, labels_BT: Any, targets: Any) -> Any:
        mask_BT = jnp.ones(labels_BT.shape, bool)
        options: Any = {"model": model, "objective": Objective(), "chunk_tokens": chunk_tokens}
        sums = chunked_loss(x_BTD, embedding_RD, labels_BT, mask_BT, targets, 0.0, **options)
        return sums.loss, sums.ce_loss

    def naive(x_BTD: Any, embedding_RD: Any, labels_BT: Any, targets: Any) -> Any:
        return _naive(model, x_BTD, embedding_RD, labels_BT, targets)

    loss = chunked if name == "chunked" else naive
    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def _naive(
    model: ModelConfig, x_BTD: Any, embedding_RD: Any, labels_BT: Any, targets: Targets
) -> tuple[Any, Any]:
    mask_BT = jnp.ones(labels_BT.shape, bool)
    logits_BTV = unembed({"embedding": embedding_RD}, model, x_BTD)
    label_loss, _ = next_token_loss(logits_BTV, labels_BT, mask_BT)
    if isinstance(targets, HiddenTargets):
        teacher_BTV = unembed({"embedding": targets.embedding_RD}, model, targets.x_BTD)
        return full_cross_entropy(teacher_BTV, logits_BTV, mask_BT)[0], label_loss
    assert isinstance(targets, SparseTargets)
    return distillation_loss(logits_BTV, targets, mask_BT)[0], label_loss


if __name__ == "__main__":
    main()
