"""How well a training step, distillation loss included, uses the machine.

    python -m benchmarks.step [--preset gemma2-2b] [--rows N] [--row-length T] [--remat …]

The same command on CPU, GPU and TPU: by default an accelerator trains the 2B on rows of 8,192
tokens and a CPU the quickstart's student. The step's model FLOPs per second (`model/flops.py`)
are held against those of one large matrix product, measured turn by turn in the same run.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.figures import Figure, show, tell
from benchmarks.step_program import config_of, step_and_shapes
from configs.run import RunConfig
from model.flops import training_flops
from model.sharding import make_mesh
from workers.train_step import make_init


@click.command()
@click.option("--preset", help="Model preset.  [default: by platform]")
@click.option("--rows", type=int, help="Rows of a step.  [default: by platform]")
@click.option("--row-length", type=int, help="Tokens of a row.  [default: by platform]")
@click.option("--remat", default="layers", show_default=True, help="On an accelerator.")
@click.option("--turns", default=5, show_default=True, help="Turns of each.")
def main(
    preset: str | None, rows: int | None, row_length: int | None, remat: str, turns: int
) -> None:
    on_cpu, num_devices = jax.default_backend() == "cpu", jax.device_count()
    config = config_of(
        preset or ("student-small" if on_cpu else "gemma2-2b"),
        rows or (8 if on_cpu else 1) * num_devices,
        row_length or (256 if on_cpu else 8192),
        compute_dtype="float32" if on_cpu else "bfloat16",
        remat="none" if on_cpu else remat,
        mesh={"fsdp": num_devices},
        cluster={"devices_per_host": num_devices},
    )
    step = _step(config)
    size = 1024 if on_cpu else 8192
    product = _product(size, config.compute_dtype)
    num_tokens = config.batch.rows * config.data.row_length
    step_tflops = num_tokens * training_flops(config.model, config.data.row_length) / 1e12
    product_tflops = num_devices * 2.0 * size**3 / 1e12
    lines: list[list[float]] = []
    for turn in range(turns):
        step_s, product_s = _seconds(step), _seconds(product)
        rates = [step_tflops / step_s, product_tflops / product_s]
        lines.append([turn, num_tokens / step_s, *rates, rates[0] / rates[1]])
    columns = ["turn", "tokens/s", "TFLOP/s", "TFLOP/s of a product", "share"]
    show("Training step", columns, lines)
    _, tokens, tflops, _, share = map(statistics.median, zip(*lines, strict=True))
    figures = {"step_over_product": Figure(share, "FLOP/s over FLOP/s")}
    if not on_cpu:
        figures["tokens_per_s"] = Figure(tokens, "tokens/s")
        figures["model_tflops_per_s"] = Figure(tflops, "TFLOP/s")
    tell(figures)


def _step(config: RunConfig) -> Callable[[], Any]:
    """A call that trains one step further on made-up tokens and targets."""
    mesh = make_mesh({"fsdp": jax.device_count()})
    step, shapes = step_and_shapes(config, mesh)
    generator = np.random.default_rng(0)

    def made_up(shape: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(shape.dtype, jnp.floating):
            values = np.full(shape.shape, 0.5 / shape.shape[-1])
        else:
            values = generator.integers(0, config.model.vocab_size, shape.shape)
        return jax.device_put(values.astype(shape.dtype), shape.sharding)

    batch, encoded = jax.tree.map(made_up, (shapes.batch, shapes.encoded))
    whole = jnp.ones_like(batch.segments)
    batch = batch._replace(
        segments=whole, positions=jnp.cumsum(whole, axis=1) - 1, mask=whole.astype(bool)
    )
    signals = jax.device_put(np.zeros(shapes.signals.shape, np.int32), shapes.signals.sharding)
    state = make_init(config, mesh)()

    def advance() -> Any:
        nonlocal state
        state, metrics = step(state, batch, encoded, signals)
        return metrics

    return advance


def _product(size: int, dtype: str) -> Callable[[], Any]:
    """A call that multiplies two [size, size] matrices on each device."""
    matrices = jnp.ones((jax.device_count(), size, size), dtype)
    multiply = jax.pmap(lambda a: a @ a)
    return lambda: multiply(matrices)


def _seconds(call: Callable[[], Any], repeats: int = 10) -> float:
    """Seconds of one call, on average after a first one that does not count."""
    jax.block_until_ready(call())
    began = time.perf_counter()
    results = [call() for _ in range(repeats)]
    jax.block_until_ready(results)
    return (time.perf_counter() - began) / repeats


if __name__ == "__main__":
    main()
