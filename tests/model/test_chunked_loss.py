"""The chunked loss and its gradients are those of whole logits, whatever the chunks."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.chunked_objective import Objective
from model.losses import next_token_loss
from model.sharding import make_mesh
from model.targets import SparseTargets
from model.transformer import unembed
from tests.helpers.chunked_cases import (
    OBJECTIVES,
    Case,
    assert_equal,
    expected,
    make_case,
    ours,
    sums_of,
)

ADDITIONS = {
    "alone": (0.0, {}, {}),
    "mixed": (0.3, {}, {}),
    "z_loss": (0.0, {"z_weight": 0.2}, {}),
    "temperature": (0.0, {"temperature": 2.0}, {}),
    "no_surplus_rows": (0.0, {}, {"surplus": 0, "teacher_surplus": 0}),
    "hardly_capped": (0.0, {}, {"softcap": 1000.0}),
    "all": (0.4, {"z_weight": 0.1, "temperature": 0.7}, {"teacher_surplus": 1}),
}


_BY_NIGHT = pytest.mark.night("test_losses_and_gradients_are_those_of_whole_logits")


def _cases() -> Iterator[Any]:
    """By day each objective with nothing and with all, and each addition with one objective."""
    for name, addition in itertools.product(OBJECTIVES, ADDITIONS):
        by_day = addition in ("alone", "all") or name == "forward_kl"
        yield pytest.param(name, addition, marks=() if by_day else _BY_NIGHT)


@pytest.mark.parametrize(("name", "addition"), _cases())
def test_losses_and_gradients_are_those_of_whole_logits(name, addition):
    label_weight, changes, sizes = ADDITIONS[addition]
    objective = dataclasses.replace(OBJECTIVES[name], **changes)
    case = make_case(**sizes)
    targets = case.targets(name)
    assert_equal(
        ours(case, targets, label_weight, objective, chunk_tokens=4),
        expected(case, targets, label_weight, objective),
    )


# Of few sizes, since each is compiled.
@settings(max_examples=6, deadline=None)
@given(
    sizes=st.fixed_dictionaries(
        {
            "B": st.integers(1, 3),
            "T": st.integers(1, 7),
            "D": st.integers(1, 9),
            "V": st.integers(2, 17),
            "surplus": st.integers(0, 3),
            "M": st.integers(1, 5),
            "seed": st.integers(0, 99),
        }
    ),
    chunk_tokens=st.integers(1, 25),
)
def test_any_sizes_and_chunks(sizes, chunk_tokens):
    case = make_case(**sizes)
    objective = Objective(temperature=1.5, z_weight=0.1)
    assert_equal(
        ours(case, case.sparse, 0.25, objective, chunk_tokens=chunk_tokens),
        expected(case, case.sparse, 0.25, objective, compiled=True),
        tolerance=5e-6,  # where sizes are drawn, gradients may be small sums of large terms
    )


def spoilt(case: Case) -> Case:
    """Anything may stand in the masked positions."""
    inside = case.mask[..., None]

    def fill(array, value):
        return jnp.where(inside, array, value)

    return dataclasses.replace(
        case,
        x=fill(case.x, jnp.nan),
        labels=jnp.where(case.mask, case.labels, 10**6),
        sparse=SparseTargets(fill(case.sparse.ids_BTM, -7), fill(case.sparse.weights_BTM, jnp.inf)),
        with_tail=jax.tree.map(
            lambda a: jnp.where(case.mask if a.ndim == 2 else inside, a, -9), case.with_tail
        ),
        hidden=case.hidden._replace(x_BTD=fill(case.hidden.x_BTD, jnp.inf)),
    )


@pytest.mark.parametrize("name", ["sparse", "tail", "jsd"])
def test_what_stands_in_masked_positions_stays_out(name):
    case, objective = make_case(), OBJECTIVES[name]
    clean = ours(case, case.targets(name), 0.5, objective, chunk_tokens=4)
    dirty_case = spoilt(case)
    dirty = ours(dirty_case, dirty_case.targets(name), 0.5, objective, chunk_tokens=4)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert not np.any(dirty[1][0][~np.asarray(case.mask)]), "no gradient where masked"


def test_a_mask_may_weigh_positions():
    case = make_case()
    case.mask = case.mask * jnp.asarray([0.5, 1.0, 2.0, 1.0, 0.25])
    assert_equal(ours(case, case.sparse, 0.5), expected(case, case.sparse, 0.5))


def test_only_loss_has_a_gradient_and_only_in_hidden_states_and_embedding():
    case = make_case()
    jacobian = jax.jit(jax.jacrev(lambda *arguments: sums_of(case, *arguments), (0, 1, 2, 3)))(
        case.x, case.embedding, case.hidden, 0.5
    )
    in_x, in_embedding, *in_others = jacobian.loss
    assert np.any(in_x) and np.any(in_embedding)
    zeros = (in_others, jacobian.kd_loss, jacobian.ce_loss, jacobian.z_loss)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(zeros))


def test_bfloat16_hidden_states_keep_a_float32_embedding_gradient():
    case = make_case(B=4, T=16, D=32, V=50)
    reference = expected(case, case.sparse, 0.2, compiled=True)
    case.x = case.x.astype(jnp.bfloat16)
    sums, (in_x, in_embedding) = ours(case, case.sparse, 0.2, chunk_tokens=24)
    assert in_x.dtype == jnp.bfloat16 and in_embedding.dtype == jnp.float32
    assert all(part.dtype == jnp.float32 for part in sums)
    for result, plain in ((in_x, reference[1][0]), (in_embedding, reference[1][1])):
        angle = np.vdot(result, plain) / np.linalg.norm(result) / np.linalg.norm(plain)
        assert angle > 0.9999
    np.testing.assert_allclose(sums.loss, reference[0].loss, rtol=5e-3)


def test_logits_are_those_of_the_model():
    case = make_case(surplus=3)
    logits = unembed({"embedding": case.embedding}, case.model, case.x)
    plain, _ = next_token_loss(logits, case.labels, case.mask)
    sums = sums_of(case, case.x, case.embedding, None, 0.0)
    np.testing.assert_allclose(sums.loss, plain, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 1.0}, "between 0 and 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"z_weight": -0.1}, "0 or more"),
    ],
)
def test_an_objective_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        Objective(**changes)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_sparse_targets_serve_the_forward_divergence_only(divergence):
    case = make_case()
    with pytest.raises(ValueError, match=f"{divergence} needs the teacher's whole distribution"):
        ours(case, case.sparse, 0.0, Objective(divergence))


def test_rows_that_do_not_fit():
    case = make_case(B=8, V=13, surplus=0)
    with pytest.raises(ValueError, match="13 embedding rows do not divide"):
        ours(case, None, 0.0, mesh=make_mesh({"data": 4, "model": 2}))
    short = case.hidden._replace(embedding_RD=case.hidden.embedding_RD[:12])
    with pytest.raises(ValueError, match="12 rows for a vocabulary of 13"):
        ours(case, short, 0.0)
    with pytest.raises(ValueError, match="chunk_tokens=0"):
        ours(case, None, 0.0, chunk_tokens=0)
