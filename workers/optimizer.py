"""AdamW with warm-up and cosine decay, as optax transformations."""

from typing import Any

import jax
import optax

from configs.run import OptimizerConfig


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine down to its last fraction at `num_steps`.

    The warm-up starts one rung above 0, so that the first step already moves.
    """
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=config.peak_lr / (config.warmup_steps + 1),
        peak_value=config.peak_lr,
        warmup_steps=config.warmup_steps,
        decay_steps=num_steps,
        end_value=config.peak_lr * config.final_lr_ratio,
    )


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clips by global norm, then AdamW with decay on matrices only (not on norm scales)."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, num_steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map_with_path(_is_matrix, params),
        ),
    )


def _is_matrix(path: tuple[Any, ...], param: jax.Array) -> bool:
    return jax.tree_util.keystr(path[-1:], simple=True) != "scale"
