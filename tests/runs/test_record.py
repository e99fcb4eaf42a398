"""What is appended to the record is on storage once, in order, whatever storage does meanwhile."""

import json
import logging
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.history import read_events, read_logs
from tests.helpers.broken_storage import break_storage, mend_storage
from workers import record
from workers.record import EventWriter, LogSegments, SegmentWriter

NEVER_S = 3600.0
LONG_S = 30.0


def lines_in(folder: Path) -> list[dict]:
    texts = [path.read_text() for path in sorted(folder.glob("*.jsonl"))]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def eventually(happened: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + LONG_S
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.005)
    return happened()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(["append", "append", "flush", "break", "mend"]), max_size=25))
def test_failing_writes_lose_and_double_nothing(moves):
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "record"
        writer = SegmentWriter(str(folder), "w", NEVER_S)
        appended, broken = [], False
        for number, move in enumerate(moves):
            if move == "append":
                writer.append({"n": number})
                appended.append({"n": number})
            elif move == "flush" and broken and appended:
                # Nothing stands in the way of an empty flush; another raises what does.
                try:
                    writer.flush()
                except OSError as error:
                    assert "record" in str(error)
            elif move == "flush":
                writer.flush()
                assert lines_in(folder) == appended
            elif move == "break" and not broken:
                break_storage(folder)
                broken = True
            elif move == "mend" and broken:
                mend_storage(folder)
                broken = False
        if broken:
            mend_storage(folder)
        writer.close()
        assert lines_in(folder) == appended


def test_flush_raises_and_keeps_the_lines(tmp_path):
    folder = tmp_path / "record"
    writer = SegmentWriter(str(folder), "w", NEVER_S)
    break_storage(folder)
    writer.append({"n": 1})
    with pytest.raises(OSError, match="w-00000000"):
        writer.flush()
    with pytest.raises(OSError, match="w-00000000"):
        writer.close()
    mend_storage(folder)
    writer.flush()
    assert lines_in(folder) == [{"n": 1}]


def test_a_written_segment_never_changes(tmp_path):
    writer = SegmentWriter(str(tmp_path), "w", NEVER_S)
    line = {"n": 1}
    writer.append(line)
    line["n"] = 100
    writer.flush()
    first = (tmp_path / "w-00000000.jsonl").read_bytes()
    writer.flush()
    writer.append({"n": 2})
    writer.close()
    assert (tmp_path / "w-00000000.jsonl").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "w-00000000.jsonl",
        "w-00000001.jsonl",
    ]
    assert lines_in(tmp_path) == [{"n": 1}, {"n": 2}]


def test_lines_reach_storage_by_themselves(tmp_path):
    writer = SegmentWriter(str(tmp_path), "w", flush_s=0.01)
    writer.append({"n": 1})
    assert eventually(lambda: lines_in(tmp_path) == [{"n": 1}])
    writer.close()


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_writing_by_itself_outlives_every_error_of_storage(tmp_path, monkeypatch, kind):
    """Object stores raise errors that are no OSError."""
    write, failed = record.write_atomic, threading.Event()

    def fail_once(url: str, content: bytes) -> None:
        if not failed.is_set():
            failed.set()
            raise kind("out of reach")
        write(url, content)

    monkeypatch.setattr(record, "write_atomic", fail_once)
    writer = SegmentWriter(str(tmp_path), "w", flush_s=0.01)
    writer.append({"n": 1})
    assert eventually(lambda: lines_in(tmp_path) == [{"n": 1}])
    writer.close()
    assert failed.is_set()


def test_appending_from_many_threads_while_segments_are_written(tmp_path):
    writer = SegmentWriter(str(tmp_path), "w", flush_s=0.001)

    def append(thread: int) -> None:
        for n in range(200):
            writer.append({"thread": thread, "n": n})
            if n % 50 == 0:
                writer.flush()

    threads = [threading.Thread(target=append, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    lines = lines_in(tmp_path)
    for number in range(4):
        of_thread = [line["n"] for line in lines if line["thread"] == number]
        assert of_thread == list(range(200))
    assert len(lines) == 800


def test_an_event_is_on_storage_when_said(tmp_path):
    writer = EventWriter(str(tmp_path), "someone")
    writer.say("checkpoint", step=3)
    writer.say("evaluated", step=3)
    first, second = read_events(str(tmp_path))
    assert (first["event"], first["step"], first["who"]) == ("checkpoint", 3, "someone")
    assert second["event"] == "evaluated"
    assert (first["order"], second["order"]) == (0, 1)
    writer.close()


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_events_wait_out_a_storage_that_fails(tmp_path, monkeypatch, caplog, kind):
    def fail(url: str, content: bytes) -> None:
        raise kind("out of reach")

    writer = EventWriter(str(tmp_path), "someone")
    with monkeypatch.context() as broken:
        broken.setattr(record, "write_atomic", fail)
        writer.say("first")
        assert "'first' waits for storage: out of reach" in caplog.text
        assert read_events(str(tmp_path)) == []
    writer.say("second")
    writer.close()
    assert [line["event"] for line in read_events(str(tmp_path))] == ["first", "second"]


@pytest.fixture
def logger():
    logger = logging.Logger("some.module")
    yield logger
    for handler in logger.handlers:
        handler.close()


def test_logs_become_part_of_the_run(tmp_path, logger):
    logger.addHandler(LogSegments(str(tmp_path), "evaluator", NEVER_S))
    logger.debug("too small a thing")
    logger.warning("bad %s", "news")
    try:
        raise KeyError("lost")
    except KeyError:
        logger.exception("met")
    logger.handlers[0].close()
    first, second = read_logs(str(tmp_path))
    assert (first["message"], first["level"], first["who"]) == ("bad news", "WARNING", "evaluator")
    assert second["message"].startswith("met\nTraceback") and "KeyError" in second["message"]


def test_a_restarted_process_keeps_the_logs_of_the_last(tmp_path, logger):
    for life in range(3):
        handler = LogSegments(str(tmp_path), "wandb", NEVER_S)
        logger.addHandler(handler)
        logger.info("life %d", life)
        handler.close()
        logger.removeHandler(handler)
    assert {line["message"] for line in read_logs(str(tmp_path))} == {"life 0", "life 1", "life 2"}


def test_a_malformed_log_call_does_not_reach_its_caller(tmp_path, logger, capsys):
    logger.addHandler(LogSegments(str(tmp_path), "w", NEVER_S))
    logger.info("%d rows", "many")
    logger.info("fine")
    logger.handlers[0].close()
    assert [line["message"] for line in read_logs(str(tmp_path))] == ["fine"]
    assert "Logging error" in capsys.readouterr().err


def test_closing_does_not_wait_for_itself_when_storage_fails(tmp_path, monkeypatch):
    """At exit `logging` closes handlers under their locks, while the writing thread may log."""
    writing, closing = threading.Event(), threading.Event()

    def fail(url: str, content: bytes) -> None:
        writing.set()
        assert closing.wait(LONG_S)
        raise OSError("out of reach")

    monkeypatch.setattr(record, "write_atomic", fail)
    handler = LogSegments(str(tmp_path), "w", flush_s=0.001)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        root.warning("one line")
        assert writing.wait(LONG_S)

        def close_as_at_exit() -> None:
            with pytest.raises(OSError):
                handler.acquire()
                try:
                    closing.set()
                    handler.close()
                finally:
                    handler.release()

        thread = threading.Thread(target=close_as_at_exit, daemon=True)
        thread.start()
        thread.join(LONG_S)
        assert not thread.is_alive()
    finally:
        root.removeHandler(handler)
