"""Which replica is asked next: the one that will be done first. No Ray, no clock."""

import dataclasses
import threading
import uuid
from collections.abc import Collection, Sequence

# Of a new measurement of a replica's speed, against all those before it.
_NEW_SHARE = 0.2


class ReplicaLoads:
    """What one process has asked of each replica, and how fast it found them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._salt = uuid.uuid4().hex
        self._waiting: dict[str, int] = {}
        self._row_s: dict[str, float] = {}

    def pick(self, replicas: Collection[str], num_rows: int, exclude: Collection[str]) -> str:
        """The replica that would be done first with `num_rows` more rows.

        Those in `exclude` are picked only where there are no others. One whose speed is not known
        yet counts as a typical one.
        """
        assert replicas, "nobody to pick"
        with self._lock:
            known = sorted(self._row_s[name] for name in replicas if name in self._row_s)
            typical_s = known[len(known) // 2] if known else 1.0

            def done_after_s(name: str) -> float:
                rows = self._waiting.get(name, 0) + num_rows
                return rows * self._row_s.get(name, typical_s)

            allowed = [name for name in replicas if name not in exclude] or replicas
            # Hosts that start together should not all begin with the same replica.
            return min(allowed, key=lambda name: (done_after_s(name), hash((name, self._salt))))

    def asked(self, replica: str, num_rows: int) -> None:
        """So many rows are now expected of a replica."""
        with self._lock:
            self._waiting[replica] = self._waiting.get(replica, 0) + num_rows

    def answered(self, replica: str, num_rows: int, busy_s: float) -> None:
        """Rows came, for which the replica's device worked `busy_s`."""
        with self._lock:
            row_s = busy_s / num_rows
            before_s = self._row_s.get(replica, row_s)
            self._row_s[replica] = before_s + _NEW_SHARE * (row_s - before_s)
        self.given_up(replica, num_rows)

    def given_up(self, replica: str, num_rows: int) -> None:
        """Rows are no longer expected of a replica."""
        with self._lock:
            self._waiting[replica] = self._waiting.get(replica, 0) - num_rows
            if self._waiting[replica] <= 0:
                del self._waiting[replica]


class Route:
    """Where a request may go, and where it went. Travels with the request, without its state.

    Args:
        exclude: replicas that are asked only where there are no others.
    """

    def __init__(self, number: int, num_rows: int, exclude: frozenset[str]):
        self.number, self.num_rows, self.exclude = number, num_rows, exclude
        self.tried: list[str] = []

    def __reduce__(self):
        return Route, (self.number, self.num_rows, frozenset())


@dataclasses.dataclass
class Knowledge:
    """What this process knows of a pool's replicas, by Serve application."""

    loads: ReplicaLoads = dataclasses.field(default_factory=ReplicaLoads)
    replicas: frozenset[str] = frozenset()


def knowledge_of(apps: Sequence[str]) -> list[Knowledge]:
    """This process's knowledge of the applications of one pool, whose loads are compared."""
    known = [knowledge(app) for app in apps]
    for other in known[1:]:
        other.loads = known[0].loads
    return known


_lock = threading.Lock()
_known: dict[str, Knowledge] = {}


def knowledge(app: str) -> Knowledge:
    """This process's knowledge of the application `app`."""
    with _lock:
        return _known.setdefault(app, Knowledge())
