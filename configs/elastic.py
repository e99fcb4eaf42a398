"""The same run on fewer slices: the same batches, in more parts."""

from configs.checks import layout
from configs.run import RunConfig


def possible_slices(config: RunConfig, num_there: int) -> int:
    """The most slices, of those there are, among which the run's batch can be divided.

    Returns:
        At most `cluster.num_slices`; 0 where fewer are there than `cluster.min_slices` allows.
    """
    wanted = config.cluster.num_slices
    least = config.cluster.min_slices or wanted
    plan = layout(config)
    for num_slices in range(min(num_there, wanted), least - 1, -1):
        if plan.rows % (num_slices * plan.data * plan.fsdp) == 0:
            return num_slices
    return 0


def on_slices(config: RunConfig, num_slices: int) -> RunConfig:
    """The run with the same global batch on other slices.

    A device has at most as many rows at once as before, so that they fit into its memory.

    Args:
        num_slices: one that `possible_slices` gives.
    """
    plan = layout(config)
    row_shards = num_slices * plan.data * plan.fsdp
    assert plan.rows % row_shards == 0, "asked of `possible_slices`"
    microbatches = -(-plan.rows // (row_shards * plan.rows_per_shard))
    while plan.rows % (row_shards * microbatches):
        microbatches += 1
    cluster = config.cluster.model_copy(update={"num_slices": num_slices})
    batch = config.batch.model_copy(update={"microbatches": microbatches})
    return config.model_copy(update={"cluster": cluster, "batch": batch})
