"""A run that is watched from a terminal: the first Ctrl-C asks it to stop, the second leaves."""

import io
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from configs.load import parse_run
from orchestrator.follow import follow
from orchestrator.run_folder import RunFolder
from tests.helpers.runs import tiny_values


@pytest.mark.shows("ctrl-c-twice")
def test_ctrl_c_asks_to_stop_and_once_more_leaves(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "run")
    folder.create(parse_run(tiny_values(tmp_path, "run"), "test"), {"run_id": "run-1"})
    folder.write_lease("someone", "here:1")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    shown = io.StringIO()

    def interrupt_twice() -> None:
        while "waiting" not in shown.getvalue():  # its handlers are there
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        while not folder.commands():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    terminal = threading.Thread(target=interrupt_twice)
    terminal.start()
    with pytest.raises(KeyboardInterrupt):
        follow(folder, Console(file=shown, force_terminal=True, width=200))
    terminal.join()
    assert [command for _, command in folder.commands()] == [{"kind": "stop"}]
    assert "once more leaves at once" in shown.getvalue()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
