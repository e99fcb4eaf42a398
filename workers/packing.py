"""Packs the documents of a corpus into rows of T + 1 tokens, once, in parallel processes.

Each document becomes `<bos> text <eos>`; documents follow one another without gaps and are cut
into rows, so a document may go on in the next row, where it is a segment of its own. Documents
are dealt to shards in fixed groups, never by worker, so the bytes do not depend on the number of
processes. The dataset's digest names its content: the files, the tokenizer, the row length, the
split and the format.
"""

import hashlib
import json
import multiprocessing
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed

from configs.data import DataConfig
from model.tokenizer import Tokenizer
from workers import storage
from workers.corpus import Piece, scan_file, split_of
from workers.dataset import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    DatasetManifest,
    SourceManifest,
    Split,
    SplitManifest,
    dataset_folder,
    load_manifest,
    token_type_of,
)
from workers.shard import COUNTS, ShardTask, start_process, write_shard
from workers.source_files import list_files

SPLITS: tuple[Split, ...] = ("train", "held_out")
_MIN_GROUP_BYTES, _MAX_GROUP_BYTES = 2**20, 2**28

Progress = Callable[[int, int], None]
Scan = list[tuple[str, list[Piece]]]  # of each file: sha256 and pieces


def prepare_dataset(
    config: DataConfig,
    tokenizer: Tokenizer,
    root_url: str,
    *,
    num_workers: int,
    progress: Progress | None = None,
) -> DatasetManifest:
    """Pack the sources of `config` into rows below `root_url`, or find them packed already.

    `progress(done, total)` counts bytes of files read for packing. With several workers,
    processes are spawned, so a calling script needs its `if __name__ == "__main__"`.

    Raises:
        ValueError: a source cannot be read or gives no rows, or an existing dataset is damaged.
        OSError: files cannot be read or written.
    """
    for name in ("bos_id", "eos_id", "pad_id"):
        if getattr(tokenizer, name) < 0:
            raise ValueError(f"the tokenizer has no {name}; take one with bos, eos and pad")
    files = [list_files(source) for source in config.sources]
    total_bytes = sum(file.num_bytes for of_source in files for file in of_source)
    group_bytes = _group_bytes(total_bytes, config.row_length)
    with ThreadPoolExecutor(num_workers) as threads:
        scans = [
            list(threads.map(lambda file: scan_file(file, group_bytes), of_source))
            for of_source in files
        ]
    digest = _digest(config, tokenizer, scans)
    folder = dataset_folder(root_url, digest)
    if storage.exists(storage.join(folder, MANIFEST_NAME)):
        return load_manifest(root_url, digest)

    # Each attempt has a folder of its own for its shards, so two attempts at once never meet;
    # the manifest tells which one counts.
    attempt = f"rows-{uuid.uuid4().hex[:8]}"
    tasks = _plan(config, scans, group_bytes, folder, attempt)
    try:
        results = _run(tasks, tokenizer, num_workers, progress or (lambda done, total: None))
        manifest = DatasetManifest(
            format_version=FORMAT_VERSION,
            digest=digest,
            tokenizer_digest=tokenizer.digest,
            row_length=config.row_length,
            token_type=token_type_of(tokenizer.vocab_size),
            seed=config.seed,
            held_out_fraction=config.held_out_fraction,
            sources=_collect(config, tasks, results),
        )
        _check_rows(config, manifest)
        storage.write_json(storage.join(folder, MANIFEST_NAME), manifest.model_dump(mode="json"))
    except BaseException:
        storage.remove_tree(storage.join(folder, attempt))
        raise
    return manifest


def _group_bytes(total_bytes: int, row_length: int) -> int:
    """Text per shard: little enough to share out, and more than a hundred rows, since the last
    row of each shard is padded."""
    wanted = max(_MIN_GROUP_BYTES, 512 * row_length, total_bytes // 1024)
    return min(wanted, _MAX_GROUP_BYTES)


def _digest(config: DataConfig, tokenizer: Tokenizer, scans: list[Scan]) -> str:
    sources = [
        {
            "name": source.name,
            "text_field": source.text_field,
            "max_bytes": source.max_bytes,
            "files": [(p[0].file.name, p[0].file.format, sha256) for sha256, p in scan if p],
        }
        for source, scan in zip(config.sources, scans, strict=True)
    ]
    content = {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer.digest,
        "row_length": config.row_length,
        "held_out_fraction": config.held_out_fraction,
        "seed": config.seed,
        "sources": sources,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _plan(
    config: DataConfig, scans: list[Scan], group_bytes: int, folder: str, attempt: str
) -> list[ShardTask]:
    """Deal the pieces of each source and split to shards of about `group_bytes` of text."""
    tasks = []
    for number, (source, scan) in enumerate(zip(config.sources, scans, strict=True)):
        pieces = [piece for _, of_file in scan for piece in of_file]
        for split in SPLITS:
            for shard, group in enumerate(_groups(config, pieces, split, group_bytes)):
                task = ShardTask(
                    source=number,
                    split=split,
                    folder=folder,
                    name=f"{attempt}/{split}/{source.name}-{shard:05d}.arrayrecord",
                    pieces=tuple(group),
                    text_field=source.text_field,
                    seed=config.seed,
                    held_out_fraction=config.held_out_fraction,
                    row_length=config.row_length,
                )
                tasks.append(task)
    return tasks


def _groups(
    config: DataConfig, pieces: list[Piece], split: Split, group_bytes: int
) -> Iterator[list[Piece]]:
    fraction = config.held_out_fraction
    share = fraction if split == "held_out" else 1 - fraction
    if share == 0:
        return
    group: list[Piece] = []
    num_bytes = 0.0
    for piece in pieces:
        if piece.file.format == "text":
            if split_of(piece.file.name, config.seed, fraction) != split:
                continue
            num_bytes += piece.num_bytes
        else:  # split by record: both splits read the piece
            num_bytes += piece.num_bytes * share
        group.append(piece)
        if num_bytes >= group_bytes:
            yield group
            group, num_bytes = [], 0.0
    if group:
        yield group


def _run(
    tasks: list[ShardTask], tokenizer: Tokenizer, num_workers: int, progress: Progress
) -> list[SplitManifest]:
    """What each task made, in order. A single worker works in this very process."""
    done, total = 0, sum(task.num_bytes for task in tasks)
    progress(done, total)
    results: dict[int, SplitManifest] = {}
    for i, result in _finished(tasks, tokenizer, num_workers):
        results[i] = result
        done += tasks[i].num_bytes
        progress(done, total)
    return [results[i] for i in range(len(tasks))]


def _finished(
    tasks: list[ShardTask], tokenizer: Tokenizer, num_workers: int
) -> Iterator[tuple[int, SplitManifest]]:
    num_workers = min(num_workers, len(tasks))
    if num_workers <= 1:
        for i, task in enumerate(tasks):
            yield i, write_shard(task, tokenizer)
        return
    pool = ProcessPoolExecutor(
        num_workers,
        # A fork of a process that holds threads of JAX or Ray may hang.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_process,
        initargs=(tokenizer.model_bytes,),
    )
    try:
        futures = {pool.submit(write_shard, task): i for i, task in enumerate(tasks)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _collect(
    config: DataConfig, tasks: list[ShardTask], results: list[SplitManifest]
) -> tuple[SourceManifest, ...]:
    def split(number: int, split: Split) -> SplitManifest:
        parts = [
            result
            for task, result in zip(tasks, results, strict=True)
            if (task.source, task.split) == (number, split)
        ]
        counts = {name: sum(getattr(part, name) for part in parts) for name in COUNTS}
        shards = tuple(shard for part in parts for shard in part.shards)
        return SplitManifest(**counts, shards=shards)

    return tuple(
        SourceManifest(name=source.name, train=split(i, "train"), held_out=split(i, "held_out"))
        for i, source in enumerate(config.sources)
    )


def _check_rows(config: DataConfig, manifest: DatasetManifest) -> None:
    for source in manifest.sources:
        if source.train.num_rows == 0:
            skipped = source.train.num_skipped + source.held_out.num_skipped
            empty = source.train.num_empty + source.held_out.num_empty
            raise ValueError(
                f"source {source.name!r} gives no training rows: {skipped} of its documents are "
                f"not UTF-8, {empty} are empty and {source.held_out.num_documents} are held out; "
                "correct its path and globs, add documents or lower data.held_out_fraction"
            )
    held_out = sum(source.held_out.num_rows for source in manifest.sources)
    if config.held_out_fraction > 0 and held_out == 0:
        raise ValueError(
            f"no document of sources {[source.name for source in manifest.sources]} was held out "
            f"at held_out_fraction {config.held_out_fraction}; add documents, raise "
            "data.held_out_fraction, change data.seed or set the fraction to 0"
        )
