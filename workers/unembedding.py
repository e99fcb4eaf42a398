"""The part of a teacher that a student needs to read its hidden states."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array
from orbax.checkpoint import v1 as ocp

from model.codecs.base import HIDDEN_DTYPE
from model.targets import Unembedding
from model.transformer import init_params
from workers.checkpoint import check_own_files, compare, read_items, read_meta
from workers.train_step import unembedding_shardings


def load_unembedding(url: str, vocab_size: int, num_rows: int, mesh: Mesh) -> Unembedding:
    """The embedding and final soft-cap of the checkpoint at `url`, and nothing else of it.

    The embedding comes in the type of hidden states on the wire, with as many rows as the
    student's, so that the mesh divides both alike. The digest of the state covers all parameters
    only, so what verifies these bytes are the digests of the files.

    Args:
        vocab_size: the student's, which the teacher has to share.
        num_rows: embedding rows of the student.

    Raises:
        ValueError: a teacher of another vocabulary.
        CorruptCheckpointError: the files are not those that were saved.
    """
    meta = read_meta(url)
    model, item = meta.model, meta.params_item
    if model.vocab_size != vocab_size:
        raise ValueError(
            f"The teacher at {url} has a vocabulary of {model.vocab_size}, this run one of "
            f"{vocab_size}: take a teacher of the same tokenizer"
        )
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    compare(url, {item: shapes})
    check_own_files(url, meta, item)
    there, shardings = shapes["embedding"], unembedding_shardings(mesh)
    by_rows, whole = shardings
    place = by_rows if there.shape[0] % mesh.shape["model"] == 0 else whole
    template = jax.ShapeDtypeStruct(there.shape, there.dtype, sharding=place)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        saved_RD = read_items(url, {item: {"embedding": template}})[item]["embedding"]

    @partial(jax.jit, out_shardings=shardings)
    def as_the_student_needs(saved_RD: Array) -> Unembedding:
        embedding_RD = saved_RD[:vocab_size].astype(HIDDEN_DTYPE)
        embedding_RD = jnp.pad(embedding_RD, ((0, num_rows - vocab_size), (0, 0)))
        return Unembedding(embedding_RD, jnp.float32(model.final_softcap))

    return as_the_student_needs(saved_RD)
