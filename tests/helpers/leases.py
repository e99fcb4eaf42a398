"""A controller that works on a run, as far as others see it."""

import contextlib
import threading
import time
from collections.abc import Iterator

from orchestrator.run_folder import RunFolder
from workers.storage import join, write_json


@contextlib.contextmanager
def renewed_lease(folder: RunFolder, clock_behind_s: float = 0.0) -> Iterator[None]:
    """The lease is renewed again and again, by a clock that may be another than ours."""
    ended = threading.Event()

    def renew() -> None:
        renewed_s = time.time() - clock_behind_s
        lease = {"holder": "someone", "address": "here:1", "renewed_s": renewed_s}
        write_json(join(folder.url, "lease.json"), lease)

    def renew_often() -> None:
        while not ended.wait(0.05):
            renew()

    renew()
    thread = threading.Thread(target=renew_often)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        folder.release_lease()
