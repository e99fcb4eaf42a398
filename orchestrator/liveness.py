"""Whether a controller works on a run, seen by a lease that changes.

Clocks of two machines may be minutes apart, so a lease that looks old is watched before its run
counts as left: what removes something waits until that is certain.
"""

import time
from collections.abc import Callable, Sequence

from orchestrator.run_folder import LEASE_EXPIRY_S, LEASE_RENEWAL_S, RunFolder

LOOK_EVERY_S = 0.5
# Long enough for a controller whose storage answers; for what is only shown.
SHORTLY_S = 2 * LEASE_RENEWAL_S + 1.0


def under_way(folder: RunFolder, waits: Callable[[], None] = lambda: None) -> bool:
    """Whether a controller works on the run, for certain.

    Args:
        waits: called if this takes longer than a controller needs to renew its lease.
    """
    return bool(_renewed([folder], LEASE_EXPIRY_S, waits))


def seen_alive(folders: Sequence[RunFolder], within_s: float = SHORTLY_S) -> set[str]:
    """Names of the runs that a controller works on, as far as it shows within some time.

    A lease that is young by this machine's clock is believed.
    """
    young = {folder.name for folder in folders if folder.lease() is not None}
    return young | _renewed([each for each in folders if each.name not in young], within_s)


def _renewed(
    folders: Sequence[RunFolder], within_s: float, waits: Callable[[], None] = lambda: None
) -> set[str]:
    """Those whose lease changes within some time."""
    before = {folder.name: folder.last_lease() for folder in folders}
    open_ones = [folder for folder in folders if before[folder.name] is not None]
    renewed: set[str] = set()
    began, told = time.monotonic(), False
    while open_ones and time.monotonic() - began <= within_s:
        time.sleep(LOOK_EVERY_S)
        now = {folder.name: folder.last_lease() for folder in open_ones}
        renewed |= {name for name, lease in now.items() if lease not in (None, before[name])}
        open_ones = [f for f in open_ones if now[f.name] == before[f.name]]
        if open_ones and not told and time.monotonic() - began > SHORTLY_S:
            told = True
            waits()
    return renewed
