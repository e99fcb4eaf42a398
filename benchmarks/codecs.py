"""What each codec costs and how near its targets come, at the vocabulary of Gemma 2.

    python -m benchmarks.codecs

Error: the teacher follows Zipf laws over 256,000 tokens, from flat to peaked, the student has
learnt half of it. KL is that of the targets t from the full distribution p, KL(t ‖ p), over
positions and seeds, then that of the mean of t over the seeds. The squared error of that mean over
that of one seed is one over the number of seeds where targets are unbiased, and tends to 1 where
all of the error is bias. The angle is that of the gradient in the student's logits to the full one.
What `topk` says of its tail is spread as the student spreads it, which is what its loss means.

Cost: the time of encoding given logits over that of the teacher's forward, turn by turn. The
quickstart's teacher runs as it is; of the 2B one layer and the output run in full width on 128
tokens, and the layer counts 26 times.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.figures import Figure, show, tell
from model.config import MODEL_PRESETS
from model.flops import training_flops
from model.targets import (
    Codec,
    ScoredPiece,
    SparseTargets,
    bytes_per_token,
    make_codec,
    row_key,
)
from model.transformer import hidden_states, init_params, unembed

VOCABULARY = 256_000
EXPONENTS = np.linspace(1.2, 2.6, 8)
NUM_SEEDS, TURNS = 64, 5
CODECS = {
    "hybrid": make_codec("hybrid", k=16, draws=32),
    "hybrid_uint8": make_codec("hybrid", k=16, draws=32, values="uint8"),
    "hybrid_float32": make_codec("hybrid", k=16, draws=32, values="float32"),
    "topk": make_codec("topk", k=64),
    "sampled": make_codec("sampled", draws=64),
    "gemma3": make_codec("gemma3", draws=256),
    "hidden": make_codec("hidden"),
    "full": make_codec("full"),
}
UNBIASED = ("hybrid", "hybrid_uint8", "hybrid_float32", "sampled")


class Error(NamedTuple):
    """How far sparse targets are from the whole distribution."""

    kl: float
    """Nats, over positions and seeds."""
    kl_spread: float
    """Standard deviation over the seeds, mean over positions."""
    kl_of_mean: float
    squared_of_mean: float
    """Over that of one seed."""
    angle: float
    """Degrees, one seed's, mean over positions and seeds."""


def main() -> None:
    figures: dict[str, Figure] = {}
    rows = []
    for name, codec in CODECS.items():
        num_bytes = bytes_per_token(codec, VOCABULARY, MODEL_PRESETS["gemma2-9b"].width)
        figures[f"bytes_per_token_{name}"] = Figure(num_bytes, "B")
        if name in ("hidden", "full"):
            rows.append([name, num_bytes, *["exact"] * 5])
            continue
        error = _error(codec)
        rows.append([name, num_bytes, *error])
        figures[f"kl_{name}"] = Figure(error.kl, "nats")
        figures[f"kl_of_mean_{name}"] = Figure(error.kl_of_mean, "nats")
        goal = f"<= {1.5 / NUM_SEEDS:.3f}" if name in UNBIASED else ""
        figures[f"squared_error_of_mean_{name}"] = Figure(error.squared_of_mean, "1", goal)
        figures[f"gradient_angle_{name}"] = Figure(error.angle, "degrees")
    columns = ["codec", "bytes/token", "KL", "spread", "KL of mean", "squared of mean", "angle"]
    show("Targets of 256,000 tokens", columns, rows)
    extra = 2 * MODEL_PRESETS["gemma2-9b"].width * VOCABULARY
    share = extra / training_flops(MODEL_PRESETS["gemma2-2b"], 8192)
    figures["student_flops_per_token_hidden"] = Figure(extra, "FLOP")
    figures["student_flops_share_hidden"] = Figure(share, "1 (of a 2B's step, 9B teacher)")
    for preset, layers, shape in (("teacher-small", 3, (4, 256)), ("gemma2-2b", 1, (1, 128))):
        forward_s, encode_s = _times(preset, layers, shape)
        table = [[name, 1e6 * s, s / forward_s] for name, s in encode_s.items()]
        show(f"{preset}: forward {1e6 * forward_s:.4g} µs per token", COST_COLUMNS, table)
        suffix = {"gemma2-2b": "", "teacher-small": "_quickstart"}[preset]
        for name, seconds in encode_s.items():
            key = "encode_over_forward" + ("" if name == "hybrid" else f"_{name}") + suffix
            figures[key] = Figure(seconds / forward_s, "1", "" if suffix else "<= 0.05")
    tell(figures)


COST_COLUMNS = ["codec", "encoding, µs per token", "over forward"]


def _error(codec: Codec) -> Error:
    ranks = np.random.default_rng(0).permutation(VOCABULARY)
    logits_TV = -EXPONENTS[:, None] * np.log1p(ranks)
    noise_TV = np.random.default_rng(1).normal(0, 1, logits_TV.shape)
    p_TV, q_TV = _softmax(logits_TV), _softmax(0.5 * logits_TV + noise_TV)

    @jax.jit
    def targets_of(row: ScoredPiece) -> Any:
        encoded = {name: array[None] for name, array in codec.encode(row).items()}
        return codec.decode(encoded, VOCABULARY)

    teacher_TV = jnp.asarray(logits_TV, jnp.float32)
    sum_TV = np.zeros_like(p_TV)
    divergences, angles, squares = [], [], []
    for seed in range(NUM_SEEDS):
        row = ScoredPiece(teacher_TV, row_key(seed, 0, 0))
        targets_TV = _dense(targets_of(row), q_TV)
        sum_TV += targets_TV
        divergences.append(_kl(targets_TV, p_TV))
        squares.append(np.square(targets_TV - p_TV).sum())
        ours_TV, full_TV = q_TV * targets_TV.sum(-1, keepdims=True) - targets_TV, q_TV - p_TV
        norms = np.linalg.norm(ours_TV, axis=-1) * np.linalg.norm(full_TV, axis=-1)
        angles.append(np.degrees(np.arccos((ours_TV * full_TV).sum(-1) / norms)))
    mean_TV = sum_TV / NUM_SEEDS
    kl_of_mean = _kl(mean_TV, p_TV).mean()
    squared_of_mean = np.square(mean_TV - p_TV).sum() / np.mean(squares)
    spread = np.std(divergences, axis=0, ddof=1).mean()
    kl, angle = np.mean(divergences), np.mean(angles)
    return Error(*map(float, (kl, spread, kl_of_mean, squared_of_mean, angle)))


def _dense(targets: SparseTargets, q_TV: np.ndarray) -> np.ndarray:
    ids_TM, weights_TM = np.asarray(targets.ids_BTM)[0], np.asarray(targets.weights_BTM)[0]
    dense_TV = np.zeros_like(q_TV)
    rows = np.arange(len(ids_TM))[:, None]
    np.add.at(dense_TV, (rows, ids_TM), weights_TM)
    if targets.tail_BT is not None:
        rest_TV = q_TV.copy()
        rest_TV[rows, ids_TM] = 0
        tail_T1 = np.asarray(targets.tail_BT)[0][:, None]
        dense_TV += tail_T1 * rest_TV / rest_TV.sum(-1, keepdims=True)
    return dense_TV


def _kl(targets_TV: np.ndarray, p_TV: np.ndarray) -> np.ndarray:
    some = targets_TV > 0  # rounding may take a tail a little below 0
    ratio_TV = np.where(some, targets_TV, 1) / p_TV
    return np.sum(np.where(some, targets_TV * np.log(np.where(some, ratio_TV, 1)), 0), axis=-1)


def _softmax(logits_TV: np.ndarray) -> np.ndarray:
    masses_TV = np.exp(logits_TV - logits_TV.max(-1, keepdims=True))
    return masses_TV / masses_TV.sum(-1, keepdims=True)


def _times(preset: str, num_layers: int, shape: tuple[int, int]) -> tuple[float, dict[str, float]]:
    """Seconds per token of the forward and of each encoding; medians of turns."""
    whole = MODEL_PRESETS[preset]
    model = whole.model_copy(update={"num_layers": num_layers, "num_embeddings": None})
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    tokens = jax.random.randint(jax.random.key(1), shape, 4, model.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    inputs = (params, tokens, jnp.ones_like(tokens), positions)
    hidden = _compiled(lambda params, *rest: hidden_states(params, model, *rest), *inputs)
    x_BTD = hidden(*inputs)
    output = _compiled(lambda params, x: unembed(params, model, x), params, x_BTD)
    # Peaked as a trained teacher's, which fresh parameters are not.
    row = ScoredPiece(8 * output(params, x_BTD)[0], row_key(0, 0, 0), x_BTD[0])
    encodings = {name: _compiled(codec.encode, row) for name, codec in CODECS.items()}
    turns: list[dict[str, float]] = []
    for _ in range(TURNS):
        taken = {
            "hidden states": _seconds(hidden, *inputs),
            "output": _seconds(output, params, x_BTD),
        }
        taken |= {f"encode {name}": _seconds(each, row) for name, each in encodings.items()}
        turns.append(taken)
    median = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    layers_s = median["hidden states"] * whole.num_layers / num_layers
    forward_s = (layers_s + median["output"]) / tokens.size
    return forward_s, {name: median[f"encode {name}"] / shape[1] for name in CODECS}


def _compiled(function: Callable[..., Any], *arrays: Any) -> Callable[..., Any]:
    compiled = jax.jit(function).lower(*arrays).compile()
    jax.block_until_ready(compiled(*arrays))  # the first run is not counted
    return compiled


def _seconds(function: Callable[..., Any], *arrays: Any) -> float:
    began = time.perf_counter()
    jax.block_until_ready(function(*arrays))
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
