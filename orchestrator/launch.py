"""From a configuration to a running controller: checks, names, places, one actor."""

import os
import socket
import time
import uuid
import warnings
from typing import Any

import ray
from ray.exceptions import RayActorError

from configs.run import RunConfig
from orchestrator.catalogue import find_checkpoint
from orchestrator.launch_spec import LaunchSpec
from orchestrator.ray_calls import answer, beside_me, start_actor
from orchestrator.run_folder import RunFolder
from orchestrator.run_state import State
from workers.code_identity import code_digest, software
from workers.jobs import Work
from workers.source_files import list_files
from workers.student_host import NAMESPACE, controller_name

_LOCAL_OBJECT_STORE_BYTES = 1 << 30
# An embedded Ray books without counting cores: a laptop runs what it is asked to.
_LOCAL_CPUS = 64
_TRIES = 60


def check_address(address: str | None) -> None:
    """Finds out in seconds what Ray would need minutes for: whether anything is there.

    Raises:
        ValueError: not a cluster's own address, or nothing listens there.
    """
    if address in (None, "auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if "//" in address or not host or not port.isdigit():
        raise ValueError(
            f"--address {address}: should be `auto` or HOST:PORT of the cluster's head, seen from "
            f"one of its machines; from elsewhere `stillhouse submit` takes http://HOST:8265"
        )
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ValueError(_no_cluster(address, str(error))) from error


def _no_cluster(address: str, reason: str) -> str:
    return (
        f"--address {address}: no Ray cluster answers there ({reason}); start one with "
        f"`ray start --head`, or leave --address out to run on this machine"
    )


def connect(address: str | None) -> str:
    """Joins the Ray cluster at `address`, or starts an embedded one that ends with this process.

    Returns:
        The cluster's address.

    Raises:
        ValueError: there is no cluster at that address.
    """
    if ray.is_initialized():
        return ray.get_runtime_context().gcs_address
    common: dict[str, Any] = {
        "namespace": NAMESPACE,
        "log_to_driver": False,
        "logging_level": "ERROR",
    }
    # JAX, which has read the teacher by now, warns of forks; what Ray forks it executes at once.
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning, "subprocess")
    if address is None:
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")
        ray.init(
            address="local",
            num_cpus=_LOCAL_CPUS,
            include_dashboard=False,
            object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
            _system_config={
                # Else it would start a process for each CPU beforehand.
                "prestart_worker_first_driver": False,
                # Else students would give way to every other process of the machine.
                "worker_niceness": 0,
            },
            **common,
        )
    else:
        try:
            ray.init(address=address, **common)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(_no_cluster(address, first)) from error
    return ray.get_runtime_context().gcs_address


def create_run(config: RunConfig, work: Work = "train") -> RunFolder:
    """Settles everything that a new run depends on, and makes its folder.

    Raises:
        ValueError: the name is taken, a checkpoint that it starts from does not fit, or a source
            of text is empty or missing.
        OSError: the storage cannot be written.
    """
    folder = RunFolder.of(config)
    if folder.exists():
        raise ValueError(_taken(folder))
    for source in config.data.sources:
        list_files(source)
    identity: dict[str, Any] = {
        "run_id": f"{config.name}-{uuid.uuid4().hex[:8]}",
        "created_s": time.time(),
        "software": software(),
        "work": work,
        "teacher_url": None,
        "teacher_digest": None,
        "start_url": None,
        "start_step": 0,
    }
    if config.distilled:
        assert config.teacher is not None
        url, entry = find_checkpoint(config.teacher.checkpoint, folder.storage_url)
        _check_teacher(config, url, entry)
        identity |= {"teacher_url": url, "teacher_digest": entry["params_digest"]}
    if config.start_from is not None:
        url, entry = find_checkpoint(config.start_from.checkpoint, folder.storage_url)
        step = entry["step"] if config.start_from.state == "all" else 0
        _check_start(config, url, entry)
        identity |= {"start_url": url, "start_step": step}
    try:
        folder.create(config, identity)
    except FileExistsError as error:  # made by somebody else in this very moment
        raise ValueError(_taken(folder)) from error
    return folder


def start_controller(folder: RunFolder, address: str) -> Any:
    """Starts the controller of a run on the connected cluster, or finds it running.

    Raises:
        ValueError: another controller holds the run's lease.
    """
    identity, config = folder.identity(), folder.config()
    lease = folder.lease()
    if lease is not None and lease["address"] != address:
        raise ValueError(
            f"{folder.name} is being worked on from {lease['address']}; stop it there with "
            f"`stillhouse stop {folder.name}`, or wait 20 s if that cluster is gone"
        )
    spec = LaunchSpec(
        name=folder.name,
        run_id=identity["run_id"],
        storage_url=folder.storage_url,
        run_url=folder.url,
        address=address,
        code=code_digest(),
        replicas=config.teacher.replicas if config.teacher else 0,
        teacher_url=identity["teacher_url"],
        teacher_digest=identity["teacher_digest"],
        start_url=identity["start_url"],
        start_step=identity["start_step"],
        work=identity.get("work", "train"),
    )
    for _ in range(_TRIES):
        controller = _controller(spec)
        try:
            if not State(answer(controller.state.remote())).is_terminal:
                return controller
        except RayActorError:
            pass  # an ended one that was on its way out
        time.sleep(0.5)
    raise ValueError(f"{folder.name}: the last controller does not leave; try again in a minute")


def _controller(spec: LaunchSpec) -> Any:
    from orchestrator.controller_actor import ControllerActor

    return start_actor(
        ControllerActor,
        spec,
        **beside_me(),
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=16,
        name=controller_name(spec.run_id),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
    )


def _taken(folder: RunFolder) -> str:
    status = folder.status() or {}
    state = status.get("state", "unknown")
    if state == "finished":
        hint = f"`stillhouse report {folder.name}` shows it"
    else:
        hint = f"`stillhouse resume {folder.name}` continues it"
    return (
        f"The run {folder.name!r} exists below {folder.storage_url} ({state}): {hint}, "
        f"`stillhouse rm {folder.name}` removes it, `--set name=…` starts another"
    )


def _check_teacher(config: RunConfig, url: str, entry: dict[str, Any]) -> None:
    model = entry["config"]["model"]
    faults = []
    if model["vocab_size"] != config.model.vocab_size:
        faults.append(
            f"it has a vocabulary of {model['vocab_size']}, the student one of "
            f"{config.model.vocab_size} (model.vocab_size)"
        )
    if model["context_length"] < config.data.row_length:
        faults.append(
            f"its context is {model['context_length']} tokens, rows have "
            f"{config.data.row_length} (data.row_length)"
        )
    if faults:
        raise ValueError(f"teacher.checkpoint: {url} does not fit: {'; '.join(faults)}")


def _check_start(config: RunConfig, url: str, entry: dict[str, Any]) -> None:
    if entry["config"]["model"] != config.model.model_dump(mode="json"):
        raise ValueError(
            f"start_from.checkpoint: {url} holds a model of other sizes than `model:` describes"
        )
    if config.start_from is not None and config.start_from.state == "all":
        if not entry["optimizer_digest"]:
            raise ValueError(
                f"start_from.checkpoint: {url} holds weights alone, which no run can go on from: "
                "set start_from.state=weights"
            )
        if entry["step"] >= config.steps:
            raise ValueError(
                f"start_from.checkpoint: {url} is at step {entry['step']}, and steps={config.steps}"
            )
        rows = entry["config"]["batch"]["rows"]
        if rows != config.batch.rows:
            raise ValueError(
                f"start_from.checkpoint: a fork goes on at the same place of the data, so "
                f"batch.rows has to stay {rows}"
            )
