"""What single fields cannot tell: combinations of settings that cannot work together."""

from collections.abc import Iterator
from dataclasses import dataclass

from configs.fault import NO_VALUE, Fault
from configs.run import RunConfig, TeacherConfig
from configs.topology import slice_topology

# Dims of the student that a mesh axis divides (`AXIS_RULES` and `PARAM_AXES` of model/sharding.py,
# which are not imported: they need JAX, and the orchestrator reads configurations without it).
DIVIDED_DIMS = (
    ("width", "fsdp"),
    ("num_heads", "model"),
    ("feed_forward", "model"),
    ("embedding_rows", "model"),
)
# Codecs whose targets every divergence can take.
WHOLE_CODECS = ("hidden", "full")
_MESH = ("mesh.data", "mesh.fsdp", "mesh.model")
_DEVICES = (
    "cluster.accelerator",
    "cluster.topology",
    "cluster.num_slices",
    "cluster.num_hosts",
    "cluster.devices_per_host",
)


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
        *_model_mesh_faults(config),
        *_data_faults(config),
        *_objective_faults(config),
        *_schedule_faults(config),
    ]


def _cluster_faults(config: RunConfig) -> Iterator[Fault]:
    cluster = config.cluster
    kind = ("cluster.accelerator",)
    if cluster.accelerator == "cpu":
        if cluster.topology is not None:
            message = "only TPU slices have a topology; set null or a TPU as cluster.accelerator"
            yield Fault("cluster.topology", cluster.topology, message, kind)
        if cluster.num_slices != 1:
            message = "only TPUs come in slices; use 1"
            yield Fault("cluster.num_slices", cluster.num_slices, message, kind)
        if cluster.min_slices is not None:
            message = "only TPUs come in slices; leave it out"
            yield Fault("cluster.min_slices", cluster.min_slices, message, kind)
        return
    if cluster.min_slices is not None and cluster.min_slices > cluster.num_slices:
        message = f"should be at most cluster.num_slices = {cluster.num_slices}"
        yield Fault("cluster.min_slices", cluster.min_slices, message, ("cluster.num_slices",))
    if cluster.topology is None:
        message = "is missing; give the chips of one slice by dimension, such as 2x2x2"
        yield Fault("cluster.topology", NO_VALUE, message, kind)
        return
    try:
        topology = slice_topology(cluster.accelerator, cluster.topology)
    except ValueError as error:
        yield Fault("cluster.topology", NO_VALUE, str(error), kind)
        return
    num_hosts = topology.num_hosts * cluster.num_slices
    for name, told, true in (
        ("num_hosts", cluster.num_hosts, num_hosts),
        ("devices_per_host", cluster.devices_per_host, topology.chips_per_host),
    ):
        if told not in (1, true):
            message = (
                f"should be {true}, which follows from {cluster.num_slices} × "
                f"{cluster.accelerator} {cluster.topology}; leave it out"
            )
            yield Fault(f"cluster.{name}", told, message, _DEVICES[:3])


def _mesh_faults(config: RunConfig) -> Iterator[Fault]:
    try:
        plan = layout(config)
    except ValueError:
        return  # said by the cluster's faults
    per_slice = plan.num_devices // plan.num_slices
    product = plan.data * plan.fsdp * plan.model
    if product != per_slice:
        message = (
            f"data × fsdp × model = {plan.data} × {plan.fsdp} × {plan.model} = {product}, but "
            f"{'there are' if config.cluster.accelerator == 'cpu' else 'a slice has'} "
            f"{per_slice} devices; change the mesh or the cluster"
        )
        yield Fault("mesh", NO_VALUE, message, _DEVICES)
    parts = plan.microbatches * plan.row_shards
    if plan.rows % parts:
        more = -(-plan.rows // parts) * parts
        message = (
            f"should be divisible by microbatches × slices × data × fsdp = {plan.microbatches} × "
            f"{plan.num_slices} × {plan.data} × {plan.fsdp} = {parts}; for example {more}"
        )
        involved = ("batch.microbatches", *_MESH, *_DEVICES)
        yield Fault("batch.rows", plan.rows, message, involved)


def _model_mesh_faults(config: RunConfig) -> Iterator[Fault]:
    for dim, axis in DIVIDED_DIMS:
        size, parts = getattr(config.model, dim), getattr(config.mesh, axis)
        if size % parts == 0:
            continue
        message = f"does not divide the model's {dim} of {size}; choose a divisor"
        if dim == "embedding_rows":
            padded = -(-size // parts) * parts
            message = (
                f"does not divide the {size} rows of the embedding; choose a divisor, or set "
                f"model.num_embeddings to {padded}"
            )
        involved = (
            ("model.vocab_size", "model.num_embeddings")
            if dim == "embedding_rows"
            else (f"model.{dim}",)
        )
        yield Fault(f"mesh.{axis}", parts, message, ("model.preset", *involved))


def _data_faults(config: RunConfig) -> Iterator[Fault]:
    length, context = config.data.row_length, config.model.context_length
    if length > context:
        message = f"is longer than the model's context of {context} tokens"
        involved = ("model.context_length", "model.preset")
        yield Fault("data.row_length", length, message, involved)
    tokenizer = config.data.tokenizer
    if tokenizer.kind == "train" and tokenizer.vocab_size != config.model.vocab_size:
        message = f"should equal data.tokenizer.vocab_size = {tokenizer.vocab_size}"
        involved = ("data.tokenizer", "model.preset")
        yield Fault("model.vocab_size", config.model.vocab_size, message, involved)
    if tokenizer.kind == "teacher" and not config.distilled:
        message = "only a distilled run has a teacher to take it from; use `train` or `import`"
        yield Fault("data.tokenizer.kind", tokenizer.kind, message, ("objective.kind",))
    if config.evaluation.enabled and config.data.held_out_fraction == 0:
        message = "leaves nothing to evaluate on; raise it, or set evaluation.enabled to false"
        yield Fault("data.held_out_fraction", 0, message, ("evaluation.enabled",))


def _objective_faults(config: RunConfig) -> Iterator[Fault]:
    objective, teacher = config.objective, config.teacher
    if config.distilled and teacher is None:
        message = "is missing, but objective.kind is `distill`; give at least a checkpoint"
        yield Fault("teacher", NO_VALUE, message, ("objective.kind",))
    if not config.distilled and teacher is not None:
        message = "would not be asked: objective.kind is `next_token`; set null, or use `distill`"
        yield Fault("teacher", NO_VALUE, message, ("objective.kind",))
    if objective.beta is not None and objective.divergence != "jsd":
        message = "is of `jsd` only; leave it out, or set objective.divergence to `jsd`"
        yield Fault("objective.beta", objective.beta, message, ("objective.divergence",))
    if not config.distilled and objective.divergence != "forward_kl":
        message = "is from a teacher, and objective.kind is `next_token`; leave it out"
        involved = ("objective.kind",)
        yield Fault("objective.divergence", objective.divergence, message, involved)
    for name in ("label_weight", "final_label_weight"):
        if not config.distilled and (weight := getattr(objective, name)):
            message = "only a distilled run mixes two losses; leave it out"
            yield Fault(f"objective.{name}", weight, message, ("objective.kind",))
    if teacher is None:
        return
    yield from _replica_faults(teacher)
    yield from _group_faults(teacher)
    if teacher.steps_per_request > teacher.prefetch_steps:
        message = f"is more than teacher.prefetch_steps, {teacher.prefetch_steps}; ask for fewer"
        involved = ("teacher.prefetch_steps",)
        yield Fault("teacher.steps_per_request", teacher.steps_per_request, message, involved)
    codec = teacher.codec
    if codec.k is not None and codec.k > config.model.vocab_size:
        message = f"is more than the vocabulary of {config.model.vocab_size} tokens"
        involved = ("model.vocab_size", "model.preset")
        yield Fault("teacher.codec.k", codec.k, message, involved)
    if objective.divergence != "forward_kl" and codec.kind not in WHOLE_CODECS:
        message = (
            f"needs the teacher's whole distribution, and codec `{codec.kind}` sends a part of it; "
            "set teacher.codec.kind to `hidden`, or take `forward_kl`"
        )
        yield Fault("objective.divergence", objective.divergence, message, ("teacher.codec",))


def _replica_faults(teacher: TeacherConfig) -> Iterator[Fault]:
    low, high = teacher.min_replicas, teacher.max_replicas
    if high is None:
        if low != 1:
            message = "has no effect without teacher.max_replicas; set that too, or leave it out"
            yield Fault("teacher.min_replicas", low, message, ("teacher.max_replicas",))
    elif low > high:
        message = f"is more than teacher.max_replicas, {high}; lower it, or raise that"
        yield Fault("teacher.min_replicas", low, message, ("teacher.max_replicas",))
    elif not low <= teacher.replicas <= high:
        message = f"should lie between teacher.min_replicas and max_replicas, {low} and {high}"
        involved = ("teacher.min_replicas", "teacher.max_replicas")
        yield Fault("teacher.replicas", teacher.replicas, message, involved)


def _group_faults(teacher: TeacherConfig) -> Iterator[Fault]:
    if teacher.groups and teacher.sameness == "exact":
        message = "are machines of other kinds, whose answers are only close; set it to `mixed`"
        yield Fault("teacher.sameness", NO_VALUE, f"teacher.groups {message}", ("teacher.groups",))
    if teacher.groups and teacher.max_replicas is not None:
        message = "sizes pools of one kind of replica; unset it, and size the groups by hand"
        yield Fault("teacher.max_replicas", teacher.max_replicas, message, ("teacher.groups",))
    names = [group.name for group in teacher.groups]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Fault("teacher.groups", name, "is the name of two groups; rename one of them")
    for path, kind in [
        ("teacher", teacher),
        *((f"teacher.groups.{i}", g) for i, g in enumerate(teacher.groups)),
    ]:
        if kind.tpus_per_replica and kind.gpus_per_replica:
            message = "a replica runs on TPUs or on GPUs; set one of them to 0"
            involved = (f"{path}.tpus_per_replica",)
            yield Fault(f"{path}.gpus_per_replica", kind.gpus_per_replica, message, involved)


def _schedule_faults(config: RunConfig) -> Iterator[Fault]:
    warmup = config.optimizer.warmup_steps
    if warmup >= config.steps:
        message = f"should be fewer than the {config.steps} steps"
        yield Fault("optimizer.warmup_steps", warmup, message, ("steps",))
