"""Names, shapes and layout of published weights, their files, and their `config.json`."""

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from model.config import MODEL_PRESETS, ModelConfig, param_count
from model.published_config import config_values, read_config
from model.tensor_files import TensorReader, TensorWriter
from model.weights import leaves_of, tensor_shapes
from tests.golden.folders import HERE

GROUPED = json.loads((HERE / "grouped" / "config.json").read_text())
IDS = {"pad_id": 0, "eos_id": 1, "bos_id": 2}
TINY = MODEL_PRESETS["tiny"]


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    num_kv_heads = draw(st.sampled_from([1, 2, 3]))
    vocab_size = draw(st.integers(1, 12))
    return ModelConfig(
        num_layers=draw(st.integers(1, 5)),
        width=draw(st.integers(1, 7)),
        feed_forward=draw(st.integers(1, 7)),
        num_heads=num_kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=num_kv_heads,
        head_dim=2 * draw(st.integers(1, 3)),
        vocab_size=vocab_size,
        num_embeddings=draw(st.none() | st.integers(vocab_size, 20)),
        context_length=draw(st.integers(1, 10**6)),
        window=draw(st.integers(1, 10**6)),
        rope_base=draw(st.floats(1e-3, 1e7)),
        query_scale=draw(st.none() | st.integers(1, 5000).map(lambda scalar: scalar**-0.5)),
        attention_softcap=draw(st.floats(0.1, 100)),
        final_softcap=draw(st.floats(0.1, 100)),
        norm_eps=draw(st.floats(1e-12, 1)),
    )


# Parameters and tensors.


@settings(deadline=None, max_examples=30)
@given(model=models(), seed=st.integers(0, 2**32 - 1))
def test_parameters_become_tensors_and_come_back_bit_for_bit(model: ModelConfig, seed: int):
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    parameters = {}
    for leaf in leaves_of(model):
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
    for leaf in leaves_of(model):
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


# Files.

SHAPES = {"b.weight": (3, 4), "a.weight": (7,), "c.weight": (2, 2)}


def some_tensors(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def written(folder: Path, dtype: Any, max_shard_bytes: int) -> dict[str, np.ndarray]:
    """Tensors that were written in another order than they lie in."""
    tensors = some_tensors()
    writer = TensorWriter(folder, SHAPES, dtype, max_shard_bytes)
    for name in reversed(SHAPES):
        writer.write(name, np.asfortranarray(tensors[name]))
    return {name: tensor.astype(dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_shard_bytes", [10**6, 60, 30, 1])
def test_files_hold_what_was_written(tmp_path: Path, dtype: Any, max_shard_bytes: int):
    expected = written(tmp_path, dtype, max_shard_bytes)
    reader = TensorReader(tmp_path)
    reader.check(SHAPES)
    assert reader.dtype == dtype
    for name, tensor in expected.items():
        found = reader.read(name)
        assert found.dtype == tensor.dtype and found.tobytes() == tensor.tobytes()


def test_shards_are_small_enough_and_listed(tmp_path: Path):
    expected = written(tmp_path, "float32", 60)
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *names,
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * (12 + 7 + 4)
    for number, held in enumerate((["b.weight"], ["a.weight", "c.weight"])):
        content = load_file(tmp_path / names[number])
        assert sorted(content) == sorted(held)
        assert sum(tensor.nbytes for tensor in content.values()) <= 60
        for name in held:
            assert index["weight_map"][name] == names[number]
            np.testing.assert_array_equal(content[name], expected[name])


@pytest.mark.parametrize(
    ("max_shard_bytes", "num_files"), [(92, 1), (91, 2), (44, 2), (43, 3), (1, 3)]
)
def test_files_are_filled_up_to_the_limit(tmp_path: Path, max_shard_bytes: int, num_files: int):
    """The tensors take 48, 28 and 16 bytes."""
    written(tmp_path, "float32", max_shard_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == num_files


def faults_of(folder: Path, tensors: dict[str, np.ndarray]) -> str:
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError) as raised:
        TensorReader(folder).check(SHAPES)
    assert str(raised.value).startswith(f"{folder}: ")
    return str(raised.value).removeprefix(f"{folder}: ")


def test_tensors_that_do_not_fit_are_named_all_at_once(tmp_path: Path):
    tensors = some_tensors()
    del tensors["a.weight"]
    tensors["lm_head.weight"] = np.ones((1, 1), np.float32)
    tensors["b.weight"] = tensors["b.weight"].T.copy()
    tensors["c.weight"] = tensors["c.weight"].astype(np.float16)
    assert faults_of(tmp_path, tensors) == (
        "missing: a.weight; not part of the model: lm_head.weight; of another shape than "
        "config.json says: b.weight [4, 3] instead of [3, 4]; of a type that is not read (F32, "
        "BF16 are): c.weight F16"
    )


def test_a_long_list_of_tensors_is_cut(tmp_path: Path):
    tensors = some_tensors() | {f"extra{i:02d}": np.ones(1, np.float32) for i in range(20)}
    told = faults_of(tmp_path, tensors)
    assert told.startswith("not part of the model: extra00, extra01, ")
    assert told.endswith("extra11 and 8 more")


def test_a_mixture_of_types_is_read_as_the_widest(tmp_path: Path):
    tensors = some_tensors(ml_dtypes.bfloat16)
    tensors["a.weight"] = tensors["a.weight"].astype(np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    reader = TensorReader(tmp_path)
    reader.check(SHAPES)
    assert reader.dtype == "float32"


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_truncated_file_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    folder = tmp_path_factory.mktemp("cut")
    written(folder, "float32", 10**6)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match=r"model.safetensors is no complete safetensors file"):
        TensorReader(folder)


def test_headers_that_lie_are_refused(tmp_path: Path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(8)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="no complete safetensors file"):
        TensorReader(tmp_path)


def test_incomplete_folders_are_refused(tmp_path: Path):
    def refused() -> str:
        with pytest.raises(ValueError) as raised:
            TensorReader(tmp_path)
        return str(raised.value)

    assert "holds neither model.safetensors nor model.safetensors.index.json" in refused()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{")
    assert "index.json is not JSON" in refused()
    index.write_text("[]")
    assert "has no weight_map" in refused()
    index.unlink()
    written(tmp_path, "float32", 60)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "missing: model-00002-of-00002.safetensors: download them again" in refused()


# config.json.


def test_every_setting_of_a_config_is_mapped():
    assert read_config(GROUPED, "config.json") == ModelConfig(
        num_layers=3,
        width=32,
        feed_forward=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=320,
        context_length=64,
        window=6,
        rope_base=10000.0,
        query_scale=24**-0.5,
        attention_softcap=5.0,
        final_softcap=8.0,
        norm_eps=1e-6,
    )
    other = json.loads((HERE / "multi_head" / "config.json").read_text())
    model = read_config(other, "config.json")
    assert (model.rope_base, model.norm_eps, model.num_kv_heads) == (500.0, 1e-5, 4)


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        ("gemma2-2b", (26, 2304, 9216, 8, 4, 256, 256)),
        ("gemma2-9b", (42, 3584, 14336, 16, 8, 256, 256)),
        ("gemma2-27b", (46, 4608, 36864, 32, 16, 128, 144)),
    ],
)
def test_the_published_configs_are_the_presets_but_for_the_rows(preset: str, sizes: tuple):
    """As the first release of the weights wrote them, the rotary base outside a group."""
    names = (
        *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "query_pre_attn_scalar"),
    )
    values = {
        **dict(zip(names, sizes, strict=True)),
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "cache_implementation": "hybrid",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "initializer_range": 0.02,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": 256000,
    }
    model = read_config(values, "config.json")
    assert model.num_embeddings is None
    assert model.model_copy(update={"num_embeddings": 256_128}) == MODEL_PRESETS[preset]


@settings(deadline=None)
@given(model=models())
def test_a_config_says_all_that_a_model_is(model: ModelConfig):
    values = json.loads(json.dumps(config_values(model, "bfloat16", **IDS)))
    found = read_config(values, "config.json")
    assert found.query_factor == pytest.approx(model.query_factor, rel=1e-12)
    # As many rows as tokens, and a query scale that is the usual one is not said.
    same = model.model_copy(update={"num_embeddings": None, "query_scale": found.query_scale})
    assert found == same


def test_older_files_say_the_rotary_base_outside():
    values = {name: value for name, value in GROUPED.items() if name != "rope_parameters"}
    assert read_config(values, "").rope_base == 10000.0
    assert read_config(values | {"rope_theta": 500.0}, "").rope_base == 500.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gemma3_text"}, "model_type is 'gemma3_text', not 'gemma2'"),
        ({"model_type": None}, "model_type is None"),
        (
            {"hidden_activation": "gelu"},
            "hidden_activation is 'gelu', but only 'gelu_pytorch_tanh'",
        ),
        ({"attention_bias": True}, "attention_bias is True, but only False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False, but only True"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1, but only 0.0"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling is {'factor': 2}, but only None"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "but only the plain rotary embedding"),
        ({"rope_parameters": {"rope_theta": 1.0, "factor": 8}}, "only the plain rotary embedding"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0, but should be a number above 0"),
        ({"rope_parameters": "plain"}, "rope_parameters is plain"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"auto_map": {"AutoModel": "own.py"}}, "auto_map is"),
        ({"architectures": ["Gemma2ForTokenClassification"]}, "without Gemma2ForCausalLM"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types should be sliding_attention and"),
        ({"attn_logit_softcapping": None}, "attn_logit_softcapping is None, but should be"),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping is 0, but should be a number"),
        ({"sliding_window": None}, "sliding_window is None, but should be a whole number"),
        ({"hidden_size": "32"}, "hidden_size is '32', but should be a whole number above 0"),
        ({"query_pre_attn_scalar": -1}, "query_pre_attn_scalar is -1"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"num_key_value_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
    ],
)
def test_other_models_are_refused(changes: dict[str, Any], words: str):
    with pytest.raises(ValueError) as raised:
        read_config(GROUPED | changes, "folder/config.json")
    assert str(raised.value).startswith("folder/config.json") and words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_all_faults_of_a_config_are_named_at_once():
    values = GROUPED | {"attention_bias": True}
    del values["hidden_size"], values["rms_norm_eps"]
    with pytest.raises(ValueError) as raised:
        read_config(values, "config.json")
    for words in ("hidden_size is missing", "rms_norm_eps is missing", "attention_bias is True"):
        assert words in str(raised.value)
    with pytest.raises(ValueError, match="model_type is None"):
        read_config([], "config.json")


def test_a_query_scale_that_no_config_can_say_is_refused():
    model = TINY.model_copy(update={"query_scale": 0.3})
    with pytest.raises(ValueError, match=r"query_scale=0\.3 cannot be exported"):
        config_values(model, "bfloat16", **IDS)
