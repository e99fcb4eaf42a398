"""Models of any small sizes, for property tests."""

from hypothesis import strategies as st

from model.config import ModelConfig


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
