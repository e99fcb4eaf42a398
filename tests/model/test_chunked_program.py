"""The chunked loss under a mesh and over microbatches, and what the compiled program does."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from model import chunked_loss as module
from model.sharding import BATCH_AXES, make_mesh
from model.targets import HiddenTargets
from tests.helpers.chunked_cases import (
    FORWARD,
    OBJECTIVES,
    TEACHER_SOFTCAP,
    Case,
    assert_equal,
    expected,
    make_case,
    ours,
    plain_sums,
    sums_of,
    widened,
)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "model": 2})


def laid_out(case: Case, mesh) -> Case:
    """Tokens by rows and the embedding in blocks."""
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    block = NamedSharding(mesh, PartitionSpec("model", "fsdp"))
    tokens = (case.x, case.labels, case.mask, case.sparse, case.with_tail, case.full)
    tokens = jax.device_put(tokens, rows)
    hidden = HiddenTargets(
        jax.device_put(case.hidden.x_BTD, rows),
        jax.device_put(case.hidden.embedding_RD, block),
        TEACHER_SOFTCAP,
    )
    embedding = jax.device_put(case.embedding, block)
    x, labels, mask, *others = tokens
    sparse, with_tail, full = others
    return Case(case.model, x, embedding, labels, mask, sparse, with_tail, full, hidden)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_mesh_changes_nothing(name, mesh):
    case = make_case(B=8, V=17, surplus=3, teacher_surplus=1)
    objective = dataclasses.replace(OBJECTIVES[name], temperature=1.3, z_weight=0.1)
    sharded = laid_out(case, mesh)
    result = ours(sharded, sharded.targets(name), 0.3, objective, mesh=mesh, chunk_tokens=4)
    assert result[1][1].sharding.spec == PartitionSpec("model", "fsdp")
    assert_equal(result, expected(case, case.targets(name), 0.3, objective))


@pytest.mark.parametrize("sizes", [{}, {"slice": 2, "data": 2, "fsdp": 2}, {"model": 4}])
def test_whatever_the_mesh(sizes):
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    case = make_case(B=8, V=17, surplus=3, teacher_surplus=3)
    sharded = laid_out(case, mesh)
    result = ours(sharded, sharded.sparse, 0.3, mesh=mesh, chunk_tokens=4)
    assert_equal(result, expected(case, case.sparse, 0.3))


@pytest.mark.parametrize("sharded", [False, True])
def test_microbatches_of_a_checkpointed_model(sharded, mesh):
    case = make_case(B=8, V=17, surplus=3)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(8, 8)), jnp.float32)

    @jax.checkpoint
    def network(weights, embedding, labels):
        return jnp.tanh(embedding[labels[:, ::-1]] @ weights)

    def loss(parameters, part):
        labels, mask, targets = part
        piece = dataclasses.replace(case, labels=labels, mask=mask)
        options = {"mesh": mesh if sharded else None, "chunk_tokens": 3}
        return sums_of(
            piece, network(*parameters, labels), parameters[1], targets, 0.3, **options
        ).loss

    @jax.jit
    def gradients(parameters, parts):
        halves = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(4, 2, *a.shape[1:]), 1, 0), parts)
        zeros = jax.tree.map(jnp.zeros_like, parameters)

        def add(total, part):
            return jax.tree.map(jnp.add, total, jax.grad(loss)(parameters, part)), None

        return jax.lax.scan(add, zeros, halves)[0]

    def plain(weights, embedding):
        x = network(weights, embedding, case.labels)
        return plain_sums(case, x, embedding, case.sparse, 0.3, FORWARD).loss

    placed = laid_out(case, mesh) if sharded else case
    result = gradients((weights, placed.embedding), (placed.labels, placed.mask, placed.sparse))
    with jax.enable_x64(True):
        wide = widened((weights, case.embedding))
        reference = jax.tree.map(np.asarray, jax.jit(jax.grad(plain, (0, 1)))(*wide))
    assert_equal(result, reference)


# What the compiled program does and does not.


def loss_of(case: Case, **options):
    return lambda x, embedding, targets: sums_of(case, x, embedding, targets, 0.3, **options).loss


def compiled(function, *arrays) -> str:
    program = jax.jit(function).lower(*arrays).compile().as_text()
    assert program is not None
    return program


COLLECTIVE = re.compile(
    r"= .*?\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def collectives(program: str) -> list[tuple[str, int, bool]]:
    """Kind, number of elements that come out, and whether it is in the body of a loop."""
    bodies, found, computation = set(re.findall(r"body=%?([\w.-]+)", program)), [], ""
    for line in program.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            computation = start[1]
        if operation := COLLECTIVE.search(line):
            shapes = re.findall(r"\[([\d,]*)\]", operation[0])
            size = sum(math.prod(int(n) for n in shape.split(",") if n) for shape in shapes)
            found.append((operation[1], size, computation in bodies))
    return found


def test_the_embedding_crosses_the_mesh_once_and_never_in_the_loop(mesh):
    case = laid_out(make_case(B=8, V=125, surplus=3), mesh)
    loss = loss_of(case, mesh=mesh, chunk_tokens=3)
    found = collectives(compiled(jax.grad(loss, (0, 1)), case.x, case.embedding, case.sparse))
    in_loop = [size for _, size, looped in found if looped]
    assert in_loop and max(in_loop) <= 3 * (1 + 1 + 4), "normalisers and picked logits"
    block = case.embedding.size // 4
    large = sorted((kind, size) for kind, size, looped in found if not looped and size >= block)
    assert large == [("all-gather", 2 * block), ("all-reduce", block), ("reduce-scatter", block)]


def equations(jaxpr):
    """Every equation, those of loops and calls among them."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from equations(getattr(inner, "jaxpr", inner))


def test_a_chunk_takes_three_products_and_all_logits_never_exist(monkeypatch):
    case = make_case(B=4, T=10, V=61, surplus=3)
    monkeypatch.setattr(module, "CHUNK_LOGITS_BYTES", 4 * 64 * 7)  # 40 tokens: 6 chunks of 7
    jaxpr = jax.make_jaxpr(jax.grad(loss_of(case), (0, 1)))(case.x, case.embedding, case.sparse)
    found = list(equations(jaxpr.jaxpr))
    assert sum(equation.primitive.name == "dot_general" for equation in found) == 3
    sizes = [var.aval.size for equation in found for var in equation.outvars]
    assert max(sizes) == max(7 * 64, case.embedding.size)


def test_without_differentiation_there_is_no_gradient_work():
    case = make_case()
    forward = compiled(loss_of(case), case.x, case.embedding, case.sparse)
    assert forward.count(" dot(") == 1
    assert "scatter" not in forward
