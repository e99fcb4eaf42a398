"""`stillhouse import` and `export`: nothing is lost either way, and what cannot be is said."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from benchmarks.bare import make_teacher, prepare_here, student_job
from configs.load import parse_run
from configs.run import RunConfig
from model.sharding import make_mesh
from orchestrator.catalogue import find_checkpoint
from orchestrator.cli import main
from orchestrator.launch import create_run
from tests.golden.folders import CASES, VOCAB_SIZE, golden_folder, tokenizer_bytes
from tests.helpers.checkpoints import fresh_state, save_state, tiny_config
from tests.helpers.runs import text_folder, tiny_values
from workers import params_stream, weights_io
from workers.checkpoint import CorruptCheckpointError, load_params, read_meta, restore_state
from workers.digest import state_digest
from workers.jobs import StartPoint
from workers.student import train
from workers.weights_io import export_weights, import_weights

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]


def called(*args: str) -> str:
    result = CliRunner().invoke(main, list(args))
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*args: str) -> str:
    """The one sentence of a command that refuses to work."""
    result = CliRunner().invoke(main, list(args))
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2, result.output
    assert result.stdout == "" and result.stderr.count("\n") == 1
    return result.stderr


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def assert_same_tensors(found: Path, expected: Path) -> None:
    one, other = tensors_of(found), tensors_of(expected)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert one[name].tobytes() == other[name].tobytes(), name


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A Hugging Face folder in bfloat16, and the checkpoint that was made of it."""
    parent = tmp_path_factory.mktemp("imported")
    folder = golden_folder(parent, "multi_query")
    import_weights(folder, str(parent / "checkpoint"))
    return folder, str(parent / "checkpoint")


# There and back.


@pytest.mark.parametrize("case", CASES)
def test_what_was_imported_is_exported_bit_for_bit(tmp_path: Path, case: str):
    folder, url, back = golden_folder(tmp_path, case), tmp_path / "new" / "ck", tmp_path / "back"
    rows = ("--rows", "336") if case == "grouped" else ()
    told = called("import", str(folder), str(url), *rows)
    dtype = "bfloat16" if case == "multi_query" else "float32"
    assert f"{dtype} in the file: the checkpoint {url}" in told
    told = called("export", str(url), str(back))
    assert f"{url} as {dtype}: the Hugging Face folder {back}" in told
    assert_same_tensors(back, folder)
    assert (back / "tokenizer.model").read_bytes() == tokenizer_bytes()
    config = json.loads((back / "config.json").read_text())
    original = json.loads((folder / "config.json").read_text())
    rope = original.pop("rope_parameters")
    assert config.pop("rope_theta") == rope["rope_theta"]
    assert config.pop("torch_dtype") == original.pop("dtype") == dtype
    assert config.items() <= original.items()


def test_files_of_a_small_size_come_back_as_well(tmp_path: Path, imported: tuple[Path, str]):
    folder, url = imported
    back = tmp_path / "back"
    export_weights(url, back, max_shard_bytes=8_000)
    files = sorted(back.glob("*.safetensors"))
    assert len(files) > 5
    assert sum(path.stat().st_size > 9_500 for path in files) == 1, "only the embedding is larger"
    assert_same_tensors(back, folder)
    again = import_weights(back, str(tmp_path / "again"))
    assert again.params_digest == read_meta(url).params_digest


def test_the_type_of_the_numbers_can_be_chosen(tmp_path: Path, imported: tuple[Path, str]):
    folder, url = imported
    called("export", url, str(tmp_path / "out"), "--dtype", "float32")
    found = tensors_of(tmp_path / "out")
    for name, tensor in tensors_of(folder).items():
        assert found[name].dtype == np.float32
        assert found[name].tobytes() == tensor.astype(np.float32).tobytes(), name


def test_a_run_comes_back_from_float32_bit_for_bit(tmp_path: Path):
    values = {"preset": "tiny", "vocab_size": VOCAB_SIZE}
    config = tiny_config(tmp_path, model={**values, "num_layers": 3})
    url, meta = save_state(str(tmp_path / "runs" / "run"), fresh_state(config), config)
    (tmp_path / "runs" / "run" / "tokenizer.model").write_bytes(tokenizer_bytes())
    assert export_weights(url, tmp_path / "float32", "float32") == "float32"
    back = import_weights(tmp_path / "float32", str(tmp_path / "back"))
    assert back.params_digest == meta.params_digest
    assert back.model == config.model

    assert export_weights(url, tmp_path / "default") == "bfloat16"
    exact, rounded = tensors_of(tmp_path / "float32"), tensors_of(tmp_path / "default")
    for name in exact:
        nearest = exact[name].astype(rounded[name].dtype)
        assert rounded[name].tobytes() == nearest.tobytes(), name


# An imported checkpoint in use.


def test_imported_weights_are_an_ordinary_checkpoint(imported: tuple[Path, str]):
    url = imported[1]
    found, entry = find_checkpoint(url, "unused")
    meta = read_meta(url)
    assert found == url and entry == dataclasses.asdict(meta)
    assert (meta.step, meta.data_position, meta.imported_dtype) == (0, 0, "bfloat16")
    assert meta.digest == meta.params_digest
    model, params = load_params(url)
    assert state_digest(params) == meta.params_digest
    assert model == meta.model
    spread = load_params(url, make_mesh({"fsdp": 4, "model": 2}))[1]
    assert state_digest(spread) == meta.params_digest
    assert len(spread["embedding"].devices()) == 8


def run_config(storage: Path, url: str, name: str, **changes: Any) -> RunConfig:
    """A run on the imported model's tokenizer and sizes."""
    text_folder(storage)
    values = tiny_values(storage, name) | {"cluster": {"devices_per_host": 8}}
    values["model"] = read_meta(url).config["model"]
    values["data"] = values["data"] | {
        "tokenizer": {"kind": "import", "path": f"{url}/tokenizer.model"}
    }
    return parse_run(values | changes, "test")


def test_a_run_starts_from_imported_weights(tmp_path: Path, imported: tuple[Path, str]):
    url = imported[1]
    config = run_config(tmp_path, url, "student", start_from={"checkpoint": url}, steps=1)
    folder, facts = prepare_here(config)
    assert folder.identity()["start_url"] == url
    job = student_job(config, folder, facts)
    # At its last step already: nothing is trained, so the digest is that of the start.
    finish = train(dataclasses.replace(job, start=StartPoint("weights", url, 1)))
    assert finish.digest.split("-")[0] == read_meta(url).params_digest


def test_an_imported_teacher_brings_its_tokenizer(tmp_path: Path, imported: tuple[Path, str]):
    url = imported[1]
    config = run_config(
        tmp_path,
        url,
        "distilled",
        objective={"kind": "distill"},
        teacher={"checkpoint": url, "rows_per_batch": 2},
    )
    data = config.data.model_dump() | {"tokenizer": {"kind": "teacher"}}
    config = parse_run(config.model_dump(mode="json") | {"data": data}, "test")
    folder, facts = prepare_here(config)
    assert facts.tokenizer_digest == read_meta(url).tokenizer_digest
    assert folder.identity()["teacher_digest"] == read_meta(url).params_digest
    make_teacher(config)


def test_imported_weights_are_no_state_to_go_on_from(imported: tuple[Path, str]):
    with pytest.raises(ValueError, match=r"holds imported weights, .*start_from.state=weights"):
        restore_state(imported[1], tiny_config(Path("unused")), make_mesh({"fsdp": 8}))


# Refusals and accidents.


def test_what_cannot_be_imported_is_said(tmp_path: Path, imported: tuple[Path, str]):
    folder = golden_folder(tmp_path, "multi_head")
    dest = str(tmp_path / "dest")
    assert f"{imported[1]} exists already" in refused("import", str(folder), imported[1])
    told = refused("import", str(folder), dest, "--rows", "300")
    assert "300 embedding rows are too few for the vocabulary of 320" in told
    assert "config.json is missing" in refused("import", str(tmp_path), dest)

    tensors = load_file(folder / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")
    assert "missing: model.norm.weight" in refused("import", str(folder), dest)
    save_file(tensors | {"model.norm.weight": norm[1:]}, folder / "model.safetensors")
    assert "model.norm.weight [31] instead of [32]" in refused("import", str(folder), dest)

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 321}))
    told = refused("import", str(folder), dest)
    assert "tokenizer.model has 320 pieces, but vocab_size in config.json is 321" in told
    (folder / "tokenizer.model").unlink()
    assert "tokenizer.model is missing" in refused("import", str(folder), dest)
    (folder / "config.json").write_text("{")
    assert "config.json is not JSON" in refused("import", str(folder), dest)
    assert not (tmp_path / "dest").exists()


def test_what_cannot_be_exported_is_said(tmp_path: Path, imported: tuple[Path, str]):
    folder, url = imported
    assert f"{folder} exists already" in refused("export", url, str(folder))
    assert "there is nothing there" in refused("export", str(tmp_path / "no"), str(tmp_path / "x"))
    bare = shutil.copytree(url, tmp_path / "bare")
    (bare / "tokenizer.model").unlink()
    assert "has no tokenizer" in refused("export", str(bare), str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_an_import_that_was_cut_off_leaves_nothing(
    tmp_path: Path, imported: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
):
    folder, url = golden_folder(tmp_path, "grouped"), str(tmp_path / "dest")
    save = params_stream.ocp.partial.save
    saves = []

    def full(*args: Any, **more: Any) -> None:
        if len(saves) == 3:
            raise OSError("the disk is full")
        saves.append(save(*args, **more))

    monkeypatch.setattr(params_stream.ocp.partial, "save", full)
    with pytest.raises(OSError, match="disk is full"):
        import_weights(folder, url)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grouped"]
    # Killed instead: the next import starts anew.
    with monkeypatch.context() as killed, pytest.raises(OSError):
        saves.clear()
        killed.setattr(params_stream, "remove_tree", lambda url: None)
        import_weights(folder, url)
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(params_stream.ocp.partial, "save", save)
    meta = import_weights(folder, url)
    assert state_digest(load_params(url)[1]) == meta.params_digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dest", "grouped"]


def test_an_import_without_its_tokenizer_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(url: str, content: bytes) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(weights_io, "write_atomic", full)
    with pytest.raises(OSError, match="disk is full"):
        import_weights(golden_folder(tmp_path, "grouped"), str(tmp_path / "dest"))
    assert [path.name for path in tmp_path.iterdir()] == ["grouped"]


def test_damage_is_never_exported(
    tmp_path: Path, imported: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
):
    read = params_stream.read_items

    def flipped(url: str, template: dict[str, Any]) -> dict[str, Any]:
        loaded = read(url, template)
        return jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].add(1), loaded)

    monkeypatch.setattr(params_stream, "read_items", flipped)
    with pytest.raises(CorruptCheckpointError, match="the files are damaged"):
        export_weights(imported[1], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_an_imported_checkpoint_can_be_used_for(imported: tuple[Path, str], tmp_path: Path):
    _, url = imported
    told = called("generate", url, "aba", "--max-new-tokens", "3", "--json")
    assert json.loads(told)["prompt"] == "aba"
    assert "have no held-out text of their own: start a run" in refused("evaluate", url)
    text_folder(tmp_path)
    values = tiny_values(tmp_path, "fork") | {
        "model": read_meta(url).model.model_dump(mode="json"),
        "start_from": {"checkpoint": url, "state": "all"},
    }
    values["data"]["tokenizer"] = {"kind": "train", "vocab_size": VOCAB_SIZE}
    with pytest.raises(ValueError, match=r"weights alone.*set start_from\.state=weights"):
        create_run(parse_run(values, "test"))
