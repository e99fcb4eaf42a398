"""One step: the right average, the same on every mesh and division, in the right types."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from configs.load import parse_run
from configs.run import ObjectiveConfig, OptimizerConfig, RunConfig
from model.codecs.rows import encode_rows
from model.sharding import MESH_AXES, batch_sharding, make_mesh
from model.targets import Codec, Unembedding, make_codec
from model.transformer import hidden_states, unembed
from tests.runs import VOCAB_SIZE, tiny_values
from workers.digest import state_digest
from workers.optimizer import learning_rate, make_optimizer
from workers.train_step import (
    HAS_TARGETS,
    Batch,
    StepMetrics,
    TrainState,
    TrainStep,
    init_state,
    label_weight,
    loss_sums,
    make_init,
    make_train_step,
    signal_sharding,
    state_shardings,
    unembedding_shardings,
)

NUM_ROWS, ROW_LENGTH = 16, 32
BETA1 = 0.9
WHOLE = make_codec("full")
SOME = make_codec("hybrid", k=4, draws=6)


def config_of(distilled: bool = False, **changes: Any) -> RunConfig:
    values = tiny_values(Path("unused"), "run")
    values["model"] = {**values["model"], "num_layers": 1}
    values["batch"] = {"rows": NUM_ROWS, "microbatches": changes.pop("microbatches", 1)}
    values["optimizer"] = {"clip_norm": 1e6, "beta1": BETA1, "warmup_steps": 2}
    values["cluster"] = {"devices_per_host": 1}
    if distilled:
        weight = changes.pop("label_weight", 0.0)
        values["objective"] = {"kind": "distill", "label_weight": weight}
        values["teacher"] = {"checkpoint": "teacher"}
    return parse_run(values | changes, "test")


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Rows of 0 to 32 labelled tokens, most of them with few; two documents in each."""
    rng = np.random.default_rng(0)
    shape = (NUM_ROWS, ROW_LENGTH)
    tokens = rng.integers(4, VOCAB_SIZE, (NUM_ROWS, ROW_LENGTH + 1), np.int32)
    columns = np.broadcast_to(np.arange(ROW_LENGTH, dtype=np.int32), shape)
    labelled = np.array([0, 1, 1, 2, 32, 1, 3, 1, 32, 1, 1, 30, 2, 1, 0, 17])
    return Batch(
        inputs=jnp.asarray(tokens[:, :-1]),
        labels=jnp.asarray(tokens[:, 1:]),
        positions=jnp.asarray(np.where(columns < 10, columns, columns - 10)),
        segments=jnp.asarray(np.where(columns < 10, 1, 2).astype(np.int32)),
        mask=jnp.asarray(columns < labelled[:, None]),
    )


@pytest.fixture(scope="module")
def teacher_logits() -> jax.Array:
    logits = np.random.default_rng(1).normal(0, 3, (NUM_ROWS, ROW_LENGTH, VOCAB_SIZE))
    return jnp.asarray(logits, jnp.float32)


def encoded_by(codec: Codec, logits: jax.Array) -> dict[str, jax.Array]:
    keys = np.arange(2 * NUM_ROWS, dtype=np.uint32).reshape(NUM_ROWS, 2)
    return jax.jit(codec.encode)(logits, keys)


@functools.cache
def fresh(seed: int = 0) -> TrainState:
    """A student on the host."""
    return jax.device_get(jax.jit(lambda: init_state(config_of(), seed))())


@functools.cache
def compiled(config_json: str, codec: Codec | None, mesh: Mesh) -> TrainStep:
    return make_train_step(RunConfig.model_validate_json(config_json), codec, mesh)


def run_steps(
    config: RunConfig,
    batch: Batch,
    mesh: Mesh,
    codec: Codec | None = None,
    encoded: dict[str, jax.Array] | None = None,
    signals: list[int] | None = None,
    num_steps: int = 1,
    unembedding: tuple[Unembedding, ...] = (),
) -> tuple[TrainState, StepMetrics]:
    state = jax.device_put(fresh(), state_shardings(config, mesh))
    step = compiled(config.model_dump_json(), codec, mesh)
    rows, targets = jax.device_put((batch, encoded or {}), batch_sharding(mesh))
    shared = jax.device_put(np.array(signals or [0] * mesh.size, np.int32), signal_sharding(mesh))
    others = [jax.device_put(each, unembedding_shardings(mesh)) for each in unembedding]
    metrics = None
    for _ in range(num_steps):
        state, metrics = step(state, rows, targets, shared, *others)
    assert metrics is not None
    return jax.device_get(state), jax.device_get(metrics)


def gradients(state: TrainState) -> Any:
    """Of the first step, out of Adam's first moment (nothing was clipped)."""
    mean = optax.tree_utils.tree_get(state.opt_state, "mu")
    return jax.tree.map(lambda m: m / (1 - BETA1), mean)


def log_probs(params: Any, batch: Batch) -> jax.Array:
    model = config_of().model
    x = hidden_states(params, model, batch.inputs, batch.segments, batch.positions)
    return jax.nn.log_softmax(unembed(params, model, x))


def assert_close(found: Any, expected: Any, relative: float = 2e-5) -> None:
    """Each leaf within `relative` of the largest entry of that leaf."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        bound = relative * np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))


def one_device() -> Mesh:
    return make_mesh({}, jax.devices()[:1])


@pytest.fixture(scope="module")
def direct(batch: Batch) -> tuple[float, Any]:
    """Loss and gradients over all labelled tokens at once, written down plainly."""

    def mean_loss(params: Any) -> jax.Array:
        of_label = jnp.take_along_axis(log_probs(params, batch), batch.labels[..., None], -1)[
            ..., 0
        ]
        return -jnp.sum(of_label * batch.mask) / jnp.sum(batch.mask)

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(fresh().params)
    return float(loss), jax.device_get(grads)


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_every_labelled_token_weighs_the_same(batch, direct, microbatches):
    state, metrics = run_steps(config_of(microbatches=microbatches), batch, one_device())
    loss, grads = direct
    assert metrics.loss == pytest.approx(loss, rel=1e-5)
    assert metrics.ce_loss == metrics.loss and metrics.kd_loss == 0
    assert metrics.tokens == batch.mask.sum()
    assert metrics.grad_norm == pytest.approx(float(optax.global_norm(grads)), rel=1e-5)
    assert_close(gradients(state), grads)


@pytest.fixture(scope="module")
def distilled_alone(batch, teacher_logits) -> tuple[TrainState, StepMetrics]:
    config = config_of(distilled=True, label_weight=0.25)
    return run_steps(config, batch, one_device(), SOME, encoded_by(SOME, teacher_logits))


@pytest.mark.parametrize(
    ("shape", "microbatches"),
    [((1, 8, 1, 1), 2), ((1, 1, 8, 1), 1), ((2, 1, 2, 2), 4), ((1, 2, 1, 4), 1)],
)
def test_meshes_agree_with_one_device(batch, teacher_logits, distilled_alone, shape, microbatches):
    config = config_of(distilled=True, label_weight=0.25, microbatches=microbatches)
    mesh = make_mesh(dict(zip(MESH_AXES, shape, strict=True)))
    encoded = encoded_by(SOME, teacher_logits)
    state, metrics = run_steps(config, batch, mesh, SOME, encoded)
    alone, alone_metrics = distilled_alone
    np.testing.assert_allclose(
        np.array(metrics, np.float64), np.array(alone_metrics, np.float64), rtol=1e-5
    )
    assert_close(gradients(state), gradients(alone))
    # Adam divides by the gradient's size: where that is nearly 0, only the bound on a step holds.
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone.params), strict=True):
        assert np.abs(a - b).max() <= 2.1 * metrics.lr
        assert np.mean(np.abs(a - b)) <= 1e-2 * metrics.lr
    assert state.step == 1


def test_the_same_mesh_gives_the_same_bits(batch, teacher_logits):
    config = config_of(distilled=True, label_weight=0.25, microbatches=4)
    mesh = make_mesh({"slice": 2, "fsdp": 2, "model": 2})
    encoded = encoded_by(SOME, teacher_logits)
    signals = [0, 0, 0, 0, 0, 3, 1, 0]
    first, metrics = run_steps(config, batch, mesh, SOME, encoded, signals, num_steps=3)
    again, metrics_again = run_steps(config, batch, mesh, SOME, encoded, signals, num_steps=3)
    assert state_digest(first) == state_digest(again)
    assert [float(m).hex() for m in metrics] == [float(m).hex() for m in metrics_again]
    assert metrics.signal == 3, "the largest of all devices"
    assert first.step == 3


def test_a_new_student_does_not_depend_on_the_mesh():
    made = make_init(config_of(), make_mesh({"slice": 2, "fsdp": 2, "model": 2}))()
    assert state_digest(made) == state_digest(fresh())
    assert state_digest(fresh(1)) != state_digest(fresh())


def test_all_probabilities_give_divergence_plus_entropy(batch, teacher_logits):
    config = config_of(distilled=True)
    params = fresh().params
    encoded = encoded_by(WHOLE, teacher_logits)
    _, sums = jax.jit(lambda p: loss_sums(p, batch, encoded, jnp.float32(0), config, WHOLE))(params)
    log_q = np.asarray(jax.jit(log_probs)(params, batch), np.float64)
    log_p = np.asarray(jax.nn.log_softmax(teacher_logits), np.float64)
    p, mask = np.exp(log_p), np.asarray(batch.mask)
    divergence = (p * (log_p - log_q)).sum(-1)[mask].sum()
    entropy = -(p * log_p).sum(-1)[mask].sum()
    assert float(sums.kd_loss) == pytest.approx(divergence + entropy, rel=1e-5)
    assert float(sums.loss) == float(sums.kd_loss), "no labels without label_weight"


def test_label_weight_mixes_losses_and_gradients(batch, teacher_logits):
    encoded = encoded_by(SOME, teacher_logits)

    @jax.jit
    def at_three_weights(params: Any) -> list[tuple[Any, Any]]:
        cases = [
            (0.0, config_of(distilled=True), SOME),
            (0.0, config_of(), None),
            (0.25, config_of(distilled=True), SOME),
        ]
        return [
            jax.grad(
                lambda p, w=w, c=c, k=k: loss_sums(p, batch, encoded, jnp.float32(w), c, k),
                has_aux=True,
            )(params)
            for w, c, k in cases
        ]

    (kd_grads, kd), (ce_grads, ce), (mixed_grads, mixed) = at_three_weights(fresh().params)
    assert float(mixed.kd_loss) == pytest.approx(float(kd.loss), rel=1e-6)
    assert float(mixed.ce_loss) == pytest.approx(float(ce.loss), rel=1e-6)
    expected = 0.75 * float(kd.loss) + 0.25 * float(ce.loss)
    assert float(mixed.loss) == pytest.approx(expected, rel=1e-6)
    assert_close(mixed_grads, jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, kd_grads, ce_grads))


@pytest.mark.parametrize("microbatches", [1, 2])
def test_rows_without_targets_learn_their_labels_alone(batch, teacher_logits, microbatches):
    """Whatever stands in their targets; and with all targets the flag changes no bit."""
    config = config_of(distilled=True, label_weight=0.25, microbatches=microbatches)
    encoded = encoded_by(SOME, teacher_logits)
    has = np.arange(NUM_ROWS) % 3 != 1

    def ran(rows: np.ndarray, has: np.ndarray | None) -> tuple[Any, StepMetrics]:
        part = batch._replace(mask=batch.mask & rows[:, None])
        flag = {} if has is None else {HAS_TARGETS: jnp.asarray(has)}
        spoilt = (
            encoded["probs"]
            if has is None
            else jnp.where(has[:, None, None], encoded["probs"], jnp.nan)
        )
        targets = {**encoded, "probs": spoilt, **flag}
        state, metrics = run_steps(config, part, one_device(), SOME, targets)
        return gradients(state), metrics

    everywhere = np.ones(NUM_ROWS, bool)
    grads, metrics = ran(everywhere, has)
    with_grads, with_targets = ran(has, None)
    labels = batch._replace(mask=batch.mask & ~has[:, None])
    without, labels_metrics = run_steps(config_of(microbatches=microbatches), labels, one_device())
    share = with_targets.tokens / metrics.tokens
    assert 0 < share < 1 and metrics.tokens == with_targets.tokens + labels_metrics.tokens
    assert metrics.kd_loss == pytest.approx(float(with_targets.kd_loss), rel=1e-6)
    loss = share * with_targets.loss + (1 - share) * labels_metrics.loss
    assert metrics.loss == pytest.approx(float(loss), rel=1e-6)
    mixed = jax.tree.map(lambda a, b: share * a + (1 - share) * b, with_grads, gradients(without))
    assert_close(grads, mixed)
    _, nobody = ran(everywhere, ~everywhere)
    assert nobody.kd_loss == 0 and nobody.loss == nobody.ce_loss
    (plain_grads, plain), (flagged_grads, flagged) = (
        ran(everywhere, None),
        ran(everywhere, everywhere),
    )
    assert [float(m).hex() for m in flagged] == [float(m).hex() for m in plain]
    assert state_digest(flagged_grads) == state_digest(plain_grads)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_hidden_states_serve_as_well_as_all_probabilities(batch, divergence, temperature):
    """A teacher of other width and softcap; its logits are made of bfloat16 on both ways."""
    mesh = make_mesh({"data": 2, "fsdp": 2, "model": 2})
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(0, 1, (NUM_ROWS, ROW_LENGTH, 24)), jnp.float32)
    table = jnp.asarray(rng.normal(0, 0.7, (VOCAB_SIZE, 24)), jnp.float32)
    teacher = config_of().model.model_copy(update={"final_softcap": 10.0})
    keys = np.zeros((NUM_ROWS, 2), np.uint32)
    results = []
    for kind in ("hidden", "full"):
        codec = make_codec(kind, temperature=temperature)
        config = config_of(
            objective={"kind": "distill", "divergence": divergence},
            teacher={"checkpoint": "x", "codec": {"kind": kind, "temperature": temperature}},
        )
        sent = x.astype(jnp.bfloat16)
        encoded = encode_rows(codec, {"embedding": table}, teacher, sent, keys)
        assert encoded.keys() == {"hidden": {"x", "log_norm"}, "full": {"log_probs"}}[kind]
        unembedding = (Unembedding(table.astype(jnp.bfloat16), jnp.float32(10.0)),)
        results.append(
            run_steps(
                config,
                batch,
                mesh,
                codec,
                encoded,
                unembedding=unembedding if kind == "hidden" else (),
            )
        )
    (state, metrics), (other, other_metrics) = results
    assert metrics.kd_loss > 0 and np.isfinite(metrics.loss)
    np.testing.assert_allclose(
        np.array(metrics, np.float64), np.array(other_metrics, np.float64), rtol=2e-5
    )
    assert_close(gradients(state), gradients(other))


def test_the_share_of_labels_moves_along_a_line():
    moving = ObjectiveConfig(label_weight=0.2, final_label_weight=0.8)
    shares = [float(label_weight(moving, 7, jnp.int32(step))) for step in (0, 3, 6, 9)]
    assert shares == pytest.approx([0.2, 0.5, 0.8, 0.8])
    constant = ObjectiveConfig(label_weight=0.2)
    assert float(label_weight(constant, 7, jnp.int32(5))) == pytest.approx(0.2)
    assert float(label_weight(moving, 1, jnp.int32(0))) == pytest.approx(0.2)


def test_temperature_and_z_loss_of_the_configuration_are_used(batch, teacher_logits):
    codec = make_codec("full", temperature=2.0)
    config = config_of(
        objective={"kind": "distill", "z_loss": 0.5},
        teacher={"checkpoint": "teacher", "codec": {"kind": "full", "temperature": 2.0}},
    )
    encoded = encoded_by(codec, teacher_logits)
    params = fresh().params
    _, sums = jax.jit(lambda p: loss_sums(p, batch, encoded, jnp.float32(0), config, codec))(params)
    x = hidden_states(params, config.model, batch.inputs, batch.segments, batch.positions)
    logits = unembed(params, config.model, x)
    p = jax.nn.softmax(teacher_logits / 2)
    kd = -4 * (p * jax.nn.log_softmax(logits / 2)).sum(-1)[batch.mask].sum()
    z = jnp.square(jax.nn.logsumexp(logits, -1))[batch.mask].sum()
    assert float(sums.kd_loss) == pytest.approx(float(kd), rel=1e-5)
    assert float(sums.loss) == pytest.approx(float(kd + 0.5 * z), rel=1e-5)


def test_bfloat16_computes_roughly_and_keeps_float32_weights(batch, direct):
    config = config_of(compute_dtype="bfloat16")
    state, metrics = run_steps(config, batch, one_device())
    loss, _ = direct
    assert metrics.loss == pytest.approx(loss, rel=2e-2)
    assert metrics.loss != pytest.approx(loss, rel=1e-7), "bfloat16 was used"
    leaves = jax.tree.leaves((state.params, state.opt_state))
    assert {leaf.dtype.name for leaf in leaves} == {"float32", "int32"}
    embedding = state.params["embedding"]
    rounded = embedding.astype(jnp.bfloat16).astype(np.float32)
    assert np.mean(embedding != rounded) > 0.9


def test_a_batch_without_labels_changes_nothing_but_decay(batch):
    config = config_of()
    empty = batch._replace(mask=jnp.zeros_like(batch.mask))
    state, metrics = run_steps(config, empty, one_device())
    assert metrics.loss == 0 and metrics.grad_norm == 0 and metrics.tokens == 0
    kept = 1 - metrics.lr * config.optimizer.weight_decay
    before = fresh().params["embedding"]
    np.testing.assert_allclose(state.params["embedding"], before * kept, rtol=1e-6)


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    config = OptimizerConfig(peak_lr=0.5, final_lr_ratio=0.2, warmup_steps=4)
    schedule = learning_rate(config, 20)
    for step in range(5):
        assert np.asarray(schedule(step)) == pytest.approx(
            0.5 * (step + 1) / 5 if step < 4 else 0.5
        )
    for step in range(4, 25):
        done = min(step - 4, 16) / 16
        expected = 0.5 * (0.2 + 0.8 * (1 + np.cos(np.pi * done)) / 2)
        assert np.asarray(schedule(step)) == pytest.approx(expected, rel=1e-5)


def test_a_step_uses_and_tells_the_learning_rate_of_its_number(batch):
    config = config_of()
    schedule = learning_rate(config.optimizer, config.steps)
    ran = [run_steps(config, batch, one_device(), num_steps=number) for number in (1, 2, 3)]
    rates = [float(metrics.lr) for _, metrics in ran]
    before, after = fresh().params["embedding"], ran[0][0].params["embedding"]
    assert rates == [pytest.approx(np.asarray(schedule(number))) for number in range(3)]
    # Adam's first step is one learning rate long, plus decay.
    moved = np.abs(after - before * (1 - rates[0] * config.optimizer.weight_decay))
    assert np.median(moved) == pytest.approx(rates[0], rel=1e-2)


def test_only_matrices_decay():
    config = OptimizerConfig(peak_lr=0.5, weight_decay=0.1)
    params = jax.tree.map(jnp.ones_like, fresh().params)
    optimizer = make_optimizer(config, 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(lambda: optimizer.update(zeros, optimizer.init(params), params))()
    scales = 0
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        is_scale = jax.tree_util.keystr(path, simple=True, separator=".").endswith("scale")
        scales += is_scale
        np.testing.assert_allclose(update, 0.0 if is_scale else -0.5 * 0.1, rtol=1e-6)
    assert scales == 4 + 1


@pytest.mark.parametrize(("norm", "factor"), [(10.0, 0.2), (1.5, 1.0)])
def test_gradients_are_clipped_by_their_global_norm(norm, factor):
    optimizer = make_optimizer(OptimizerConfig(clip_norm=2.0, beta1=BETA1), 10)
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(5)}
    grads = jax.tree.map(lambda p: jnp.full_like(p, norm / 3), params)
    assert float(optax.global_norm(grads)) == pytest.approx(norm)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    mean = optax.tree_utils.tree_get(state, "mu")
    for leaf in jax.tree.leaves(mean):
        np.testing.assert_allclose(leaf, (1 - BETA1) * factor * norm / 3, rtol=1e-6)
