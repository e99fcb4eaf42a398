"""Imported models compute what Hugging Face computed; see `tests/golden/make_golden.py`."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import ModelConfig
from model.transformer import hidden_states, unembed
from tests.golden.folders import CASES, VOCAB_SIZE, golden_folder
from workers.checkpoint import load_params
from workers.weights_io import import_weights

TOLERANCE = 1e-4


class Golden(NamedTuple):
    """An imported model, and the logits that it should have."""

    model: ModelConfig
    params: Any
    tokens_BT: np.ndarray
    logits_BTV: np.ndarray


def golden(parent: Path, case: str, num_rows: int | None = None) -> Golden:
    folder = golden_folder(parent, case)
    url = str(parent / f"{case}-checkpoint")
    import_weights(folder, url, num_rows)
    kept = np.load(folder / "logits.npz")
    return Golden(*load_params(url), kept["tokens"].astype(np.int32), kept["logits"])


@pytest.fixture(scope="module", params=CASES)
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return golden(tmp_path_factory.mktemp("golden"), request.param)


def logits_of(case: Golden, tokens: np.ndarray, segments: Any = 1, positions: Any = None) -> Any:
    """Logits of rows that are one document each unless `segments` and `positions` say more."""
    if positions is None:
        positions = np.arange(tokens.shape[1])

    @jax.jit
    def run(params: Any, tokens: jax.Array, segments: jax.Array, positions: jax.Array) -> jax.Array:
        return unembed(
            params, case.model, hidden_states(params, case.model, tokens, segments, positions)
        )

    rows = [jnp.asarray(np.broadcast_to(x, tokens.shape)) for x in (tokens, segments, positions)]
    return np.asarray(run(case.params, *rows))


def test_logits_are_those_of_hugging_face(imported: Golden):
    assert imported.tokens_BT.shape[1] > imported.model.window, "the window has to matter"
    found_BTV = logits_of(imported, imported.tokens_BT)
    np.testing.assert_allclose(found_BTV, imported.logits_BTV, rtol=0, atol=TOLERANCE)


def test_packed_rows_equal_the_documents_alone(imported: Golden):
    """Two documents in one row: the second one whole, and a first that is cut in its window."""
    num_first = imported.model.window + 2
    first, second = imported.tokens_BT[0, :num_first], imported.tokens_BT[1]
    lengths = (len(first), len(second))
    found_TV = logits_of(
        imported,
        np.concatenate([first, second])[None],
        np.repeat([1, 2], lengths)[None],
        np.concatenate([np.arange(length) for length in lengths])[None],
    )[0]
    # Causal: the beginning of a document does not know that the rest was cut off.
    expected_TV = np.concatenate([imported.logits_BTV[0, :num_first], imported.logits_BTV[1]])
    np.testing.assert_allclose(found_TV, expected_TV, rtol=0, atol=TOLERANCE)


def test_more_embedding_rows_change_no_logit(tmp_path: Path):
    case = golden(tmp_path, "multi_query", num_rows=384)
    assert (case.model.vocab_size, case.model.embedding_rows) == (VOCAB_SIZE, 384)
    assert case.params["embedding"].shape[0] == 384
    assert not case.params["embedding"][VOCAB_SIZE:].any()
    found_BTV = logits_of(case, case.tokens_BT)
    np.testing.assert_allclose(found_BTV[..., :VOCAB_SIZE], case.logits_BTV, rtol=0, atol=TOLERANCE)
    assert not jax.nn.softmax(found_BTV)[..., VOCAB_SIZE:].any(), "the surplus is never predicted"
