"""Which controller a run belongs to: of several that think so, the one of the newest epoch.

A lease alone cannot tell: who is stopped for a while, or cut off from storage, still believes that
it holds it. So each controller that takes a run up takes a new number first, of which storage gives
each once, and whoever has an older one stops before it writes what counts.

An epoch is one of a run, not of a name: whoever worked on a run that was removed has none in the
run that has its name now. A folder that does not show its run says nothing at all, since a mount
that is missing for a moment looks so; that a run was removed stands outside its folder.
"""

import json
import time
from typing import NamedTuple

from workers.storage import exists, join, list_names, read_json, write_json, write_new

IDENTITY = "run.json"
_FOLDER = "epochs"


class Epoch(NamedTuple):
    """A claim to a run."""

    run_id: str
    number: int


class SupersededError(RuntimeError):
    """The run is another controller's by now, or is gone; this one has to leave it alone."""


def take_epoch(run_url: str, run_id: str, holder: str, address: str) -> Epoch:
    """The epoch of `holder`, a new one unless it has one.

    Args:
        holder: the same for a controller that was restarted.
        address: of its cluster, for whoever is superseded.
    """
    for number in reversed(_numbers(run_url)):
        if _read(run_url, number)["holder"] == holder:
            return Epoch(run_id, number)
    number = newest_epoch(run_url)
    content = json.dumps({"holder": holder, "address": address}).encode()
    while True:
        number += 1
        # An object store may have made the file though it says that there was one: its client asks
        # again where the first answer was lost.
        if write_new(_url(run_url, number), content) or _read(run_url, number)["holder"] == holder:
            return Epoch(run_id, number)


def newest_epoch(run_url: str) -> int:
    """0 where nobody has taken the run up yet."""
    return max(_numbers(run_url), default=0)


def check_epoch(run_url: str, epoch: Epoch) -> None:
    """Looks whether an epoch is still the one that counts.

    Raises:
        SupersededError: there is a newer one, the name is another run's, or the run was removed.
        OSError: storage does not show the run.
    """
    try:
        run_id = read_json(join(run_url, IDENTITY))["run_id"]
    except FileNotFoundError as error:
        if exists(_removal_url(run_url, epoch.run_id)):
            raise SupersededError("The run was removed meanwhile") from error
        raise
    if run_id != epoch.run_id:
        raise SupersededError(f"The run was removed meanwhile; its name is that of {run_id} now")
    if (newest := newest_epoch(run_url)) > epoch.number:
        address = _read(run_url, newest)["address"]
        raise SupersededError(f"The run was taken up from {address} meanwhile")


def note_removal(run_url: str, run_id: str) -> None:
    """Says, to whoever still works on a run, that it is about to be removed."""
    write_json(_removal_url(run_url, run_id), {"removed_s": time.time()})


def _removal_url(run_url: str, run_id: str) -> str:
    storage_url = run_url.rsplit("/", 2)[0]
    return join(storage_url, "removed", f"{run_id}.json")


def _numbers(run_url: str) -> list[int]:
    names = list_names(join(run_url, _FOLDER))
    return [int(name.removesuffix(".json")) for name in names]


def _read(run_url: str, number: int) -> dict[str, str]:
    return read_json(_url(run_url, number))


def _url(run_url: str, number: int) -> str:
    return join(run_url, _FOLDER, f"{number:08d}.json")
