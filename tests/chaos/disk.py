"""A disk of its own for a run, which can be full, still, slow or write-protected. It takes root."""

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

_SIZE_BYTES = 2 << 30
_PART_BYTES = 1 << 20


class Disk:
    """What is mounted at `path`."""

    def __init__(self, path: Path):
        self.path = path

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Not a byte more can be written."""
        ballast = self.path / "ballast"
        try:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                for size in (_PART_BYTES, 1 << 12, 1):
                    with contextlib.suppress(OSError):
                        while file.write(bytes(size)):
                            pass
            yield
        finally:
            ballast.unlink()

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Who writes waits, until the end of the block."""
        _run("fsfreeze", "--freeze", str(self.path))
        try:
            yield
        finally:
            _run("fsfreeze", "--unfreeze", str(self.path))

    @contextlib.contextmanager
    def slow(self, still_s: float, pause_s: float) -> Iterator[None]:
        """Again and again who writes waits."""
        ended = threading.Event()

        def work() -> None:
            while not ended.wait(pause_s):
                with self.still():
                    ended.wait(still_s)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    @contextlib.contextmanager
    def protected(self) -> Iterator[None]:
        """Nobody, root included, may add or remove a file; those that are open are written to."""
        folders = [folder for folder, _, _ in os.walk(self.path)]
        _run("chattr", "+i", *folders)
        try:
            yield
        finally:
            _run("chattr", "-i", *folders)


@contextlib.contextmanager
def disk(path: Path) -> Iterator[Disk]:
    """Mounts a disk at `path`, which is a file of its folder, and takes it away.

    Raises:
        OSError, CalledProcessError: this process may not.
    """
    image = path.with_suffix(".image")
    with image.open("wb") as file:
        file.truncate(_SIZE_BYTES)
    _run("mkfs.ext4", "-q", "-m", "0", str(image))
    path.mkdir()
    _run("mount", "-o", "loop,noatime", str(image), str(path))
    try:
        yield Disk(path)
    finally:
        _run("umount", str(path))
        image.unlink()


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
