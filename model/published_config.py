"""`config.json` of a Hugging Face Gemma 2 model, to and from `ModelConfig`.

A setting that would change what the model computes is either mapped or refused; all others
(names of classes, token ids, initialisation) are left alone.
"""

from typing import Any

from pydantic import ValidationError

from model.config import ModelConfig

# Settings of the file that are settings of ours under another name.
_SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "width",
    "intermediate_size": "feed_forward",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "sliding_window": "window",
}
_CONSTANTS = {
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "final_softcap",
    "rms_norm_eps": "norm_eps",
}
_MAPPED = _SIZES | _CONSTANTS
_ACTIVATION = "gelu_pytorch_tanh"
# What these have to be, where a file has them at all; the first is what it means to leave one out.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_activation": (_ACTIVATION, None),
    "tie_word_embeddings": (True,),
    "attention_bias": (False,),
    "attention_dropout": (0.0, None),
    "use_bidirectional_attention": (False, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
    "auto_map": (None,),
}
_ARCHITECTURE = "Gemma2ForCausalLM"
_LAYER_TYPES = ("sliding_attention", "full_attention")
_ROPE_BASE = 10000.0


def read_config(values: Any, where: str) -> ModelConfig:
    """The model that the content of a `config.json` describes.

    Raises:
        ValueError: it is not Gemma 2, or a variant that computes something else; all faults of
            the file at once.
    """
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type != "gemma2":
        raise ValueError(
            f"{where}: model_type is {model_type!r}, not 'gemma2': only Gemma 2 can be imported"
        )
    faults = [*_mapped_faults(values), *_fixed_faults(values), *_rope_faults(values)]
    if faults:
        raise ValueError(f"{where} does not describe a model of this kind: {'; '.join(faults)}")
    scalar, head_dim = values["query_pre_attn_scalar"], values["head_dim"]
    try:
        return ModelConfig(
            **{ours: values[theirs] for theirs, ours in _MAPPED.items()},
            rope_base=_rope_base(values),
            query_scale=None if scalar == head_dim else scalar**-0.5,
        )
    except ValidationError as error:
        reasons = "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())
        raise ValueError(f"{where}: {reasons}") from error


def config_values(
    model: ModelConfig, dtype: str, *, pad_id: int, eos_id: int, bos_id: int
) -> dict[str, Any]:
    """The content of the `config.json` of a model whose file has numbers of type `dtype`.

    Raises:
        ValueError: the file cannot say the model's query scale.
    """
    return {
        "architectures": [_ARCHITECTURE],
        "model_type": "gemma2",
        **{theirs: getattr(model, ours) for theirs, ours in _MAPPED.items()},
        "query_pre_attn_scalar": _query_scalar(model),
        "rope_theta": model.rope_base,
        "hidden_activation": _ACTIVATION,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "layer_types": [_LAYER_TYPES[i % 2] for i in range(model.num_layers)],
        "pad_token_id": pad_id,
        "eos_token_id": eos_id,
        "bos_token_id": bos_id,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def _query_scalar(model: ModelConfig) -> int:
    scalar = round(model.query_factor**-2)
    if abs(scalar**-0.5 / model.query_factor - 1) > 1e-6:
        raise ValueError(
            f"query_scale={model.query_factor} cannot be exported: config.json holds "
            f"query_pre_attn_scalar, a whole number whose root divides the queries, and this would "
            f"be {model.query_factor**-2}"
        )
    return scalar


def _mapped_faults(values: dict[str, Any]) -> list[str]:
    faults = []
    for name in (*_MAPPED, "query_pre_attn_scalar"):
        value = values.get(name)
        kinds = (int,) if name in _SIZES else (int, float)
        if name not in values:
            faults.append(f"{name} is missing")
        elif not isinstance(value, kinds) or isinstance(value, bool) or value <= 0:
            kind = "whole number" if name in _SIZES else "number"
            faults.append(f"{name} is {value!r}, but should be a {kind} above 0")
    return faults


def _fixed_faults(values: dict[str, Any]) -> list[str]:
    faults = [
        f"{name} is {values[name]!r}, but only {allowed[0]!r} is computed here"
        for name, allowed in _FIXED.items()
        if name in values and values[name] not in allowed
    ]
    if _ARCHITECTURE not in (values.get("architectures") or [_ARCHITECTURE]):
        faults.append(f"architectures is {values['architectures']}, without {_ARCHITECTURE}")
    num_layers = values.get("num_hidden_layers")
    types = values.get("layer_types")
    if types is not None and isinstance(num_layers, int):
        expected = [_LAYER_TYPES[i % 2] for i in range(num_layers)]
        if types != expected:
            faults.append(
                "layer_types should be sliding_attention and full_attention in turn, one for each "
                f"of the {num_layers} layers"
            )
    return faults


def _rope_faults(values: dict[str, Any]) -> list[str]:
    faults = []
    rope = values.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default") if isinstance(rope, dict) else rope
    if kind != "default" or rope.keys() - {"rope_type", "rope_theta"}:
        faults.append(f"rope_parameters is {rope}, but only the plain rotary embedding is computed")
    elif not isinstance(base := _rope_base(values), int | float) or base <= 0:
        faults.append(f"rope_theta is {base!r}, but should be a number above 0")
    return faults


def _rope_base(values: dict[str, Any]) -> Any:
    """Newer files have it in a group of its own."""
    rope = values.get("rope_parameters") or {}
    return rope.get("rope_theta", values.get("rope_theta", _ROPE_BASE))
