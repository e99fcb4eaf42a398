"""Writes tiny random Gemma 2 models as Hugging Face saves them, and their logits.

Needs torch and transformers, which the project does not: make an environment of its own, and run
`python tests/golden/make_golden.py` from the root of the repository. Each case becomes a folder
beside this file: the model as `save_pretrained` writes it, and `logits.npz` with `tokens` int64
[B, T] and `logits` float32 [B, T, V], computed in float32 by eager attention.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from transformers import (  # pyright: ignore[reportMissingImports]
    Gemma2Config,
    Gemma2ForCausalLM,
)

HERE = Path(__file__).parent
NUM_TEXTS, LENGTH, VOCAB_SIZE = 2, 20, 320
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
# An odd number of layers, grouped queries and a query scale of its own; several files.
GROUPED = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 24,
    "sliding_window": 6,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 8.0,
}
# One key-value head for all queries; saved in bfloat16.
MULTI_QUERY = {
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 5,
    "attn_logit_softcapping": 10.0,
    "final_logit_softcapping": 6.0,
}
# A single layer with a key-value head for each query, and the published caps.
MULTI_HEAD = {
    "num_hidden_layers": 1,
    "num_key_value_heads": 4,
    "head_dim": 12,
    "query_pre_attn_scalar": 8,
    "sliding_window": 7,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


def random_model(settings: dict[str, Any], attention_std: float, embedding_std: float) -> Any:
    """Weights so large that both caps bite, and that the layers outweigh the embedding."""
    model = Gemma2ForCausalLM(Gemma2Config(**COMMON, **settings)).eval()
    for name, weight in model.named_parameters():
        if "embed_tokens" in name:
            torch.nn.init.normal_(weight, std=embedding_std)
        elif "norm" in name:
            torch.nn.init.normal_(weight, mean=0.5, std=0.3)
        elif "q_proj" in name or "k_proj" in name:
            torch.nn.init.normal_(weight, std=attention_std)
        else:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model


def logits_of(model: Any, tokens: torch.Tensor, **changes: Any) -> np.ndarray:
    """Logits of the model, or of one with other settings and the same weights."""
    config = Gemma2Config(**{**model.config.to_dict(), **changes, "attn_implementation": "eager"})
    twin = Gemma2ForCausalLM(config).eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        return twin(tokens).logits.float().numpy()


def write_case(name: str, model: Any, *, dtype: torch.dtype, shard_size: str = "5GB") -> None:
    """The model's folder and its logits; each mechanism of the case is shown to matter."""
    tokens = torch.from_numpy(
        np.random.default_rng(7).integers(VOCAB_SIZE, size=(NUM_TEXTS, LENGTH))
    )
    model = model.to(dtype).float()
    logits = logits_of(model, tokens)
    for changes in (
        {"attn_logit_softcapping": None},
        {"final_logit_softcapping": None},
        {"sliding_window": LENGTH},
        {"query_pre_attn_scalar": 2 * model.config.query_pre_attn_scalar},
    ):
        difference = np.abs(logits_of(model, tokens, **changes) - logits).max()
        assert difference > 0.3, f"{name}: {changes} changes nothing ({difference})"
    uncapped = logits_of(model, tokens, final_logit_softcapping=None)
    assert np.abs(uncapped).max() > model.config.final_logit_softcapping
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    (folder / "generation_config.json").unlink()
    np.savez_compressed(folder / "logits.npz", tokens=tokens.numpy(), logits=logits)


if __name__ == "__main__":
    torch.manual_seed(0)
    write_case("grouped", random_model(GROUPED, 0.25, 0.4), dtype=torch.float32, shard_size="60KB")
    write_case("multi_query", random_model(MULTI_QUERY, 0.25, 0.3), dtype=torch.bfloat16)
    write_case("multi_head", random_model(MULTI_HEAD, 0.5, 1.2), dtype=torch.float32)
