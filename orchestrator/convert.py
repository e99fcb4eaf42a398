"""`stillhouse import` and `export`: weights in the layout of Hugging Face, on this machine."""

from pathlib import Path

from model.tensor_files import FileDtype
from orchestrator.catalogue import find_checkpoint
from orchestrator.run_folder import absolute


def import_checkpoint(folder: str, destination: str, num_rows: int | None) -> str:
    """Makes a checkpoint of a Hugging Face folder; a sentence that says what and where.

    Raises:
        ValueError: the folder is not that of a Gemma 2 model, or the destination exists.
    """
    from model.config import param_count
    from workers.weights_io import import_weights

    url = absolute(destination).rstrip("/")
    meta = import_weights(Path(folder), url, num_rows)
    total = param_count(meta.model).total
    return f"{total:,} parameters, {meta.imported_dtype} in the file: the checkpoint {url}"


def export_checkpoint(name: str, folder: str, storage_url: str, dtype: FileDtype | None) -> str:
    """Writes a checkpoint as a Hugging Face folder; a sentence that says what and where.

    Raises:
        ValueError: there is no such checkpoint, it cannot be exported, or the folder exists.
    """
    url, _ = find_checkpoint(name, storage_url)
    from workers.weights_io import export_weights

    written = export_weights(url, Path(folder), dtype)
    return f"{url} as {written}: the Hugging Face folder {Path(folder).absolute()}"
