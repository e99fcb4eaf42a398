"""Names, shapes and layout of published weights."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import MODEL_PRESETS, ModelConfig, param_count
from model.weights import leaves_of, tensor_shapes
from tests.helpers.model_sizes import models

TINY = MODEL_PRESETS["tiny"]


@settings(deadline=None, max_examples=20)
@given(model=models(), seed=st.integers(0, 2**32 - 1))
def test_parameters_become_tensors_and_come_back_bit_for_bit(model: ModelConfig, seed: int):
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    parameters = {}
    leaves = leaves_of(model)
    for leaf in leaves:
        parameter = random.standard_normal(leaf.shape, np.float32)
        if leaf.path == ("embedding",):
            parameter[model.vocab_size :] = 0
        parameters[leaf.path] = parameter
        for name, tensor in leaf.split(parameter):
            assert name not in tensors
            tensors[name] = tensor.copy()
    assert {name: tensor.shape for name, tensor in tensors.items()} == tensor_shapes(model)
    surplus = (model.embedding_rows - model.vocab_size) * model.width
    assert sum(tensor.size for tensor in tensors.values()) == param_count(model).total - surplus
    for leaf in leaves:
        joined = leaf.join(tensors.__getitem__)
        assert joined.dtype == np.float32
        assert joined.tobytes() == parameters[leaf.path].tobytes(), leaf.path


def test_projections_lie_as_hugging_face_multiplies_them():
    """A linear layer of the file is `x @ weight.T`, heads beside each other in its outputs."""
    model = TINY.model_copy(update={"num_layers": 3})
    leaves = {"/".join(leaf.path): leaf for leaf in leaves_of(model)}
    random = np.random.default_rng(0)
    x_TD = random.standard_normal((5, model.width))

    query = leaves["pairs/global/attention/query"]
    assert query.tensors == ("model.layers.1.self_attn.q_proj.weight",)
    weight = random.standard_normal(query.tensor_shape).astype(np.float32)
    expected = (x_TD @ weight.T).reshape(5, model.num_heads, model.head_dim)
    found = np.einsum("TD,DNH->TNH", x_TD, query.join(lambda name: weight)[0])
    np.testing.assert_allclose(found, expected, atol=1e-12)

    output = leaves["last/attention/output"]
    assert output.tensors == ("model.layers.2.self_attn.o_proj.weight",)
    weight = random.standard_normal(output.tensor_shape).astype(np.float32)
    mixed_TNH = random.standard_normal((5, model.num_heads, model.head_dim))
    expected = mixed_TNH.reshape(5, -1) @ weight.T
    found = np.einsum("TNH,NHD->TD", mixed_TNH, output.join(lambda name: weight))
    np.testing.assert_allclose(found, expected, atol=1e-12)
