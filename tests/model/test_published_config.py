"""The `config.json` of published weights: every setting is mapped or refused."""

import json
from typing import Any

import pytest
from hypothesis import given, settings

from model.config import MODEL_PRESETS, ModelConfig
from model.published_config import config_values, read_config
from tests.golden.folders import HERE
from tests.helpers.model_sizes import models

GROUPED = json.loads((HERE / "grouped" / "config.json").read_text())
IDS = {"pad_id": 0, "eos_id": 1, "bos_id": 2}
TINY = MODEL_PRESETS["tiny"]


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
