"""Set before JAX is imported: eight CPU devices. Array annotations are checked in every test."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # tests compile more than they compute
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("WANDB_MODE", "offline")

from jaxtyping import install_import_hook

from tests import annotations

# The modules that handle arrays.
install_import_hook(
    [
        "model.attention",
        "model.layers",
        "model.losses",
        "model.sharding",
        "model.targets",
        "model.transformer",
        "workers.dataset",
        "workers.digest",
        "workers.evaluator",
        "workers.rows",
        "workers.target_stream",
        "workers.targets_protocol",
        "workers.teacher",
        "workers.train_step",
    ],
    f"{annotations.__name__}.checked",
)
