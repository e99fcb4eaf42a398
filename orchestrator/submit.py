"""`stillhouse submit`: a run as a Ray job, which outlives the terminal."""

import asyncio
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console

from configs.load import load_config
from workers.storage import is_local

# Ray's words for it, after it has waited a while itself.
_NOBODY_THERE = "No available agent to submit job"


def submit_run(
    source: str,
    settings: tuple[str, ...],
    address: str,
    working_dir: str,
    runtime_env: dict[str, Any],
    wait: bool,
    console: Console,
) -> int:
    """Submits `python -m orchestrator run …` and, with `wait`, shows its output to the end.

    `source` is a preset, or a file below `working_dir`, named as it is from there.

    Raises:
        ConfigError: the configuration is faulty; nothing is submitted.
        ValueError: the run's storage is a relative path.
        ConnectionError: no cluster answers at `address`.
    """
    storage = load_config(source, settings).storage
    if is_local(storage) and not Path(storage).expanduser().is_absolute():
        raise ValueError(
            f"storage: {storage!r} would lie in the job's copy of the working directory, which the "
            f"cluster throws away; give an absolute path or a URL that all of its machines reach"
        )
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(address)
    command = ["python", "-m", "orchestrator", "run", source, "--address", "auto"]
    for setting in settings:
        command += ["--set", setting]
    environment = {"excludes": ["/.venv", "/.git", "/stillhouse-runs"], **runtime_env}
    job = _submit(
        client,
        entrypoint=shlex.join(command),
        runtime_env={"working_dir": working_dir, **environment},
    )
    console.print(
        f"Job {job}: `ray job logs {job} --address {address}` shows it, "
        f"`ray job stop {job} --address {address}` lets it save and stop",
        highlight=False,
        soft_wrap=True,
    )
    if not wait:
        return 0

    async def show() -> None:
        async for text in client.tail_job_logs(job):
            console.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    asyncio.run(show())
    return 0 if str(client.get_job_status(job)) == "SUCCEEDED" else 1


def _submit(client: Any, **job: Any) -> str:
    """The name of the job."""
    try:
        return client.submit_job(**job)
    except RuntimeError as error:
        if _NOBODY_THERE not in str(error):
            raise
        raise ConnectionError(
            "The cluster takes no job: its head has no agent. One that has just started may need "
            "some seconds more; if it stays so, another Ray on the head's machine has taken the "
            "agent's port (see dashboard_agent.log there, and --dashboard-agent-listen-port)"
        ) from error
