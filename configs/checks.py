"""What single fields cannot tell: combinations of settings that cannot work together."""

from dataclasses import dataclass
from typing import Any

from configs.run import RunConfig
from configs.topology import slice_topology


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a configuration."""

    path: str
    value: Any
    message: str
    involves: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = repr(self.value)
        shown = shown if len(shown) <= 60 else shown[:57] + "…"
        where = f"{self.path}: " if self.path else ""
        value = "" if self.value is None or not self.path else f"{shown} "
        return f"{where}{value}{self.message}"


@dataclass(frozen=True)
class Layout:
    """The arithmetic of devices and rows that a configuration means."""

    num_slices: int
    num_hosts: int
    devices_per_host: int
    data: int
    fsdp: int
    model: int
    rows: int
    microbatches: int

    @property
    def num_devices(self) -> int:
        return self.num_hosts * self.devices_per_host

    @property
    def mesh_shape(self) -> tuple[int, int, int, int]:
        """Sizes of the axes (slice, data, fsdp, model)."""
        return (self.num_slices, self.data, self.fsdp, self.model)

    @property
    def row_shards(self) -> int:
        """Devices among which the rows of a microbatch are divided."""
        return self.num_slices * self.data * self.fsdp

    @property
    def rows_per_shard(self) -> int:
        return self.rows // (self.microbatches * self.row_shards)


def layout(config: RunConfig) -> Layout:
    """Devices, mesh and rows of a run.

    Raises:
        ValueError: the accelerator has no such topology.
    """
    cluster, mesh = config.cluster, config.mesh
    if cluster.accelerator == "cpu":
        num_hosts, per_host, num_slices = cluster.num_hosts, cluster.devices_per_host, 1
    else:
        topology = slice_topology(cluster.accelerator, cluster.topology or "")
        num_slices = cluster.num_slices
        num_hosts, per_host = topology.num_hosts * num_slices, topology.chips_per_host
    per_slice = num_hosts * per_host // num_slices
    data = mesh.data if mesh.data is not None else max(1, per_slice // (mesh.fsdp * mesh.model))
    return Layout(
        num_slices=num_slices,
        num_hosts=num_hosts,
        devices_per_host=per_host,
        data=data,
        fsdp=mesh.fsdp,
        model=mesh.model,
        rows=config.batch.rows,
        microbatches=config.batch.microbatches,
    )


def find_faults(config: RunConfig) -> list[Fault]:
    """Every impossible combination in a configuration whose fields are sound."""
    return [
        *_cluster_faults(config),
        *_mesh_faults(config),
        *_data_faults(config),
        *_objective_faults(config),
    ]


def _cluster_faults(config: RunConfig) -> list[Fault]:
    cluster = config.cluster
    faults = []
    if cluster.accelerator == "cpu":
        if cluster.topology is not None:
            faults.append(
                Fault("cluster.topology", cluster.topology, "only TPU slices have a topology")
            )
        if cluster.num_slices != 1:
            faults.append(
                Fault("cluster.num_slices", cluster.num_slices, "only TPUs come in slices; use 1")
            )
        return faults
    try:
        topology = slice_topology(cluster.accelerator, cluster.topology or "")
    except ValueError as error:
        return [Fault("cluster.topology", cluster.topology, str(error), ("cluster.accelerator",))]
    if cluster.num_hosts not in (1, topology.num_hosts * cluster.num_slices):
        faults.append(
            Fault(
                "cluster.num_hosts",
                cluster.num_hosts,
                f"{cluster.num_slices} slices of {cluster.topology} have "
                f"{topology.num_hosts * cluster.num_slices} hosts; leave it unset",
                ("cluster.num_slices", "cluster.topology"),
            )
        )
    return faults


def _mesh_faults(config: RunConfig) -> list[Fault]:
    try:
        plan = layout(config)
    except ValueError:
        return []  # said by the cluster's faults
    faults = []
    per_slice = plan.num_devices // plan.num_slices
    product = plan.data * plan.fsdp * plan.model
    if product != per_slice:
        faults.append(
            Fault(
                "mesh",
                f"{plan.data}×{plan.fsdp}×{plan.model}",
                f"(data × fsdp × model) uses {product} devices, but a slice has {per_slice}",
                ("mesh.data", "mesh.fsdp", "mesh.model", "cluster.devices_per_host"),
            )
        )
    rows = config.batch.rows
    if rows % (config.batch.microbatches * plan.row_shards):
        faults.append(
            Fault(
                "batch.rows",
                rows,
                f"should be divisible by microbatches × slices × data × fsdp = "
                f"{config.batch.microbatches} × {plan.num_slices} × {plan.data} × {plan.fsdp} "
                f"= {config.batch.microbatches * plan.row_shards}",
                ("batch.microbatches", "mesh.data", "mesh.fsdp"),
            )
        )
    return faults


def _data_faults(config: RunConfig) -> list[Fault]:
    faults = []
    length, context = config.data.row_length, config.model.context_length
    if length > context:
        faults.append(
            Fault(
                "data.row_length",
                length,
                f"is longer than the model's context of {context} tokens",
                ("model.context_length",),
            )
        )
    tokenizer = config.data.tokenizer
    if tokenizer.kind == "train" and tokenizer.vocab_size != config.model.vocab_size:
        faults.append(
            Fault(
                "model.vocab_size",
                config.model.vocab_size,
                f"should equal data.tokenizer.vocab_size = {tokenizer.vocab_size}",
                ("data.tokenizer.vocab_size",),
            )
        )
    if tokenizer.kind == "teacher" and config.teacher is None:
        faults.append(Fault("data.tokenizer.kind", "teacher", "needs a `teacher:` to take it from"))
    return faults


def _objective_faults(config: RunConfig) -> list[Fault]:
    faults = []
    if config.distilled and config.teacher is None:
        faults.append(Fault("teacher", None, "is missing: objective.kind is `distill`"))
    if config.teacher is not None:
        codec = config.teacher.codec
        if codec.k + codec.draws == 0:
            faults.append(
                Fault("teacher.codec", "k=0, draws=0", "sends nothing; raise one of them")
            )
        if codec.k > config.model.vocab_size:
            faults.append(
                Fault(
                    "teacher.codec.k",
                    codec.k,
                    f"is more than the vocabulary of {config.model.vocab_size}",
                    ("model.vocab_size",),
                )
            )
    if not config.distilled and config.objective.label_weight:
        faults.append(
            Fault(
                "objective.label_weight",
                config.objective.label_weight,
                "only a distilled run mixes two losses; leave it at 0",
            )
        )
    if config.optimizer.warmup_steps >= config.steps:
        faults.append(
            Fault(
                "optimizer.warmup_steps",
                config.optimizer.warmup_steps,
                f"should be fewer than the {config.steps} steps",
                ("steps",),
            )
        )
    return faults
