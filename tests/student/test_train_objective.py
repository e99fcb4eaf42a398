"""What a step of a distilled run learns from: targets, labels, both, or hidden states."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.run import ObjectiveConfig
from model.codecs.rows import encode_rows
from model.sharding import make_mesh
from model.targets import Unembedding, make_codec
from model.transformer import hidden_states, unembed
from tests.helpers.runs import VOCAB_SIZE
from tests.helpers.train_steps import (
    BATCH,
    NUM_ROWS,
    ROW_LENGTH,
    SOME,
    TEACHER_LOGITS,
    WHOLE,
    assert_close,
    config_of,
    encoded_by,
    fresh,
    gradients,
    log_probs,
    one_device,
    run_steps,
)
from workers.digest import state_digest
from workers.train_step import HAS_TARGETS, StepMetrics, label_weight, loss_sums

pytestmark = pytest.mark.slow


def test_all_probabilities_give_divergence_plus_entropy():
    config = config_of(distilled=True)
    params = fresh().params
    encoded = encoded_by(WHOLE)
    _, sums = jax.jit(lambda p: loss_sums(p, BATCH, encoded, jnp.float32(0), config, WHOLE))(params)
    log_q = np.asarray(jax.jit(log_probs)(params, BATCH), np.float64)
    log_p = np.asarray(jax.nn.log_softmax(TEACHER_LOGITS), np.float64)
    p, mask = np.exp(log_p), np.asarray(BATCH.mask)
    divergence = (p * (log_p - log_q)).sum(-1)[mask].sum()
    entropy = -(p * log_p).sum(-1)[mask].sum()
    assert float(sums.kd_loss) == pytest.approx(divergence + entropy, rel=1e-5)
    assert float(sums.loss) == float(sums.kd_loss), "no labels without label_weight"


def test_label_weight_mixes_losses_and_gradients():
    encoded = encoded_by(SOME)

    @jax.jit
    def at_three_weights(params: Any) -> list[tuple[Any, Any]]:
        cases = [
            (0.0, config_of(distilled=True), SOME),
            (0.0, config_of(), None),
            (0.25, config_of(distilled=True), SOME),
        ]
        return [
            jax.grad(
                lambda p, w=w, c=c, k=k: loss_sums(p, BATCH, encoded, jnp.float32(w), c, k),
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
def test_rows_without_targets_learn_their_labels_alone(microbatches):
    """Whatever stands in their targets; and with all targets the flag changes no bit."""
    config = config_of(distilled=True, label_weight=0.25, microbatches=microbatches)
    encoded = encoded_by(SOME)
    has = np.arange(NUM_ROWS) % 3 != 1

    def ran(rows: np.ndarray, has: np.ndarray | None) -> tuple[Any, StepMetrics]:
        part = BATCH._replace(mask=BATCH.mask & rows[:, None])
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
    labels = BATCH._replace(mask=BATCH.mask & ~has[:, None])
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


# Each divergence at each temperature: tests of the chunked loss.
@pytest.mark.parametrize(
    ("divergence", "temperature"), [("forward_kl", 1.0), ("reverse_kl", 2.0), ("jsd", 2.0)]
)
def test_hidden_states_serve_as_well_as_all_probabilities(divergence, temperature):
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
                BATCH,
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


def test_temperature_and_z_loss_of_the_configuration_are_used():
    codec = make_codec("full", temperature=2.0)
    config = config_of(
        objective={"kind": "distill", "z_loss": 0.5},
        teacher={"checkpoint": "teacher", "codec": {"kind": "full", "temperature": 2.0}},
    )
    encoded = encoded_by(codec)
    params = fresh().params
    _, sums = jax.jit(lambda p: loss_sums(p, BATCH, encoded, jnp.float32(0), config, codec))(params)
    x = hidden_states(params, config.model, BATCH.inputs, BATCH.segments, BATCH.positions)
    logits = unembed(params, config.model, x)
    p = jax.nn.softmax(TEACHER_LOGITS / 2)
    kd = -4 * (p * jax.nn.log_softmax(logits / 2)).sum(-1)[BATCH.mask].sum()
    z = jnp.square(jax.nn.logsumexp(logits, -1))[BATCH.mask].sum()
    assert float(sums.kd_loss) == pytest.approx(float(kd), rel=1e-5)
    assert float(sums.loss) == pytest.approx(float(kd + 0.5 * z), rel=1e-5)
