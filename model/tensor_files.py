"""Safetensors files as Hugging Face lays them out: one, or several with an index.

Read through the package `safetensors`, one tensor at a time. Written here, since that package
wants all tensors of a file at once: a file is an eight-byte little-endian length, a JSON header
with each tensor's type, shape and place, and the tensors' bytes in order.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

FileDtype = Literal["float32", "bfloat16"]
MAX_SHARD_BYTES = 5 * 10**9

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TYPES: dict[FileDtype, tuple[str, Any]] = {
    "float32": ("F32", np.float32),
    "bfloat16": ("BF16", ml_dtypes.bfloat16),
}
_NAMES = {code: name for name, (code, _) in _TYPES.items()}
_MOST_NAMED = 12

Shape = tuple[int, ...]


class TensorReader:
    """The tensors of a folder; only what is read is in memory.

    Raises:
        ValueError: there are no such files, or they are damaged.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._places: dict[str, Path] = {}
        self._shapes: dict[str, Shape] = {}
        self._codes: dict[str, str] = {}
        for path in _files(folder):
            file = _open(path)
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                part = file.get_slice(name)
                self._places[name] = path
                self._shapes[name] = tuple(part.get_shape())
                self._codes[name] = part.get_dtype()

    @property
    def dtype(self) -> FileDtype:
        """The type of all numbers; of a mixture the widest, which holds each of them exactly."""
        names = {_NAMES[code] for code in self._codes.values()}
        return "float32" if "float32" in names else "bfloat16"

    def check(self, expected: Mapping[str, Shape]) -> None:
        """Raises ValueError with all that is wrong, unless the file holds just these tensors."""
        found = self._shapes
        both = [name for name in expected if name in found]
        readable = ", ".join(_NAMES)
        faults = [
            _listed("missing", [name for name in expected if name not in found]),
            _listed("not part of the model", [name for name in found if name not in expected]),
            _listed(
                "of another shape than config.json says",
                [
                    f"{name} {list(found[name])} instead of {list(expected[name])}"
                    for name in both
                    if found[name] != expected[name]
                ],
            ),
            _listed(
                f"of a type that is not read ({readable} are)",
                [f"{name} {self._codes[name]}" for name in both if self._codes[name] not in _NAMES],
            ),
        ]
        if any(faults):
            raise ValueError(f"{self._folder}: {'; '.join(filter(None, faults))}")

    def read(self, name: str) -> Float[np.ndarray, "..."]:
        """One tensor, in the type that it has in the file."""
        return _open(self._places[name]).get_tensor(name)


class TensorWriter:
    """Writes given tensors into a folder, in any order, one at a time.

    Files hold at most `max_shard_bytes` of tensors each, unless a single one is larger.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, Shape],
        dtype: FileDtype,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ):
        self._shapes = shapes
        self._code, self._dtype = _TYPES[dtype]
        self._places: dict[str, tuple[Path, int]] = {}
        sizes = {name: int(np.prod(shape)) * self._itemsize for name, shape in shapes.items()}
        shards = _shards(sizes, max_shard_bytes)
        for number, names in enumerate(shards, 1):
            path = folder / (
                _SINGLE
                if len(shards) == 1
                else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            )
            self._begin(path, names, sizes)
        if len(shards) > 1:
            self._write_index(folder / _INDEX, sum(sizes.values()))

    @property
    def _itemsize(self) -> int:
        return np.dtype(self._dtype).itemsize

    def write(self, name: str, tensor: Float[np.ndarray, "..."]) -> None:
        """Puts one tensor where it belongs, rounded to the type of the file."""
        assert tensor.shape == self._shapes[name], name
        path, offset = self._places[name]
        content = np.ascontiguousarray(tensor.astype(self._dtype, copy=False))
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(content.view(np.uint8).data)

    def _begin(self, path: Path, names: list[str], sizes: Mapping[str, int]) -> None:
        """Writes the header, and makes the file as long as it will be."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            offsets = [end, end + sizes[name]]
            header[name] = {
                "dtype": self._code,
                "shape": list(self._shapes[name]),
                "data_offsets": offsets,
            }
            end = offsets[1]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(start + end)
        for name in names:
            self._places[name] = path, start + header[name]["data_offsets"][0]

    def _write_index(self, path: Path, total_bytes: int) -> None:
        names = {name: place.name for name, (place, _) in sorted(self._places.items())}
        values = {"metadata": {"total_size": total_bytes}, "weight_map": names}
        path.write_text(json.dumps(values, indent=2) + "\n")


def read_json_file(path: Path) -> Any:
    """The content of a JSON file. Raises ValueError where there is none, or it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: give a Hugging Face folder that has it") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from error


def _files(folder: Path) -> list[Path]:
    """A folder with both has the single file read, as Hugging Face does."""
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    if not (folder / _INDEX).exists():
        raise ValueError(f"{folder} holds neither {_SINGLE} nor {_INDEX}: no weights to read")
    index = read_json_file(folder / _INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(e, str) for e in places.values()):
        raise ValueError(f"{folder / _INDEX} has no weight_map: download it again")
    paths = [folder / name for name in sorted(set(places.values()))]
    if absent := [path.name for path in paths if not path.exists()]:
        raise ValueError(f"{folder}: {_listed('missing', absent)}: download them again")
    return paths


def _open(path: Path) -> Any:
    # Mapped pages would count as this process's memory.
    try:
        return safe_open(path, framework="np", backend="pread")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no complete safetensors file ({error}): download it again"
        ) from error


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    rest = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"{what}: {', '.join(names[:_MOST_NAMED])}{rest}"


def _shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Names by file, in order."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards
