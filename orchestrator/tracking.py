"""Weights & Biases as a mirror of the run's record. Whatever happens to it, the run goes on."""

import logging
import math
import os
import time
from typing import Any

import ray
from ray.exceptions import RayError

from configs.run import RunConfig, TrackingConfig
from orchestrator.goodput import StepTimes, account, is_telling
from orchestrator.history import Tail
from orchestrator.launch_spec import LaunchSpec
from orchestrator.ray_calls import answer, beside_me, start_actor
from orchestrator.run_folder import RunFolder
from workers.record import EVENTS, STEPS, LogSegments
from workers.targets_protocol import CACHE, LABELS

_ACCOUNT_EVERY_S = 30.0  # of a million steps it takes most of a second
_TRY_AGAIN_AFTER_S = 60.0

_log = logging.getLogger(__name__)


class TrackingPart:
    """The controller's side: starts the mirror, tells it when to look, never waits for it."""

    def __init__(self, run_url: str, config: RunConfig, spec: LaunchSpec):
        self._actor: Any = None
        if config.tracking.wandb != "off":
            self._actor = start_actor(_Mirror, spec, config, **beside_me(), max_restarts=-1)

    def gauge(self, status: dict[str, Any]) -> None:
        """A new state of things, to be mirrored with the steps since."""
        if self._actor is not None:
            self._actor.mirror.remote(status)

    def finish(self) -> None:
        """Waits a little for the last words; what W&B does not take by then stays in the record."""
        if self._actor is None:
            return
        try:
            answer(self._actor.finish.remote(), timeout_s=20)
        except (RayError, TimeoutError) as error:
            _log.warning("W&B did not finish: %s", error)
        ray.kill(self._actor)


def wandb_mode(config: TrackingConfig, has_key: bool) -> str:
    """`online` or `offline`, from the setting and whether an API key is found."""
    if config.wandb == "auto":
        return "online" if has_key else "offline"
    return config.wandb


class _Mirror:
    """Tails the record into one W&B run, under the run's own id across all restarts.

    Reads nothing as it is made: an actor that fails then is dead for good.
    """

    def __init__(self, spec: LaunchSpec, config: RunConfig):
        logging.getLogger().addHandler(LogSegments(spec.run_url, "wandb"))
        self._folder = RunFolder(spec.storage_url, spec.name)
        self._spec, self._config = spec, config
        self._tail = Tail(spec.run_url, STEPS)
        self._waiting: list[dict[str, Any]] = []
        self._event_tail = Tail(spec.run_url, EVENTS)
        self._events: list[dict[str, Any]] = []
        self._step_times: dict[int, StepTimes] = {}
        self._news, self._accounted_at_s = False, -math.inf
        self._last_step, self._evaluated = 0, set[int]()
        self._run: Any = None
        self._begin_at_s = -math.inf

    def mirror(self, status: dict[str, Any]) -> None:
        if self._run is None:
            self._begin()
        if self._run is None:
            return
        try:
            self._mirror(status)
        except Exception:
            _log.exception("W&B did not take the newest lines; they will be offered again")

    def finish(self) -> None:
        if self._run is None:
            return
        try:
            self._log_goodput()
            self._run.finish()
        except Exception:
            _log.exception("W&B did not take the last lines; they stay in the record")

    def _begin(self) -> None:
        """Takes up where the last mirror ended; if it cannot now, then at a later call."""
        if time.monotonic() < self._begin_at_s:
            return
        try:
            position = self._folder.tracking()
            self._last_step = position["step"]
            self._evaluated = set(position["evaluated"])
            self._run = self._init()
        except Exception:
            again = f"it is tried again after {_TRY_AGAIN_AFTER_S:.0f} s"
            _log.exception("W&B could not be started; the run goes on without it, and %s", again)
            self._begin_at_s = time.monotonic() + _TRY_AGAIN_AFTER_S
            _forget_wandb()

    def _init(self) -> Any:
        import wandb

        tracking = self._config.tracking
        has_key = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
        run = wandb.init(
            id=self._spec.run_id,
            name=self._spec.name,
            resume="allow",
            project=tracking.project,
            entity=tracking.entity,
            config=self._config.model_dump(mode="json"),
            mode=wandb_mode(tracking, has_key),  # pyright: ignore[reportArgumentType]
            dir=self._folder.wandb_dir(),
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        run.define_metric("train/step")
        run.define_metric("*", step_metric="train/step")
        return run

    def _mirror(self, status: dict[str, Any]) -> None:
        lines = self._tail.new()
        self._waiting += lines
        self._note_times(lines)
        events = [event for event in self._event_tail.new() if is_telling(event)]
        self._events += events
        while self._waiting:
            line = self._waiting[0]
            if "loss" in line and line["step"] > self._last_step:
                self._run.log(_train_metrics(line))
                self._last_step = line["step"]
            del self._waiting[0]  # not before W&B has it
        for evaluation in self._folder.evaluations():
            if evaluation["step"] not in self._evaluated:
                self._run.log(_evaluation_metrics(evaluation))
                self._evaluated.add(evaluation["step"])
        replicas = status["teachers"]["replicas"]
        gauges = {f"teachers/{state.lower()}": count for state, count in replicas.items()}
        if gauges:
            for name in ("wanted", "needed"):
                if (count := status["teachers"][name]) is not None:
                    gauges[f"teachers/{name}"] = count
            self._run.log({"train/step": self._last_step, **gauges})
        self._news |= bool(lines or events)
        if time.monotonic() - self._accounted_at_s >= _ACCOUNT_EVERY_S:
            self._log_goodput()
        self._folder.write_tracking({"step": self._last_step, "evaluated": list(self._evaluated)})

    def _note_times(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if "start_step" in line:
                self._step_times.setdefault(line["attempt"], StepTimes(line["start_step"]))
            elif "loss" in line and line["attempt"] in self._step_times:
                # Of the first host, whose segments come in their order.
                self._step_times[line["attempt"]].add(line)

    def _log_goodput(self) -> None:
        if not self._news:
            return
        self._news, self._accounted_at_s = False, time.monotonic()
        ledger = account(self._events, self._step_times, time.time())
        if ledger is not None and ledger.wall_s > 0:
            totals = {f"goodput/{name}_s": each for name, each in ledger.totals_s.items()}
            self._run.log(
                {"train/step": self._last_step, "goodput/share": ledger.goodput, **totals}
            )


def _forget_wandb() -> None:
    """Ends what W&B has begun in this process, or it would say that the run's id is in use."""
    import wandb

    wandb.teardown()


def _train_metrics(line: dict[str, Any]) -> dict[str, float]:
    names = ("step", "loss", "kd_loss", "ce_loss", "lr", "grad_norm", "tokens", "step_s")
    metrics = {f"train/{name}": line[name] for name in names if line[name] is not None}
    stalls = {f"stall/{part}_s": value for part, value in line["stall_s"].items()}
    rate = {"train/tokens_per_s": line["tokens"] / line["step_s"]}
    return {**metrics, **stalls, **rate, **_target_metrics(line)}


def _target_metrics(line: dict[str, Any]) -> dict[str, float]:
    """Where a step's targets are from, and what came from the pool since the step before."""
    if (targets := line.get("targets")) is None:
        return {}
    origins, pool = targets["from"], line["pool"]
    elsewhere = {name: origins.get(name, 0) for name in (CACHE, LABELS)}
    metrics: dict[str, float] = {
        **{f"targets/rows_from_{name}": rows for name, rows in elsewhere.items()},
        "targets/rows_from_pool": sum(origins.values()) - sum(elsewhere.values()),
        "pool/bytes": pool["bytes"],
        "pool/retries": pool["retries"],
        "pool/hedged_rows": pool["hedged"],
        "pool/busy_share": line["teacher_busy_s"] / line["step_s"],
    }
    if pool["fill"] is not None:
        metrics["pool/batch_fill"] = pool["fill"]
        metrics["pool/waiting_rows"] = max(pool["waiting"].values())
    for replica, rows in pool["rows"].items():
        metrics[f"pool/rows_per_s/{replica}"] = rows / line["step_s"]
    return metrics


def _evaluation_metrics(evaluation: dict[str, Any]) -> dict[str, float]:
    names = ("loss", "bits_per_byte", "kl_to_teacher")
    metrics = {f"held_out/{n}": evaluation[n] for n in names if evaluation[n] is not None}
    return {"train/step": evaluation["step"], **metrics}
