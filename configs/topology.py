"""The shapes that TPU slices come in."""

import itertools
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Generation:
    ray_name: str  # how Ray spells it in accelerator and pod types
    cores_per_chip: int  # pod types count cores, not chips
    topologies: frozenset[str]


# Sizes: cloud.google.com/tpu/docs, pages v4, v5e, v5p and v6e, "configurations"; cut to those
# that Ray 2.60 agrees to reserve as one slice (the tests hold the two together).
_SLICES_2D = frozenset({"1x1", "2x2", "2x4", "2x8", "4x4", "4x8", "8x8", "8x16", "16x16"})
_SMALL_SLICES_3D = frozenset({"2x2x1", "2x2x2", "2x2x4", "2x4x4"})


def _slices_3d(*largest: int) -> frozenset[str]:
    """The small slices, and every box of whole 4x4x4 cubes up to `largest`."""
    cubes = itertools.product(*(range(4, size + 1, 4) for size in largest))
    return _SMALL_SLICES_3D | {"x".join(map(str, dims)) for dims in cubes}


GENERATIONS = {
    "v4": Generation("v4", 2, _slices_3d(12, 12, 16)),
    "v5e": Generation("v5litepod", 1, _SLICES_2D),
    "v5p": Generation("v5p", 2, _slices_3d(16, 16, 24)),
    "v6e": Generation("v6e", 1, _SLICES_2D),
}
# Hosts carry four chips, but a two-dimensional slice of up to eight chips is a single host.
_CHIPS_PER_HOST = 4
_MOST_CHIPS_ON_ONE_HOST = 8


@dataclass(frozen=True)
class Topology:
    """The shape of one TPU slice; made by `slice_topology`, which checks it."""

    accelerator: str
    topology: str

    @property
    def num_chips(self) -> int:
        return math.prod(int(dim) for dim in self.topology.split("x"))

    @property
    def chips_per_host(self) -> int:
        """Chips, and so JAX devices, of each host."""
        is_2d = self.topology.count("x") == 1
        if is_2d and self.num_chips <= _MOST_CHIPS_ON_ONE_HOST:
            return self.num_chips
        return _CHIPS_PER_HOST

    @property
    def num_hosts(self) -> int:
        return self.num_chips // self.chips_per_host

    @property
    def pod_type(self) -> str:
        """Ray's and Google Cloud's name for a slice of this size, such as `v4-16`."""
        generation = GENERATIONS[self.accelerator]
        return f"{generation.ray_name}-{self.num_chips * generation.cores_per_chip}"

    @property
    def ray_accelerator_type(self) -> str:
        """What Ray Train's `ScalingConfig.accelerator_type` wants, such as `TPU-V5LITEPOD`."""
        return f"TPU-{GENERATIONS[self.accelerator].ray_name.upper()}"


def slice_topology(accelerator: str, topology: str) -> Topology:
    """The facts of a slice of `accelerator` (such as `v4`) in the shape `topology` (`2x2x2`).

    Raises:
        ValueError: the accelerator is unknown, or has no slices of this shape.
    """
    generation = GENERATIONS.get(accelerator)
    if generation is None:
        raise ValueError(
            f"unknown accelerator {accelerator!r}: choose one of {', '.join(GENERATIONS)}"
        )
    if topology in generation.topologies:
        return Topology(accelerator, topology)
    num_dims = next(iter(generation.topologies)).count("x") + 1
    parts = topology.split("x")
    well_formed = all(part.isascii() and part.isdigit() and part[0] != "0" for part in parts)
    if not well_formed or len(parts) != num_dims:
        shape, example = ("AxB", "4x4") if num_dims == 2 else ("AxBxC", "2x2x2")
        raise ValueError(
            f"topology {topology!r} does not describe a {accelerator} slice: "
            f"write its chips by dimension as {shape}, such as {example}"
        )
    raise ValueError(
        f"there is no {accelerator} slice of topology {topology!r}: "
        f"the nearest in size are {', '.join(_nearest_in_size(generation, topology))}"
    )


def _nearest_in_size(generation: Generation, topology: str) -> list[str]:
    """Three possible topologies, in the order of their distance in chips."""

    def num_chips(candidate: str) -> int:
        return math.prod(int(dim) for dim in candidate.split("x"))

    wanted = num_chips(topology)
    return sorted(generation.topologies, key=lambda t: (abs(num_chips(t) - wanted), t))[:3]
