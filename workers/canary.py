"""The proof that copies of a teacher are alike: each makes the same of a fixed batch of rows."""

import hashlib
import json
from typing import Protocol

from workers.storage import join, read_json, write_new
from workers.targets_protocol import WrongTeacherError


class Examined(Protocol):
    """A copy of a teacher."""

    @property
    def sameness(self) -> str: ...

    @property
    def serves(self) -> str:
        """Teacher and codec."""
        ...

    def canary(self) -> str:
        """The digest of what it makes of the fixed batch."""
        ...


def examine(teacher: Examined, replica: str, storage_url: str) -> None:
    """Compares a copy with the first of its class that served from this storage.

    Raises:
        WrongTeacherError: it differs.
    """
    found = teacher.canary()
    name = hashlib.sha256(f"{teacher.serves}\n{teacher.sameness}".encode()).hexdigest()[:16]
    url = join(storage_url, "canaries", f"{name}.json")
    told = {"digest": found, "of": teacher.serves, "sameness": teacher.sameness}
    write_new(url, json.dumps({**told, "replica": replica}).encode())
    first = read_json(url)
    if first["digest"] != found:
        raise WrongTeacherError(
            f"Replica {replica} makes {found} of the canary rows, and {first['replica']} made "
            f"{first['digest']} of them, with {teacher.serves} and the class "
            f"{teacher.sameness!r}: one of the two machines computes wrongly (if it was the "
            f"first, remove {url})"
        )
