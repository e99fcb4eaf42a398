"""Who uses a shared pool of teachers, and how many replicas that takes: no clock, no effects."""

from typing import Any, NamedTuple

from configs.fault import shown
from configs.run import RunConfig
from orchestrator.launch_spec import LaunchSpec

# More than a controller needs to be back, wherever it restarts: its students go on meanwhile.
MEMBER_EXPIRY_S = 120.0
# The next run of a series finds the teachers still there.
STAY_S = 10.0

# Settings of a teacher in which replicas differ; the others are the student's own affair.
_REPLICA_SETTINGS = (
    "rows_per_batch",
    "cpus_per_replica",
    "tpus_per_replica",
    "gpus_per_replica",
    "answer_within_s",
)


def needs_of(spec: LaunchSpec, config: RunConfig) -> dict[str, Any]:
    """What a run needs its replicas to be, by setting: plain values, which any version can read."""
    teacher = config.teacher
    assert teacher is not None, "a distilled run"
    codec = {f"teacher.codec.{name}": value for name, value in teacher.codec.model_dump().items()}
    return {
        "Stillhouse sources": spec.code,
        "storage": spec.storage_url,
        "teacher.checkpoint": spec.teacher_digest,
        **codec,
        "data.row_length": config.data.row_length,
        "compute_dtype": config.compute_dtype,
        **{f"teacher.{name}": getattr(teacher, name) for name in _REPLICA_SETTINGS},
        "teacher.groups": [group.model_dump() for group in teacher.groups],
    }


class _Member(NamedTuple):
    replicas: int
    seen_s: float


class Members:
    """The runs that use a pool, as they make themselves seen.

    The pool has the sum of the replicas that they ask for. The rows of all are scored in equal
    shares, so that beside others of its size a run is served no worse than by a pool of its own,
    and better while others rest; whoever asks for more than others leaves them some of it.

    Args:
        pool: its name.
        serves: what its replicas are, as `needs_of` tells it.
        now_s: when this began, by the clock of all the calls.
        taken_up: whether the pool was there before, so that there may be members unknown here.
    """

    def __init__(self, pool: str, serves: dict[str, Any], now_s: float, *, taken_up: bool):
        self._pool, self._serves = pool, serves
        self._members: dict[str, _Member] = {}
        self._gathered_s = now_s + MEMBER_EXPIRY_S if taken_up else now_s
        self._empty_since_s = now_s

    def __len__(self) -> int:
        return len(self._members)

    @property
    def replicas(self) -> int:
        """How many replicas the members ask for together."""
        return sum(member.replicas for member in self._members.values())

    def is_gathering(self, now_s: float) -> bool:
        """Whether there may be members from before that have not been seen yet."""
        return now_s < self._gathered_s

    def is_over(self, now_s: float) -> bool:
        """Whether nobody has used the pool for a while."""
        stays_until_s = max(self._gathered_s, self._empty_since_s + STAY_S)
        return not self._members and now_s >= stays_until_s

    def refusal(self, needs: dict[str, Any]) -> str | None:
        """Why a run does not fit what the pool serves; None if it does."""
        for name in {**self._serves, **needs}:
            has, wants = self._serves.get(name), needs.get(name)
            if has != wants:
                return (
                    f"teacher.pool: the pool {self._pool!r} serves runs with {name} {shown(has)}, "
                    f"and this one has {shown(wants)}; name another pool, or set null for one of "
                    "the run's own"
                )
        return None

    def see(self, run: str, replicas: int, now_s: float) -> bool:
        """A run that fits shows itself and the replicas it asks for; whether that is news."""
        before = self._members.get(run)
        self._members[run] = _Member(replicas, now_s)
        return before is None or before.replicas != replicas

    def leave(self, run: str, now_s: float) -> bool:
        """A run needs the pool no more; whether it was a member."""
        if self._members.pop(run, None) is None:
            return False
        self._empty_since_s = now_s
        return True

    def drop_unseen(self, now_s: float) -> list[str]:
        """Drops the members that have not been seen for too long; their names."""
        unseen = [
            run for run, member in self._members.items() if now_s - member.seen_s >= MEMBER_EXPIRY_S
        ]
        for run in unseen:
            self.leave(run, now_s)
        return unseen
