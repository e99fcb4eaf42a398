"""Shardings of parameters, optimizer states and batches on eight host devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from model.config import MODEL_PRESETS
from model.losses import next_token_loss
from model.sharding import MESH_AXES, batch_sharding, make_mesh, param_shardings
from model.transformer import hidden_states, init_params, unembed

TINY = MODEL_PRESETS["tiny"].model_copy(update={"num_layers": 3})


def shapes(config=TINY):
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "model": 2})


def test_the_mesh_has_all_axes_in_order(mesh):
    assert mesh.axis_names == MESH_AXES == ("slice", "data", "fsdp", "model")
    assert dict(mesh.shape) == {"slice": 1, "data": 2, "fsdp": 2, "model": 2}


def test_every_parameter_has_a_sharding_of_its_rank(mesh):
    specs = jax.tree.map(lambda s: s.spec, param_shardings(shapes(), mesh))
    assert specs["embedding"] == PartitionSpec("model", "fsdp")
    for layer, stack in ((specs["pairs"]["global"], (None,)), (specs["last"], ())):
        assert layer["attention"]["query"] == PartitionSpec(*stack, "fsdp", "model", None)
        assert layer["attention"]["output"] == PartitionSpec(*stack, "model", None, "fsdp")
        assert layer["feed_forward"]["down"] == PartitionSpec(*stack, "model", "fsdp")
        assert layer["pre_attention_norm"]["scale"] == PartitionSpec(*stack, None)


def test_optimizer_states_follow_their_parameters(mesh):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = jax.eval_shape(optimizer.init, shapes())
    shardings = param_shardings(state, mesh)
    adam = shardings[1][0]
    assert adam.mu["last"]["feed_forward"]["gate"].spec == PartitionSpec("fsdp", "model")
    assert adam.nu["embedding"].spec == PartitionSpec("model", "fsdp")
    assert adam.count.spec == PartitionSpec()


def test_a_sharded_gradient_equals_that_of_one_device(mesh):
    params = jax.jit(lambda: init_params(TINY, jax.random.key(0)))()
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (4, 16))
    ones, positions = np.ones_like(tokens), np.tile(np.arange(16), (4, 1))

    @jax.jit
    def gradient(params, tokens, segments, positions):
        def loss(params):
            x = hidden_states(params, TINY, tokens, segments, positions)
            logits = unembed(params, TINY, x)
            return next_token_loss(logits, tokens, jnp.ones(tokens.shape))[0]

        return jax.grad(loss)(params)

    expected = gradient(params, tokens, ones, positions)
    shardings = param_shardings(params, mesh)
    rows = batch_sharding(mesh)
    assert rows.spec == PartitionSpec(("slice", "data", "fsdp"))
    batch = [jax.device_put(array, rows) for array in (tokens, ones, positions)]
    assert batch[0].addressable_shards[0].data.shape == (1, 16)
    sharded = gradient(jax.device_put(params, shardings), *batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), sharded, expected)
    gate = jax.device_put(params, shardings)["pairs"]["local"]["feed_forward"]["gate"]
    assert gate.addressable_shards[0].data.shape == (1, 16, 32)


def test_few_key_value_heads_are_replicated_but_no_other_dim_is():
    mesh = make_mesh({"model": 8})
    wide = TINY.model_copy(update={"num_heads": 8})
    attention = param_shardings(shapes(wide), mesh)["last"]["attention"]
    assert attention["key"].spec == PartitionSpec("fsdp", None, None)
    assert attention["query"].spec == PartitionSpec("fsdp", "model", None)
    with pytest.raises(ValueError, match=r"attention/output.*heads of size 4.*'model' of size 8"):
        param_shardings(shapes(), mesh)
    odd = TINY.model_copy(update={"width": 36})
    with pytest.raises(ValueError, match=r"embedding.*width of size 36.*'fsdp' of size 8"):
        param_shardings(shapes(odd), make_mesh({"fsdp": 8}))


def test_unknown_leaves_and_wrong_meshes_are_refused(mesh):
    with pytest.raises(ValueError, match="adapter/bias has no sharding"):
        param_shardings({"adapter": {"bias": jnp.zeros(4)}}, mesh)
    with pytest.raises(ValueError, match="gate has shape"):
        param_shardings({"gate": jnp.zeros((2, 2, 2))}, mesh)
    with pytest.raises(ValueError, match="needs 4 devices, there are 8"):
        make_mesh({"fsdp": 4})
    with pytest.raises(ValueError, match=r"unknown mesh axes \['tensor'\]"):
        make_mesh({"tensor": 8})
