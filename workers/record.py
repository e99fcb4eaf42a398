"""The run's own record: JSON lines in immutable segments, one series per writer.

Object stores cannot append, so a writer collects lines and puts them down as numbered
segments `WRITER-00000000.jsonl`. A segment never changes once it is written. What a reader
makes of the segments is told in `orchestrator.history`.
"""

import itertools
import json
import logging
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from workers.storage import join, read_bytes, write_atomic

STEPS, EVENTS, LOGS = "record", "events", "logs"

_log = logging.getLogger(__name__)


class SegmentWriter:
    """Appends lines in memory and writes them as segments, at the latest after `flush_s`.

    `append` never waits for storage. A segment that cannot be written is kept and tried again
    with the lines that came since; `flush` raises what stands in the way.
    """

    def __init__(self, folder_url: str, writer: str, flush_s: float):
        self._folder_url = folder_url
        self._writer = writer
        self._flush_s = flush_s
        self._lines: list[str] = []
        self._num_segments = 0
        self._lines_lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._flush_often, daemon=True, name="record")
        self._thread.start()

    def append(self, line: Mapping[str, Any]) -> None:
        """Takes one JSON object; `line` is not kept, so the caller may change it afterwards."""
        text = json.dumps(line, allow_nan=True)
        with self._lines_lock:
            self._lines.append(text)

    def flush(self) -> None:
        """Returns when every line appended so far is on storage. Raises OSError if it cannot."""
        with self._write_lock:
            with self._lines_lock:
                count = len(self._lines)
                text = "".join(line + "\n" for line in self._lines)
            if not count:
                return
            name = f"{self._writer}-{self._num_segments:08d}.jsonl"
            write_atomic(join(self._folder_url, name), text.encode())
            self._num_segments += 1
            with self._lines_lock:
                del self._lines[:count]

    def pending(self) -> tuple[str, ...]:
        """The lines that may not be on storage yet, oldest first."""
        with self._lines_lock:
            return tuple(self._lines)

    def close(self) -> None:
        """Writes what is left and ends the background thread."""
        self._closed.set()
        self._thread.join()
        self.flush()

    def _flush_often(self) -> None:
        while not self._closed.wait(self._flush_s):
            try:
                self.flush()
            except Exception as error:  # object stores raise errors of their own kinds
                # The lines stay in memory; the next checkpoint's flush raises if it lasts.
                _log.warning("The record cannot be written, will try again: %s", error)


def read_segment(url: str) -> list[dict[str, Any]]:
    """The lines of one segment."""
    return [json.loads(line) for line in read_bytes(url).decode().splitlines()]


def write_carried(folder_url: str, writer: str, attempt: int, lines: Sequence[str]) -> None:
    """Writes lines that `writer` may not have come to, for an attempt that goes on from them.

    Some of them may be on storage already: a reader counts each line of a writer once.
    """
    if lines:
        text = "".join(line + "\n" for line in lines)
        write_atomic(join(folder_url, f"{writer}-a{attempt:04d}.jsonl"), text.encode())


class EventWriter:
    """Writes what happened, when, and to whom.

    An event is on storage when `say` returns; while storage fails, it is tried again.
    """

    def __init__(self, run_url: str, writer: str):
        self._writer = writer
        self._segments = SegmentWriter(join(run_url, EVENTS), writer, flush_s=1.0)
        self._order = itertools.count()

    def say(self, event: str, **details: Any) -> None:
        """Records one event; `details` are JSON values."""
        order = next(self._order)
        line = {"time_s": time.time(), "event": event, "who": self._writer, "order": order}
        self._segments.append({**line, **details})
        try:
            self._segments.flush()
        except Exception as error:  # as in `_flush_often`: kept, and tried again
            _log.warning("The event %r waits for storage: %s", event, error)

    def close(self) -> None:
        self._segments.close()


class LogSegments(logging.Handler):
    """A logging handler whose lines become part of the run, whatever machine wrote them.

    A process that takes over from another of its name (a restarted actor) has segments of its own.
    """

    def __init__(self, run_url: str, writer: str, flush_s: float = 2.0):
        super().__init__(logging.INFO)
        logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax tells of every file
        life = f"{writer}-{uuid.uuid4().hex[:8]}"
        self._segments = SegmentWriter(join(run_url, LOGS), life, flush_s)
        self._writer = writer

    def handle(self, record: logging.LogRecord) -> Any:
        # Not under the handler's lock: `close` may hold it while it waits for the thread that
        # writes, and that thread may log.
        if passed := self.filter(record):
            self.emit(record)
        return passed

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = self.format(record)
        except Exception:
            self.handleError(record)  # a malformed log call, told on stderr as logging does
            return
        self._segments.append(
            {
                "time_s": record.created,
                "who": self._writer,
                "level": record.levelname,
                "message": message,
            }
        )

    def close(self) -> None:
        self._segments.close()
        super().close()
