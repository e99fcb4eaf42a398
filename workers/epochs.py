"""Which cluster a run belongs to: of several that think so, the one of the newest epoch.

A lease alone cannot tell: who is stopped for a while, or cut off from storage, still believes that
it holds it. So each controller that takes a run up takes a new number first, of which storage gives
each once, and whoever has an older one stops before it writes what counts.
"""

import json

from workers.storage import join, list_names, read_json, write_new

_FOLDER = "epochs"


class SupersededError(RuntimeError):
    """Another cluster has taken the run up meanwhile; this one has to leave it alone."""


def take_epoch(run_url: str, holder: str, address: str) -> int:
    """The number of `holder`'s epoch, a new one unless it has one.

    Args:
        holder: the same for a controller that was restarted.
        address: of its cluster, for whoever is superseded.
    """
    for number in _epochs(run_url):
        if _read(run_url, number)["holder"] == holder:
            return number
    number = newest_epoch(run_url)
    content = json.dumps({"holder": holder, "address": address}).encode()
    while True:
        number += 1
        if write_new(_url(run_url, number), content):
            return number


def newest_epoch(run_url: str) -> int:
    """0 where nobody has taken the run up yet."""
    return max(_epochs(run_url), default=0)


def check_epoch(run_url: str, epoch: int) -> None:
    """Raises SupersededError if there is a newer epoch than `epoch`."""
    if (newest := newest_epoch(run_url)) > epoch:
        address = _read(run_url, newest)["address"]
        raise SupersededError(f"The run was taken up from {address} meanwhile")


def _epochs(run_url: str) -> list[int]:
    names = list_names(join(run_url, _FOLDER))
    return [int(name.removesuffix(".json")) for name in names]


def _read(run_url: str, number: int) -> dict[str, str]:
    return read_json(_url(run_url, number))


def _url(run_url: str, number: int) -> str:
    return join(run_url, _FOLDER, f"{number:08d}.json")
