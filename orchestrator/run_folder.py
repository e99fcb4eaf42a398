"""Where everything of a run lies, below one storage path."""

import errno
import json
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import yaml

from configs.load import parse_run
from configs.run import RunConfig
from workers.epochs import IDENTITY, newest_epoch, note_removal
from workers.storage import (
    exists,
    is_local,
    join,
    list_names,
    read_bytes,
    read_json,
    remove_tree,
    write_atomic,
    write_json,
    write_new,
)

LEASE_RENEWAL_S = 3.0
LEASE_EXPIRY_S = 20.0


def absolute(storage: str) -> str:
    """A storage path that means the same in every process: local ones become absolute."""
    return str(Path(storage).expanduser().resolve()) if is_local(storage) else storage


class RunFolder:
    """The files of one run. Reads and writes plain data; knows no Ray."""

    def __init__(self, storage_url: str, name: str):
        self.storage_url = storage_url
        self.name = name
        self.url = join(storage_url, "runs", name)

    @classmethod
    def of(cls, config: RunConfig) -> "RunFolder":
        """The place of a run."""
        return cls(absolute(config.storage), config.name)

    def exists(self) -> bool:
        return exists(join(self.url, IDENTITY))

    def create(self, config: RunConfig, identity: dict[str, Any]) -> None:
        """Makes the run: of several that try at once, one does.

        Raises:
            FileExistsError: there is a run of this name.
        """
        # One file has all that makes a run, and `config.yaml` is a copy that may change.
        values = {**identity, "config": config.model_dump(mode="json")}
        if not write_new(join(self.url, IDENTITY), json.dumps(values, indent=2).encode()):
            raise FileExistsError(errno.EEXIST, "There is a run of this name", self.url)
        for name in list_names(self.url):  # what a removal that was cut off has left
            if name != IDENTITY:
                remove_tree(join(self.url, name))
        self.write_config(config)

    def write_config(self, config: RunConfig) -> None:
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        write_atomic(join(self.url, "config.yaml"), text.encode())

    def config(self) -> RunConfig:
        """The run's resolved configuration. Raises ConfigError if it no longer fits."""
        url = join(self.url, "config.yaml")
        try:
            values = yaml.safe_load(read_bytes(url))
        except FileNotFoundError:  # who made the run was cut off before the copy
            url = join(self.url, IDENTITY)
            values = read_json(url)["config"]
        return parse_run(values, url)

    def identity(self) -> dict[str, Any]:
        """`run_id`, what it was resolved to, when and by which code it was made."""
        values = read_json(join(self.url, IDENTITY))
        return {name: value for name, value in values.items() if name != "config"}

    def write_identity(self, identity: dict[str, Any]) -> None:
        config = read_json(join(self.url, IDENTITY))["config"]
        write_json(join(self.url, IDENTITY), {**identity, "config": config})

    def check_writable(self) -> None:
        """Raises OSError that says why, where nothing can be written."""
        url = join(self.url, "writable.txt")
        write_atomic(url, b"x" * 4096)
        remove_tree(url)

    def remove(self) -> None:
        """Removes the run; a controller that still works on it finds out."""
        if (values := self._read(IDENTITY)) is not None:
            note_removal(self.url, values["run_id"])
        remove_tree(self.url)

    def remove_unused(self, run_id: str) -> None:
        """Removes the run if it is the one of this id, and no controller has taken it up."""
        values = self._read(IDENTITY)
        if values is not None and values["run_id"] == run_id and not newest_epoch(self.url):
            self.remove()

    # What the controller remembers, and what it shows.

    def snapshot(self) -> dict[str, Any] | None:
        return self._read("controller.json")

    def write_snapshot(self, values: dict[str, Any]) -> None:
        write_json(join(self.url, "controller.json"), values)

    def status(self) -> dict[str, Any] | None:
        return self._read("status.json")

    def write_status(self, values: dict[str, Any]) -> None:
        write_json(join(self.url, "status.json"), values)

    def finish(self, attempt: int) -> dict[str, Any] | None:
        """How an attempt ended by itself; None if it did not."""
        return self._read(f"attempts/{attempt:04d}.json")

    def evaluations(self) -> list[dict[str, Any]]:
        """All evaluations of the run, by step."""
        folder = join(self.url, "evaluations")
        return [read_json(join(folder, name)) for name in list_names(folder)]

    def write_evaluation(self, evaluation: dict[str, Any]) -> None:
        write_json(join(self.url, "evaluations", f"{evaluation['step']:08d}.json"), evaluation)

    def targets(self) -> dict[str, Any] | None:
        """The key of the run's stored targets, and when an attempt last began to use it."""
        return self._read("targets.json")

    def tracking(self) -> dict[str, Any]:
        """How far the W&B mirror has come."""
        return self._read("tracking.json") or {"step": 0, "evaluated": []}

    def write_tracking(self, values: dict[str, Any]) -> None:
        write_json(join(self.url, "tracking.json"), values)

    def wandb_dir(self) -> str:
        """Local folder for W&B's files: the run's own, or scratch where that is not local."""
        path = Path(self.url) / "wandb" if is_local(self.url) else Path(tempfile.mkdtemp())
        path.mkdir(parents=True, exist_ok=True)
        return str(path)

    # The lease: at most one controller anywhere works on a run.

    def last_lease(self) -> dict[str, Any] | None:
        """The lease as it was last renewed, however long ago; None once it is released."""
        return self._read("lease.json")

    def lease(self) -> dict[str, Any] | None:
        """The lease if it is young by this machine's clock, else None; see `liveness`."""
        lease = self.last_lease()
        if lease is None or time.time() - lease["renewed_s"] > LEASE_EXPIRY_S:
            return None
        return lease

    def lease_age_s(self) -> float | None:
        """Seconds since a controller renewed the lease, held or not; None once it is released."""
        lease = self.last_lease()
        return None if lease is None else max(0.0, time.time() - lease["renewed_s"])

    def write_lease(self, holder: str, address: str) -> None:
        lease = {"holder": holder, "address": address, "renewed_s": time.time()}
        write_json(join(self.url, "lease.json"), lease)

    def release_lease(self) -> None:
        remove_tree(join(self.url, "lease.json"))

    # Commands: written by any terminal, taken by the controller.

    def send(self, command: dict[str, Any]) -> str:
        """Leaves a command for the controller; returns its name."""
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.json"
        write_json(join(self.url, "commands", name), command)
        return name

    def commands(self) -> list[tuple[str, dict[str, Any]]]:
        """(name, command) of those that wait, oldest first."""
        folder = join(self.url, "commands")
        return [(name, read_json(join(folder, name))) for name in list_names(folder)]

    def take(self, name: str) -> None:
        remove_tree(join(self.url, "commands", name))

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            return read_json(join(self.url, name))
        except FileNotFoundError:
            return None


def list_runs(storage_url: str) -> list[RunFolder]:
    """The runs below a storage path, by name."""
    folders = (RunFolder(storage_url, name) for name in list_names(join(storage_url, "runs")))
    return [folder for folder in folders if folder.exists()]
