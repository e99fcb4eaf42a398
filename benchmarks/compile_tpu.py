"""Whether the training step of each Gemma 2 fits the slices that the report names.

    python -m benchmarks.compile_tpu [2b] [9b] [27b]

Compiles the whole step (distillation, gradients, AdamW) with the real TPU compiler, which needs
libtpu (the extra `tpu`) but no TPU, and reads from the program what a chip would hold and do.
"""

import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import click

# Before JAX is imported: no chip is looked for.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

from jax.experimental import topologies

from benchmarks.figures import Figure, show, tell
from benchmarks.step_program import config_of, step_and_shapes
from model.flops import training_flops
from model.sharding import make_mesh

ROW_LENGTH = 8192
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Case:
    """A model on the machines of the report (arXiv 2408.00118, table 3)."""

    preset: str
    topology: str
    options: dict[str, Any]
    mesh: dict[str, int]
    chip_bytes: int
    """Memory of one chip (cloud.google.com/tpu/docs, pages v4, v5e and v5p)."""


CASES = {
    "2b": Case("gemma2-2b", "v5e:16x16", {"num_slices": 2}, {"slice": 2, "fsdp": 256}, 16 * 2**30),
    "9b": Case(
        "gemma2-9b",
        "v4:8x16x32",
        {"chip_config_name": "megacore"},
        {"data": 2, "fsdp": 512, "model": 4},
        32 * 2**30,
    ),
    "27b": Case("gemma2-27b", "v5p:8x24x32", {}, {"data": 8, "fsdp": 96, "model": 8}, 95 * 2**30),
}


def collectives(program: str) -> dict[str, int]:
    """How often each collective stands in a compiled program."""
    found = Counter(re.findall(r"= \S+ ([a-z-]+?)(?:-start)?\(", program))
    return {name: found[name] for name in COLLECTIVES if found[name]}


@click.command()
@click.argument("sizes", nargs=-1, type=click.Choice(list(CASES)))
@click.option("--remat", default="layers", show_default=True)
def main(sizes: tuple[str, ...], remat: str) -> None:
    lines, figures = [], {}
    for size in sizes or tuple(CASES):
        case = CASES[size]
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=case.topology, **case.options
        )
        mesh = make_mesh(case.mesh, found.devices)
        num_rows = mesh.size // mesh.shape["model"]  # one for each replica of the data
        config = config_of(case.preset, num_rows, ROW_LENGTH, compute_dtype="bfloat16", remat=remat)
        step, shapes = step_and_shapes(config, mesh)
        compiled = step.lower(*shapes).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        held, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        used = (held + temporary) / case.chip_bytes
        # By formula: the compiler counts the body of a loop once.
        tflops = num_rows * ROW_LENGTH * training_flops(config.model, ROW_LENGTH) / mesh.size / 1e12
        counts = ", ".join(f"{n} {name}" for name, n in collectives(compiled.as_text()).items())
        lines.append([size, mesh.size, held / 2**30, temporary / 2**30, used, tflops, counts])
        figures[f"{size}_memory_used"] = Figure(used, "share of a chip's memory", "< 1")
    columns = ["model", "chips", "held GiB", "temporary GiB", "used", "model TFLOP", "collectives"]
    show("A training step on each chip", columns, lines)
    tell(figures)


if __name__ == "__main__":
    main()
