"""Whether a replica of a 9B or 27B teacher fits the chips of one TPU host.

    python -m benchmarks.teacher_tpu

Compiles what a replica computes (a row of 8,192 tokens, encoded by the default codec) with the
real TPU compiler, which needs libtpu (the extra `tpu`) but no TPU.
"""

from typing import Any

import click
import jax
import jax.numpy as jnp

from benchmarks.compile_tpu import collectives
from benchmarks.figures import Figure, show, tell
from configs.distillation import CodecConfig
from model.config import MODEL_PRESETS
from model.sharding import PARAM_AXES, make_mesh, param_shardings
from model.targets import make_codec
from model.transformer import init_params
from workers.teacher_program import batch_shapes, make_scorer

ROW_LENGTH = 8192
# Model, host and its chips, and the memory of a chip (cloud.google.com/tpu/docs).
CASES = (
    ("gemma2-9b", "v5e:2x2", 4, 16 * 2**30),
    ("gemma2-9b", "v5e:2x4", 8, 16 * 2**30),
    ("gemma2-27b", "v5p:2x2x1", 4, 95 * 2**30),
)


def compile_replica(preset: str, topology: str, num_chips: int) -> Any:
    """The compiled program of a replica with bfloat16 parameters."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh({"model": num_chips}, devices)
    model = MODEL_PRESETS[preset]
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))

    def placed(path: Any, shape: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        dtype = shape.dtype if PARAM_AXES[name] == ("norm",) else jnp.bfloat16
        return jax.ShapeDtypeStruct(shape.shape, dtype, sharding=sharding)

    params = jax.tree_util.tree_map_with_path(placed, shapes, param_shardings(shapes, mesh))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    batch = (
        jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=whole)
        for shape in batch_shapes(1, ROW_LENGTH)
    )
    codec = make_codec("hybrid", **CodecConfig().params())
    scorer: Any = make_scorer(model, codec, "bfloat16", mesh)
    return scorer.lower(params, *batch).compile()


@click.command()
def main() -> None:
    lines, figures = [], {}
    for preset, topology, num_chips, chip_bytes in CASES:
        compiled = compile_replica(preset, topology, num_chips)
        memory = compiled.memory_analysis()
        held, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        used = (held + temporary) / chip_bytes
        counts = ", ".join(f"{n} {name}" for name, n in collectives(compiled.as_text()).items())
        lines.append([preset, topology, held / 2**30, temporary / 2**30, used, counts])
        name = f"{preset}_on_{topology}_memory_used"
        figures[name] = Figure(used, "share of a chip's memory", "< 1")
    columns = ["model", "host", "held GiB", "temporary GiB", "used", "collectives"]
    show("A replica on each chip", columns, lines)
    tell(figures)


if __name__ == "__main__":
    main()
