"""The files of published weights: written whole, read whole, or refused."""

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from model.tensor_files import TensorReader, TensorWriter

SHAPES = {"b.weight": (3, 4), "a.weight": (7,), "c.weight": (2, 2)}


def some_tensors(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def written(folder: Path, dtype: Any, max_shard_bytes: int) -> dict[str, np.ndarray]:
    """Tensors that were written in another order than they lie in."""
    tensors = some_tensors()
    writer = TensorWriter(folder, SHAPES, dtype, max_shard_bytes)
    for name in reversed(SHAPES):
        writer.write(name, np.asfortranarray(tensors[name]))
    return {name: tensor.astype(dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_shard_bytes", [10**6, 60, 30, 1])
def test_files_hold_what_was_written(tmp_path: Path, dtype: Any, max_shard_bytes: int):
    expected = written(tmp_path, dtype, max_shard_bytes)
    reader = TensorReader(tmp_path)
    reader.check(SHAPES)
    assert reader.dtype == dtype
    for name, tensor in expected.items():
        found = reader.read(name)
        assert found.dtype == tensor.dtype and found.tobytes() == tensor.tobytes()


def test_shards_are_small_enough_and_listed(tmp_path: Path):
    expected = written(tmp_path, "float32", 60)
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *names,
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * (12 + 7 + 4)
    for number, held in enumerate((["b.weight"], ["a.weight", "c.weight"])):
        content = load_file(tmp_path / names[number])
        assert sorted(content) == sorted(held)
        assert sum(tensor.nbytes for tensor in content.values()) <= 60
        for name in held:
            assert index["weight_map"][name] == names[number]
            np.testing.assert_array_equal(content[name], expected[name])


@pytest.mark.parametrize(
    ("max_shard_bytes", "num_files"), [(92, 1), (91, 2), (44, 2), (43, 3), (1, 3)]
)
def test_files_are_filled_up_to_the_limit(tmp_path: Path, max_shard_bytes: int, num_files: int):
    """The tensors take 48, 28 and 16 bytes."""
    written(tmp_path, "float32", max_shard_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == num_files


def faults_of(folder: Path, tensors: dict[str, np.ndarray]) -> str:
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError) as raised:
        TensorReader(folder).check(SHAPES)
    assert str(raised.value).startswith(f"{folder}: ")
    return str(raised.value).removeprefix(f"{folder}: ")


def test_tensors_that_do_not_fit_are_named_all_at_once(tmp_path: Path):
    tensors = some_tensors()
    del tensors["a.weight"]
    tensors["lm_head.weight"] = np.ones((1, 1), np.float32)
    tensors["b.weight"] = tensors["b.weight"].T.copy()
    tensors["c.weight"] = tensors["c.weight"].astype(np.float16)
    assert faults_of(tmp_path, tensors) == (
        "missing: a.weight; not part of the model: lm_head.weight; of another shape than "
        "config.json says: b.weight [4, 3] instead of [3, 4]; of a type that is not read (F32, "
        "BF16 are): c.weight F16"
    )


def test_a_long_list_of_tensors_is_cut(tmp_path: Path):
    tensors = some_tensors() | {f"extra{i:02d}": np.ones(1, np.float32) for i in range(20)}
    told = faults_of(tmp_path, tensors)
    assert told.startswith("not part of the model: extra00, extra01, ")
    assert told.endswith("extra11 and 8 more")


def test_a_mixture_of_types_is_read_as_the_widest(tmp_path: Path):
    tensors = some_tensors(ml_dtypes.bfloat16)
    tensors["a.weight"] = tensors["a.weight"].astype(np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    reader = TensorReader(tmp_path)
    reader.check(SHAPES)
    assert reader.dtype == "float32"


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_truncated_file_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    folder = tmp_path_factory.mktemp("cut")
    written(folder, "float32", 10**6)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match=r"model.safetensors is no complete safetensors file"):
        TensorReader(folder)


def test_headers_that_lie_are_refused(tmp_path: Path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(8)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="no complete safetensors file"):
        TensorReader(tmp_path)


def test_incomplete_folders_are_refused(tmp_path: Path):
    def refused() -> str:
        with pytest.raises(ValueError) as raised:
            TensorReader(tmp_path)
        return str(raised.value)

    assert "holds neither model.safetensors nor model.safetensors.index.json" in refused()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{")
    assert "index.json is not JSON" in refused()
    index.write_text("[]")
    assert "has no weight_map" in refused()
    index.unlink()
    written(tmp_path, "float32", 60)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "missing: model-00002-of-00002.safetensors: download them again" in refused()
