"""Files: atomic writes, errors that keep their errno, the same words for disk and object store."""

import errno
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from workers import storage


def test_what_is_written_is_read(root):
    url = storage.join(root, "a", "b.json")
    assert not storage.exists(url)
    storage.write_json(url, {"x": [1, "é"]})
    assert storage.exists(url)
    assert storage.read_json(url) == {"x": [1, "é"]}
    storage.write_atomic(url, b"{}")
    assert storage.read_bytes(url) == b"{}"


def test_listing_and_removing(root):
    for name in ("b", "a", "c/d"):
        storage.write_atomic(storage.join(root, "folder", name), name.encode())
    folder = storage.join(root, "folder")
    assert storage.list_names(folder) == ["a", "b", "c"]
    assert storage.list_tree(folder) == {"a": 1, "b": 1, "c/d": 3}
    storage.remove_tree(folder)
    assert storage.list_names(folder) == []
    storage.remove_tree(folder)


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path):
    url = str(tmp_path / "file")
    storage.write_atomic(url, b"old")
    with pytest.raises(OSError, match="No space left") as caught, storage.atomic_file(url) as path:
        Path(path).write_bytes(b"ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.errno == errno.ENOSPC
    assert url in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]
    assert storage.read_bytes(url) == b"old"


def test_errors_keep_their_type_and_name_the_file(tmp_path):
    (tmp_path / "file").write_text("")
    below_a_file = str(tmp_path / "file" / "x")
    with pytest.raises(FileExistsError, match="file/x") as caught:
        storage.write_atomic(below_a_file, b"")
    assert caught.value.errno == errno.EEXIST
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        storage.read_bytes(str(tmp_path / "nothing-here"))


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json is not JSON"):
        storage.read_json(str(tmp_path / "x.json"))


def test_a_local_file_is_its_own_copy_and_another_is_downloaded_once(tmp_path):
    (tmp_path / "file").write_bytes(b"1")
    assert storage.local_copy(str(tmp_path / "file"), str(tmp_path)) == str(tmp_path / "file")

    url = f"memory://{uuid.uuid4().hex}/file"
    storage.write_atomic(url, b"1")
    copy = storage.local_copy(url, str(tmp_path / "cache"))
    assert Path(copy).read_bytes() == b"1"
    storage.remove_tree(url)
    assert storage.local_copy(url, str(tmp_path / "cache")) == copy


def test_a_failed_download_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        storage.local_copy("memory://never/was", str(tmp_path / "cache"))
    assert os.listdir(tmp_path / "cache") == []


@pytest.mark.parametrize("remote", [False, True])
def test_of_several_writers_of_one_file_the_first_succeeds(tmp_path, remote):
    url = f"memory://{uuid.uuid4().hex}/a/b" if remote else str(tmp_path / "a" / "b")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: storage.write_new(url, b"%d" % n), range(8)))
    assert won.count(True) == 1
    assert storage.read_bytes(url) == b"%d" % won.index(True)
    assert storage.list_names(url.rpartition("/")[0]) == ["b"]


def test_what_an_object_store_raises_is_an_error_of_storage():
    """Clients of object stores have types of their own for what may pass."""

    class HttpError(Exception):
        pass

    told, url = "HttpError: 503, while reading gs://bucket/file", "gs://bucket/file"
    with pytest.raises(OSError, match=told), storage.naming("reading", url):
        raise HttpError("503")
    with pytest.raises(TypeError), storage.naming("reading", url):
        raise TypeError("a mistake of ours")
