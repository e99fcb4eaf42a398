"""What was saved comes back bit for bit on any mesh, or a sentence says why not."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

from model.sharding import make_mesh
from tests.helpers.checkpoints import fresh_state, save_state, tiny_config
from workers import checkpoint, checkpoint_writer, integrity
from workers.checkpoint import (
    CheckpointMeta,
    checkpoint_url,
    describe,
    entry_url,
    load_params,
    read_entry,
    read_meta,
    restore_state,
)
from workers.checkpoint_writer import CheckpointWriter
from workers.digest import state_digest
from workers.integrity import FILE_DIGESTS, CorruptCheckpointError
from workers.train_step import TrainState, state_shardings

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CONFIG = tiny_config(Path("unused"))
MESHES = {"one": {}, "mixed": {"slice": 2, "fsdp": 2, "model": 2}, "rows": {"fsdp": 8}}


def mesh_named(name: str) -> Mesh:
    return make_mesh(MESHES[name], jax.devices() if MESHES[name] else jax.devices()[:1])


def state_on(mesh: Mesh, seed: int = 0) -> TrainState:
    """A state without a zero, as it would be after some steps."""
    host = jax.device_get(fresh_state(CONFIG, seed))
    filled = jax.tree.map(
        lambda leaf: leaf + 3 if leaf.dtype == jnp.int32 else leaf + 0.25 * (leaf == 0), host
    )
    return jax.device_put(filled, state_shardings(CONFIG, mesh))


def digest_of(state: TrainState) -> str:
    optimizer = {"opt_state": state.opt_state, "step": state.step}
    return f"{state_digest(state.params)}-{state_digest(optimizer)}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, CheckpointMeta]:
    """A checkpoint of step 3, from the mixed mesh."""
    run = tmp_path_factory.mktemp("run")
    return save_state(str(run), state_on(mesh_named("mixed")), CONFIG)


@pytest.mark.parametrize("name", MESHES)
def test_a_state_comes_back_bit_for_bit_on_any_mesh(saved, name):
    url, meta = saved
    mesh = mesh_named(name)
    state = restore_state(url, CONFIG, mesh)
    assert digest_of(state) == meta.digest == digest_of(state_on(mesh))
    assert int(state.step) == meta.step == 3
    for leaf, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(state_shardings(CONFIG, mesh)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert jax.tree.structure(state) == jax.tree.structure(state_on(mesh))


@pytest.mark.parametrize("mesh", [None, {"fsdp": 4, "model": 2}])
def test_parameters_come_back_alone(saved, mesh):
    url, meta = saved
    model, params = load_params(url, None if mesh is None else make_mesh(mesh))
    assert model == CONFIG.model
    assert state_digest(params) == meta.params_digest
    devices = {device for leaf in jax.tree.leaves(params) for device in leaf.devices()}
    assert len(devices) == (1 if mesh is None else 8)


def test_what_a_checkpoint_says_about_itself(saved):
    url, meta = saved
    assert read_meta(url) == meta
    assert meta.data_position == 3 * CONFIG.batch.rows
    assert meta.config == json.loads(CONFIG.model_dump_json())
    assert meta.software.keys() >= {"code", "jax", "orbax-checkpoint"}


def test_a_step_counts_only_when_its_entry_is_there(tmp_path, monkeypatch):
    """The entry comes after the commit, and a failed commit reaches the training loop."""
    told = []
    state = state_on(mesh_named("one"))
    meta = meta_of(state)
    url = checkpoint_url(str(tmp_path), 3)
    write = checkpoint_writer.write_json

    def check_and_write(entry: str, value: object) -> None:
        assert read_meta(url) == meta and not told
        write(entry, value)

    monkeypatch.setattr(checkpoint_writer, "write_json", check_and_write)
    writer = CheckpointWriter(str(tmp_path), told.append)
    writer.save(state, meta)
    writer.pending.result()
    assert told == [meta] and read_entry(str(tmp_path), 3) == meta

    def fail(entry: str, value: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(checkpoint_writer, "write_json", fail)
    later = state._replace(step=state.step + 1)
    writer.save(later, meta_of(later))
    with pytest.raises(OSError, match="disk is full"):
        writer.pending.result()
    assert len(told) == 1
    with pytest.raises(FileNotFoundError):
        read_entry(str(tmp_path), 4)


def meta_of(state: TrainState) -> CheckpointMeta:
    return describe(
        state, CONFIG, tokenizer_digest="t", dataset_digest="d", teacher_digest=None, attempt=1
    )


def test_training_on_while_a_save_is_under_way_changes_nothing(tmp_path):
    """The step gives its state away: what is being written must not be those very buffers."""
    mesh = mesh_named("rows")
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 7, s), donate_argnums=0)
    state = state_on(mesh)
    meta = meta_of(state)
    writer = CheckpointWriter(str(tmp_path), lambda meta: None)
    writer.save(state, meta)
    for _ in range(3):
        state = overwrite(state)
    jax.block_until_ready(state)
    writer.pending.result()
    assert digest_of(restore_state(checkpoint_url(str(tmp_path), 3), CONFIG, mesh)) == meta.digest


def test_a_folder_that_was_cut_off_is_written_anew(tmp_path, saved):
    run = tmp_path / "run"
    url = checkpoint_url(str(run), 3)
    shutil.copytree(saved[0], url)
    (Path(url) / "commit_success.txt").unlink()
    (Path(url) / "params" / "_METADATA").write_text("half")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        read_meta(url)
    other = state_on(mesh_named("one"), seed=1)
    _, meta = save_state(str(run), other, CONFIG)
    assert digest_of(restore_state(url, CONFIG, mesh_named("one"))) == meta.digest
    assert meta.digest != saved[1].digest
    assert read_entry(str(run), 3) == meta


def copied(saved: tuple[str, CheckpointMeta], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "copy"))


def test_changed_arrays_are_named_as_damage(saved, monkeypatch):
    """The digests find what storage's own checks let through."""
    url, meta = saved
    load = checkpoint.ocp.load_checkpointables

    def flip(url: str, template: dict) -> dict:
        loaded = load(url, template)
        key = "params" if "optimizer" not in loaded else "optimizer"
        leaves, structure = jax.tree.flatten(loaded[key])
        leaves[1] = leaves[1] + jnp.ones_like(leaves[1])
        return {**loaded, key: jax.tree.unflatten(structure, leaves)}

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", flip)
    with pytest.raises(CorruptCheckpointError, match=r"The parameters in .* damaged") as raised:
        load_params(url)
    assert meta.params_digest in str(raised.value)
    with pytest.raises(CorruptCheckpointError, match=r"The optimizer in .* damaged"):
        restore_state(url, CONFIG, mesh_named("one"))


def replace_in_metadata(url: Path, old: str, new: str) -> None:
    path = url / "_CHECKPOINT_METADATA"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_changed_size_in_the_description_is_damage(saved, tmp_path):
    """The window is in no array's shape; a teacher of another window says something else."""
    url = copied(saved, tmp_path)
    replace_in_metadata(url, '"window": 64', '"window": 44')
    with pytest.raises(CorruptCheckpointError, match="says about itself"):
        load_params(str(url))


def test_another_format_is_refused(saved, tmp_path):
    url = copied(saved, tmp_path)
    reseal(url, format_version=3)
    with pytest.raises(ValueError, match="checkpoint format 3; this version reads up to 2: use"):
        restore_state(str(url), CONFIG, mesh_named("one"))


def test_the_format_without_digests_of_files_is_read(saved, tmp_path):
    url, meta = copied(saved, tmp_path), saved[1]
    reseal(url, format_version=1)
    (url / FILE_DIGESTS).unlink()
    assert digest_of(restore_state(str(url), CONFIG, mesh_named("one"))) == meta.digest


def reseal(url: Path, **changes: object) -> None:
    """Another description of a checkpoint, as a release that meant it would have written it."""
    path = url / "_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text())
    described = integrity.unsealed(metadata["custom_metadata"])
    assert described is not None
    metadata["custom_metadata"] = integrity.sealed({**described, **changes})
    path.write_text(json.dumps(metadata))


def test_what_is_no_checkpoint_of_ours_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint at"):
        read_meta(str(tmp_path / "nothing"))
    checkpoint.ocp.save_checkpointables(str(tmp_path / "foreign"), {"params": {"x": jnp.ones(3)}})
    with pytest.raises(ValueError, match="not one of Stillhouse"):
        load_params(str(tmp_path / "foreign"))


def test_another_model_or_optimizer_is_told_by_its_leaf(saved, tmp_path):
    mesh = mesh_named("one")

    def refused(**changes) -> str:
        values = CONFIG.model.model_dump() | changes
        other = tiny_config(Path("unused"), model=values)
        with pytest.raises(ValueError) as raised:
            restore_state(saved[0], other, mesh)
        return str(raised.value)

    told = refused(feed_forward=128)
    assert "params last.feed_forward.down is float32[64, 32], but this" in told
    assert "needs float32[128, 32]; it was saved by another model or optimizer" in told
    told = refused(num_layers=2)
    assert "params last.attention.key is float32[32, 2, 8], but this" in told
    assert "needs missing" in told

    state = state_on(mesh)
    halved = state.params | {"embedding": state.params["embedding"].astype(jnp.bfloat16)}
    url, _ = save_state(str(tmp_path / "half"), state._replace(params=halved), CONFIG)
    with pytest.raises(ValueError, match=r"embedding is bfloat16\[320, 32\], .* needs float32\["):
        restore_state(url, CONFIG, mesh)
    with pytest.raises(ValueError, match="embedding is bfloat16"):
        load_params(url)

    extra = state._replace(params=state.params | {"extra": jnp.ones(2)})
    url, _ = save_state(str(tmp_path / "extra"), extra, CONFIG)
    with pytest.raises(ValueError, match=r"extra is float32\[2\], but .* needs missing"):
        load_params(url)


def test_entries_are_named_beside_their_folders(tmp_path):
    assert entry_url("gs://b/run", 7) == checkpoint_url("gs://b/run", 7) + ".json"
    assert checkpoint_url("gs://b/run", 7).endswith("checkpoints/00000007")
