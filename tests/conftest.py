"""Set before JAX is imported: eight CPU devices. Array annotations are checked in every test."""

import os

from orchestrator.cpu_devices import cpu_devices

os.environ |= cpu_devices(8)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # tests compile more than they compute
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("WANDB_MODE", "offline")

from jaxtyping import install_import_hook

from tests import annotations

# The modules that handle arrays.
install_import_hook(
    [
        "model.attention",
        "model.cache",
        "model.codecs.base",
        "model.codecs.bits",
        "model.codecs.blocks",
        "model.codecs.rows",
        "model.codecs.sparse",
        "model.codecs.values",
        "model.codecs.whole",
        "model.chunked_loss",
        "model.chunked_objective",
        "model.chunked_terms",
        "model.chunked_vocabulary",
        "model.kernels",
        "model.layers",
        "model.losses",
        "model.sampling",
        "model.sharding",
        "model.targets",
        "model.tensor_files",
        "model.transformer",
        "model.weights",
        "workers.dataset",
        "workers.digest",
        "workers.evaluator",
        "workers.params_stream",
        "workers.rows",
        "workers.target_stream",
        "workers.targets_protocol",
        "workers.teacher",
        "workers.train_step",
    ],
    f"{annotations.__name__}.checked",
)
