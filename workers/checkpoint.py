"""Checkpoints: Orbax behind one thin module, with a catalogue entry and verified digests.

A checkpoint of step s is the folder `checkpoints/<s>/`, which Orbax commits as a whole and which
then gets a digest of each of its files, and the entry `checkpoints/<s>.json`. Only what has an
entry counts: a folder without one was cut off before its commit, and is written anew. Whoever
deletes takes the entry first.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from configs.run import RunConfig
from model.config import ModelConfig
from model.sharding import param_shardings
from model.tensor_files import FileDtype
from model.transformer import init_params
from workers.code_identity import software
from workers.digest import state_digest
from workers.integrity import (
    CorruptCheckpointError,
    UnreadableCheckpointError,
    check_files,
    unsealed,
)
from workers.storage import join, read_bytes, read_json
from workers.train_step import Params, TrainState, init_state, state_shardings

FORMAT_VERSION = 2
_WITHOUT_FILE_DIGESTS = 1
FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint says about itself."""

    step: int
    data_position: int
    """Rows of the global stream that the state has seen."""
    params_digest: str
    optimizer_digest: str
    """Empty for imported weights, which have no optimizer."""
    config: dict[str, Any]
    """The whole configuration of the run; of imported weights `model` alone."""
    software: dict[str, str]
    tokenizer_digest: str
    dataset_digest: str
    """Empty for imported weights."""
    teacher_digest: str | None
    attempt: int
    format_version: int = FORMAT_VERSION
    imported_dtype: FileDtype | None = None
    """Type of the numbers in the file that the weights were imported from; None in a run."""

    @property
    def model(self) -> ModelConfig:
        return ModelConfig.model_validate(self.config["model"])

    @property
    def digest(self) -> str:
        """Digest of the whole state: parameters and optimizer."""
        return "-".join(filter(None, (self.params_digest, self.optimizer_digest)))

    @property
    def params_item(self) -> str:
        """Orbax's name for the parameters; what is saved in pieces is always called `state`."""
        return "params" if self.imported_dtype is None else "state"


def checkpoint_url(run_url: str, step: int) -> str:
    return join(run_url, FOLDER, f"{step:08d}")


def entry_url(run_url: str, step: int) -> str:
    return checkpoint_url(run_url, step) + ".json"


def describe(
    state: TrainState,
    config: RunConfig,
    *,
    tokenizer_digest: str,
    dataset_digest: str,
    teacher_digest: str | None,
    attempt: int,
) -> CheckpointMeta:
    """What a checkpoint of `state` will say; computes the digests on the devices."""
    step = int(state.step)
    return CheckpointMeta(
        step=step,
        data_position=step * config.batch.rows,
        params_digest=state_digest(state.params),
        optimizer_digest=state_digest(optimizer_part(state)),
        config=config.model_dump(mode="json"),
        software=software(),
        tokenizer_digest=tokenizer_digest,
        dataset_digest=dataset_digest,
        teacher_digest=teacher_digest,
        attempt=attempt,
    )


def read_meta(url: str) -> CheckpointMeta:
    """Reads what the checkpoint at `url` says about itself.

    Raises:
        ValueError: its format is not one of ours.
        CorruptCheckpointError: there is none, or its bytes have changed since they were saved.
    """
    try:
        read_bytes(join(url, "commit_success.txt"))
    except FileNotFoundError as error:
        raise CorruptCheckpointError(f"There is no complete checkpoint at {url}") from error
    values: Any = ocp.checkpointables_metadata(url).custom_metadata
    if not isinstance(values, dict) or "format_version" not in values:
        raise UnreadableCheckpointError(
            f"{url} is an Orbax checkpoint, but not one of Stillhouse, or what it says about "
            f"itself is damaged"
        )
    described = unsealed(values)
    if described is None:
        raise CorruptCheckpointError(
            f"What {url} says about itself is not what was saved: its files are damaged; use "
            f"another checkpoint"
        )
    if described["format_version"] not in (_WITHOUT_FILE_DIGESTS, FORMAT_VERSION):
        raise ValueError(
            f"{url} has checkpoint format {described['format_version']}; this version reads up to "
            f"{FORMAT_VERSION}: use the release that wrote it"
        )
    return CheckpointMeta(**described)


def restore_state(url: str, config: RunConfig, mesh: Mesh) -> TrainState:
    """The whole state at `url`, laid out on `mesh`, verified against its digest.

    Raises:
        ValueError: another model or optimizer than `config` has.
        CorruptCheckpointError: the bytes have changed since they were saved.
    """
    meta = read_meta(url)
    check_own_files(url, meta)
    if not meta.optimizer_digest:
        raise ValueError(
            f"{url} holds imported weights, without an optimizer or a place in the data: start a "
            f"new run from them (start_from.state=weights)"
        )
    shapes = jax.eval_shape(lambda: init_state(config, 0))
    template = jax.tree.map(_placed, shapes, state_shardings(config, mesh))
    loaded = _load(url, {"params": template.params, "optimizer": optimizer_part(template)})
    state = TrainState(loaded["params"], **loaded["optimizer"])
    _verify(url, "parameters", state.params, meta.params_digest)
    _verify(url, "optimizer", optimizer_part(state), meta.optimizer_digest)
    return state


def load_params(url: str, mesh: Mesh | None = None) -> tuple[ModelConfig, Params]:
    """The parameters alone, on `mesh` (default: the first local device), verified.

    Raises: as `restore_state`.
    """
    meta = read_meta(url)
    model = meta.model
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    if mesh is None:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings: Any = jax.tree.map(lambda _: place, shapes)
    else:
        shardings = param_shardings(shapes, mesh)
    item = meta.params_item
    params = _load(url, {item: jax.tree.map(_placed, shapes, shardings)})[item]
    _verify(url, "parameters", params, meta.params_digest)
    return model, params


def check_own_files(url: str, meta: CheckpointMeta, item: str | None = None) -> None:
    """Compares this process's share of the files at `url` with what was written.

    Args:
        item: only those of this part of the checkpoint.

    Raises:
        CorruptCheckpointError: names the files that are not.
    """
    if meta.format_version == _WITHOUT_FILE_DIGESTS:
        return
    below = "" if item is None else f"{item}/"
    check_files(url, lambda name: name.startswith(below), jax.process_index(), jax.process_count())


def read_entry(run_url: str, step: int) -> CheckpointMeta:
    """The catalogue's entry of a step. Raises FileNotFoundError if there is none."""
    return CheckpointMeta(**read_json(entry_url(run_url, step)))


def optimizer_part(state: TrainState) -> dict[str, Any]:
    return {"opt_state": state.opt_state, "step": state.step}


def _placed(shape: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _load(url: str, template: dict[str, Any]) -> dict[str, Any]:
    """Loads what `template` names, after comparing it with what lies there."""
    compare(url, template)
    return read_items(url, template)


def compare(url: str, template: dict[str, Any]) -> None:
    """Raises ValueError unless names, shapes and types are those of what lies at `url`.

    Orbax would cast silently, and calls a wrong shape an incompatible handler.
    """
    saved: Any = ocp.checkpointables_metadata(url).metadata
    for item, tree in template.items():
        if saved.get(item) is None:  # Orbax only warns of what it cannot read
            raise UnreadableCheckpointError(
                f"{url}: {item} cannot be read: the files are damaged; use another checkpoint"
            )
        there = _leaves(saved[item])
        wanted = _leaves(tree)
        for name in sorted(there.keys() | wanted.keys()):
            if there.get(name) != wanted.get(name):
                raise ValueError(
                    f"{url}: {item} {name} is {_shown(there.get(name))}, but this configuration "
                    f"needs {_shown(wanted.get(name))}; it was saved by another model or optimizer"
                )


def read_items(url: str, template: dict[str, Any]) -> dict[str, Any]:
    """What `template` names, without comparing first. Raises CorruptCheckpointError."""
    try:
        return ocp.load_checkpointables(url, template)
    except KeyError as error:  # Orbax's "incompatible handler", whatever it met
        raise UnreadableCheckpointError(
            f"{url} cannot be read ({_root_cause(error)}): its files are damaged or out of reach; "
            f"use another checkpoint"
        ) from error


def _root_cause(error: BaseException) -> str:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return (str(error).splitlines() or [type(error).__name__])[0].partition(" [")[0]


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    # Containers come back as dicts and lists: their order, not their names, is what holds.
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (
            tuple(leaf.shape),
            jnp.dtype(leaf.dtype).name,
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _shown(leaf: tuple[tuple[int, ...], str] | None) -> str:
    return "missing" if leaf is None else f"{leaf[1]}{list(leaf[0])}"


def _verify(url: str, what: str, tree: Any, digest: str) -> None:
    if (found := state_digest(tree)) != digest:
        raise CorruptCheckpointError(
            f"The {what} in {url} have digest {found}, but {digest} was saved: the files are "
            f"damaged; start a new run from another step (`start_from`)"
        )
