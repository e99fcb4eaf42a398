"""One optimizer step of the student, as a pure function over a mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int32

from configs.run import ObjectiveConfig, RunConfig
from model.chunked_loss import chunked_loss
from model.chunked_objective import LossSums, Objective
from model.execution import Execution
from model.sharding import batch_sharding, param_shardings
from model.targets import Codec, HiddenCodec, Unembedding
from model.transformer import hidden_states, init_params
from workers.optimizer import learning_rate, make_optimizer

Params = Any
Encoded = dict[str, Array]


class TrainState(NamedTuple):
    """All that an optimizer step changes."""

    params: Params
    opt_state: optax.OptState
    step: Int32[Array, ""]


class Batch(NamedTuple):
    """The rows of one step on the devices; the fields are those of `rows.BatchArrays`."""

    inputs: Int[Array, "B T"]
    labels: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    mask: Bool[Array, "B T"]


class StepMetrics(NamedTuple):
    """What the record says about a step. Losses are nats per token over the global batch.

    That of `kd_loss` are the tokens that have targets.
    """

    loss: Float[Array, ""]
    kd_loss: Float[Array, ""]
    ce_loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    lr: Float[Array, ""]
    tokens: Int32[Array, ""]
    signal: Int32[Array, ""]


TrainStep = Callable[..., tuple[TrainState, StepMetrics]]

# Which rows of a batch have targets, among the arrays of the targets.
HAS_TARGETS = "has_targets"


def init_state(config: RunConfig, seed: int) -> TrainState:
    """A student at step 0; a pure function of the configuration and the seed."""
    params = init_params(config.model, jax.random.key(seed))
    opt_state = make_optimizer(config.optimizer, config.steps).init(params)
    return TrainState(params, opt_state, jnp.zeros((), jnp.int32))


def state_shardings(config: RunConfig, mesh: Mesh) -> TrainState:
    """The sharding of each leaf of the state; optimizer moments lie where their parameter lies."""
    return param_shardings(jax.eval_shape(lambda: init_state(config, 0)), mesh)


def make_init(config: RunConfig, mesh: Mesh) -> Callable[[], TrainState]:
    """A jitted initialisation that makes each shard on its own device."""
    return jax.jit(
        lambda: init_state(config, config.seed), out_shardings=state_shardings(config, mesh)
    )


def label_weight(objective: ObjectiveConfig, num_steps: int, step: Array) -> Float[Array, ""]:
    """Share of the labels' loss at `step`, from the first share to the last along a line."""
    first, last = objective.label_weight, objective.final_label_weight
    share = jnp.float32(first)
    if last is None:
        return share
    done = step.astype(jnp.float32) / max(num_steps - 1, 1)
    return share + jnp.minimum(done, 1.0) * (last - first)


def loss_sums(
    params: Params,
    batch: Batch,
    encoded: Encoded,
    share: Array,
    config: RunConfig,
    codec: Codec | None,
    mesh: Mesh | None = None,
    unembedding: Unembedding | None = None,
) -> tuple[Float[Array, ""], LossSums]:
    """The loss to minimise, summed over the labelled tokens of a microbatch, and its parts.

    Distillation is the negative log-likelihood of the student under the teacher's
    distribution (Gemma 2 report, section 3) or another divergence from it, mixed with a share
    of the labels' loss.
    """
    x_BTD = hidden_states(
        params,
        config.model,
        batch.inputs,
        batch.segments,
        batch.positions,
        Execution(config.compute_dtype, config.attention, config.remat, mesh),
    )
    vocab_size = config.model.vocab_size
    taught_B = encoded.get(HAS_TARGETS)
    sums = chunked_loss(
        x_BTD,
        params["embedding"],
        batch.labels,
        batch.mask,
        None if codec is None else codec.decode(encoded, vocab_size, unembedding),
        share,
        model=config.model,
        objective=objective_of(config),
        taught_BT=None if taught_B is None else _taught(taught_B, batch),
        mesh=mesh,
    )
    return sums.loss, sums


def objective_of(config: RunConfig) -> Objective:
    """What a configuration says that the student minimises."""
    said = config.objective
    return Objective(
        divergence=said.divergence,
        beta=Objective.beta if said.beta is None else said.beta,
        temperature=1.0 if config.teacher is None else config.teacher.codec.temperature,
        z_weight=said.z_loss,
    )


def _taught(taught_B: Bool[Array, " B"], batch: Batch) -> Bool[Array, "B T"]:
    return jnp.broadcast_to(taught_B[:, None], batch.mask.shape)


def make_train_step(
    config: RunConfig, codec: Codec | None, mesh: Mesh, guarded: bool = False
) -> TrainStep:
    """The jitted step `(state, batch, encoded, signals) → (state, metrics)`.

    `encoded` holds the targets as `codec` encodes them, leading axis B ({} on next tokens). Its
    entry `HAS_TARGETS`, bool [B], may say that some rows have none: those learn their labels
    alone, whatever stands in their targets. A step on hidden states takes the teacher's
    `Unembedding` as one argument more, laid out as `unembedding_shardings` says.
    `signals` is int32 [devices]: each host sets its own devices' entries; the largest comes
    back as `metrics.signal`, so that all hosts learn of a request to stop at the same step.
    A `guarded` step takes a float32 scalar more, after `signals`: the largest loss that the state
    may take in. If the loss is larger, or the loss or the gradient's norm is not finite, parameters
    and optimizer stay as they were; the counter of steps and the schedule go on. It rounds
    otherwise than a step without the guard, which is compiled apart.
    The state is donated. Averages are over the labelled tokens of the whole global batch,
    whatever the number of microbatches; that of `kd_loss` over those that have targets.
    """
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = learning_rate(config.optimizer, config.steps)
    num_parts = config.batch.microbatches

    def train_step(
        state: TrainState,
        batch: Batch,
        encoded: Encoded,
        signals: Int32[Array, " N"],
        *others: Any,
    ) -> tuple[TrainState, StepMetrics]:
        limit, unembedding = (others[0], others[1:]) if guarded else (None, others)
        share = label_weight(config.objective, config.steps, state.step)
        grad_sums = jax.grad(
            lambda params, part: loss_sums(
                params, part[0], part[1], share, config, codec, mesh, *unembedding
            ),
            has_aux=True,
        )
        if num_parts == 1:
            grads, sums = grad_sums(state.params, (batch, encoded))
        else:
            grads, sums = _accumulate(
                lambda part: grad_sums(state.params, part), (batch, encoded), num_parts
            )
        tokens = batch.mask.sum(dtype=jnp.int32)
        denominator = jnp.maximum(tokens, 1).astype(jnp.float32)
        taught = tokens
        if (taught_B := encoded.get(HAS_TARGETS)) is not None:
            taught = jnp.sum(batch.mask & _taught(taught_B, batch), dtype=jnp.int32)
        grads = jax.tree.map(lambda g: g / denominator, grads)
        loss, grad_norm = sums.loss / denominator, optax.global_norm(grads)
        if limit is None:
            params, opt_state = _updated(optimizer, grads, state.params, state.opt_state)
        else:
            taken = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (loss <= limit)
            # A branch and no choice between two states, of which there is room for one.
            params, opt_state = jax.lax.cond(
                taken,
                lambda state: _updated(optimizer, grads, state.params, state.opt_state),
                lambda state: (state.params, _only_counted(state.opt_state)),
                state,
            )
        metrics = StepMetrics(
            loss=loss,
            kd_loss=sums.kd_loss / jnp.maximum(taught, 1).astype(jnp.float32),
            ce_loss=sums.ce_loss / denominator,
            grad_norm=grad_norm,
            lr=jnp.asarray(schedule(state.step), jnp.float32),
            tokens=tokens,
            signal=signals.max(),
        )
        return TrainState(params, opt_state, state.step + 1), metrics

    rows = batch_sharding(mesh)
    shardings = state_shardings(config, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    inputs: list[Any] = [shardings, rows, rows, signal_sharding(mesh)]
    if guarded:
        inputs.append(whole)
    if isinstance(codec, HiddenCodec):
        inputs.append(unembedding_shardings(mesh))
    return jax.jit(
        train_step,
        in_shardings=tuple(inputs),
        out_shardings=(shardings, whole),
        donate_argnums=0,
    )


def _updated(
    optimizer: optax.GradientTransformation, grads: Params, params: Params, opt_state: Any
) -> tuple[Params, optax.OptState]:
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _only_counted(opt_state: Any) -> Any:
    """The optimizer as it was, but for its place in the schedule, which follows the steps."""

    def count(part: Any) -> Any:
        is_schedule = isinstance(part, optax.ScaleByScheduleState)
        return part._replace(count=part.count + 1) if is_schedule else part

    return jax.tree.map(
        count, opt_state, is_leaf=lambda part: isinstance(part, optax.ScaleByScheduleState)
    )


def signal_sharding(mesh: Mesh) -> NamedSharding:
    """One entry of the signals per device."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def unembedding_shardings(mesh: Mesh) -> Unembedding:
    """A teacher's embedding by rows over "model", as the loss takes it."""
    by_rows: Any = NamedSharding(mesh, PartitionSpec("model"))
    whole: Any = NamedSharding(mesh, PartitionSpec())
    return Unembedding(by_rows, whole)


def _accumulate(grad_sums: Callable[[Any], Any], parts: Any, num_parts: int) -> Any:
    """Sums gradients and losses over microbatches.

    Microbatch m takes rows m, m + num_parts, …: each device's rows stay on that device.
    """
    split = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // num_parts, num_parts, *x.shape[1:]), 1, 0),
        parts,
    )
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype),
        jax.eval_shape(grad_sums, jax.tree.map(lambda x: x[0], split)),
    )
    total, _ = jax.lax.scan(
        lambda total, part: (jax.tree.map(jnp.add, total, grad_sums(part)), None), zeros, split
    )
    return total
