"""What the controller drives, each part behind `start`, `poll` and `kill` that return at once."""

import os
import shutil
import tempfile
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from configs.elastic import on_slices
from configs.run import RunConfig
from orchestrator import run_state
from orchestrator.attempt import attempt_name, remove_leftover_placement_groups, start_attempt
from orchestrator.catalogue import checkpoint_url
from orchestrator.fault_policy import DRIVER_DIED, Failure
from orchestrator.launch_spec import LaunchSpec
from orchestrator.ray_calls import answer, is_ready, start_actor
from orchestrator.run_folder import RunFolder
from orchestrator.run_pool import pool_apps
from workers.epochs import Epoch
from workers.evaluator_actor import EvaluatorActor
from workers.integrity import CorruptOwnCheckpointError
from workers.jobs import EvaluationJob, StartPoint, StudentJob
from workers.memory_tier import newest_complete
from workers.preparer_actor import PreparerActor
from workers.snapshot_keeper import drop_keepers, held_by_keepers
from workers.storage import join
from workers.student_host import NAMESPACE

MAX_PREPARER_DEATHS = 3
_CPU = {"env_vars": {"JAX_PLATFORMS": "cpu"}}


class PreparationPart:
    """Tokenizer and rows, made by a task on some node."""

    def __init__(self, spec: LaunchSpec, config: RunConfig):
        self._spec, self._config = spec, config
        self._actor: Any = None
        self._result: Any = None
        self._progress: Any = None
        self._last: dict[str, Any] | None = None
        self._num_deaths = 0

    def start(self) -> None:
        self._actor = start_actor(PreparerActor, num_cpus=0, max_concurrency=2, runtime_env=_CPU)
        spec, config = self._spec, self._config
        places = spec.storage_url, spec.run_url, spec.teacher_url
        self._result = self._actor.prepare.remote(config.data, config.model.vocab_size, *places)

    def poll(self) -> list[run_state.Event]:
        if self._result is None or not is_ready(self._result):
            return []
        try:
            facts = answer(self._result)
        except RayTaskError as error:
            return [run_state.Broken(str(error.cause))]
        except RayActorError as error:
            self._num_deaths += 1
            if self._num_deaths > MAX_PREPARER_DEATHS:
                return [
                    run_state.Broken(f"The process that makes tokenizer and rows died: {error}")
                ]
            self.start()  # what it had made is found again
            return []
        self.kill()
        return [run_state.Prepared(facts)]

    def progress(self) -> dict[str, Any] | None:
        """What is being made, and how far it is; None when nothing is."""
        if self._actor is None:
            return None
        if self._progress is None:
            self._progress = self._actor.progress.remote()
        elif is_ready(self._progress):
            try:
                self._last = answer(self._progress)
            except RayError:
                self._last = None
            self._progress = None
        return self._last

    def kill(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor)
        self._actor = self._result = self._progress = self._last = None


class AttemptPart:
    """The gang of students, behind the actor that drives it."""

    def __init__(self, spec: LaunchSpec, config: RunConfig):
        self._spec, self._config = spec, config
        self._folder = RunFolder(spec.storage_url, spec.name)
        self._driver: Any = None
        self._outcome: Any = None

    def start(
        self,
        action: run_state.StartAttempt,
        facts: dict[str, Any],
        known: run_state.Snapshot,
        epoch: Epoch,
    ) -> None:
        """Launches an attempt from the newest snapshot or checkpoint, or where the run begins."""
        if _is_there(attempt_name(self._spec.run_id, action.attempt - 1)):
            self.kill(action.attempt - 1)  # a controller that died may not have come to it
        job = StudentJob(
            config=on_slices(self._config, action.num_slices),
            storage_url=self._spec.storage_url,
            run_url=self._spec.run_url,
            attempt=action.attempt,
            epoch=epoch,
            start=self._start_point(known.steps),
            dataset_digest=facts["dataset_digest"],
            tokenizer_digest=facts["tokenizer_digest"],
            teacher_digest=self._spec.teacher_digest,
            teacher_url=self._spec.teacher_url,
            work=self._spec.work,
            skip_steps=known.skip_steps,
        )
        payload = {
            "job": job,
            "run_id": self._spec.run_id,
            "apps": pool_apps(self._spec, self._config),
            "code": self._spec.code,
        }
        self._driver = start_attempt(self._spec.run_id, action.attempt, payload, self._scratch())
        self._outcome = None

    def poll(self, attempt: int) -> list[run_state.Event]:
        name = attempt_name(self._spec.run_id, attempt)
        try:
            if self._driver is None:
                self._driver = ray.get_actor(name, NAMESPACE)
            if self._outcome is None:
                self._outcome = self._driver.outcome.remote()
            if not is_ready(self._outcome):
                return []
            ended, failures = answer(self._outcome)
            self._outcome = None
        except ActorUnavailableError:
            self._outcome = None  # it may be back; if not, the watchdog ends what is left
            return []
        except (RayActorError, ValueError) as error:
            ended = True
            why = next(iter(str(error).splitlines()), "")
            message = f"The actor that drives the students is gone: {why}"
            failures = (Failure(None, (DRIVER_DIED,), message),)
        if not ended:
            return []
        finish = self._folder.finish(attempt)
        self.kill(attempt)
        if finish is not None:
            return [
                run_state.AttemptFinished(
                    attempt, finish["step"], finish["digest"], finish["stopped"]
                )
            ]
        if not failures:
            failures = (Failure(None, (), "The students ended without a result"),)
        return [run_state.AttemptFailed(attempt, failures)]

    def kill(self, attempt: int) -> None:
        """Ends the attempt's actor, and with it the gang, and frees what it had reserved."""
        try:
            driver = ray.get_actor(attempt_name(self._spec.run_id, attempt), NAMESPACE)
        except ValueError:
            pass  # it is gone already
        else:
            ray.kill(driver)
        remove_leftover_placement_groups()
        shutil.rmtree(self._scratch(), ignore_errors=True)
        self._driver = self._outcome = None

    def drop_snapshots(self) -> None:
        """Forgets what is in memory outside the gang."""
        drop_keepers(self._spec.run_id)

    def _start_point(self, steps: tuple[int, ...]) -> StartPoint:
        saved = max(steps, default=0)
        source = newest_complete(held_by_keepers(self._spec.run_id))
        if source is not None and source.step > saved:
            begun = self._spec.start_step if self._starts_with_state() else 0
            return StartPoint("resume", None, source.step, source, max(steps, default=begun))
        if steps:
            step = max(steps)
            url = checkpoint_url(self._spec.run_url, step)
            return StartPoint("resume", url, step)
        if self._config.start_from is None:
            return StartPoint("fresh")
        if self._starts_with_state():
            return StartPoint("fork", self._spec.start_url, self._spec.start_step)
        return StartPoint("weights", self._spec.start_url)

    def _starts_with_state(self) -> bool:
        return self._config.start_from is not None and self._config.start_from.state == "all"

    def _scratch(self) -> str:
        """Ray Train keeps a registry of its own; nothing in it has to survive."""
        return os.path.join(tempfile.gettempdir(), f"stillhouse-train-{self._spec.run_id}")


class EvaluationPart:
    """The evaluation actor, kept from one checkpoint to the next."""

    def __init__(self, spec: LaunchSpec, config: RunConfig):
        self._spec, self._config = spec, config
        self._folder = RunFolder(spec.storage_url, spec.name)
        self._actor: Any = None
        self._result: Any = None
        self._step = 0

    def start(self, step: int, facts: dict[str, Any]) -> None:
        if self._actor is None:
            self._actor = self._start_actor(facts)
        url = checkpoint_url(self._spec.run_url, step)
        self._step = step
        self._result = self._actor.evaluate.remote(url)

    def poll(self) -> list[run_state.Event]:
        if self._result is None or not is_ready(self._result):
            return []
        try:
            evaluation = answer(self._result)
        except RayTaskError as error:
            self._result = None
            corrupt = isinstance(error.cause, CorruptOwnCheckpointError)
            away = isinstance(error.cause, OSError)
            message = str(error.cause)
            return [run_state.EvaluationFailed(self._step, message, retry=away, corrupt=corrupt)]
        except RayError as error:
            self._actor = self._result = None
            return [run_state.EvaluationFailed(self._step, str(error), retry=True)]
        self._folder.write_evaluation(evaluation)
        self._result = None
        return [run_state.Evaluated(self._step, evaluation["bits_per_byte"])]

    def kill(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor)
        self._actor = self._result = None

    def _start_actor(self, facts: dict[str, Any]) -> Any:
        job = EvaluationJob(
            storage_url=self._spec.storage_url,
            dataset_digest=facts["dataset_digest"],
            tokenizer_url=join(self._spec.run_url, "tokenizer.model"),
            max_rows=self._config.data.held_out_rows,
            rows_per_batch=self._config.evaluation.rows_per_batch,
            compute_dtype=self._config.compute_dtype,
            teacher_url=self._spec.teacher_url if self._config.evaluation.kl_to_teacher else None,
        )
        return start_actor(
            EvaluatorActor,
            *(job, self._spec.run_url, self._spec.code),
            num_cpus=self._config.evaluation.cpus,
            runtime_env=_CPU,
        )


def _is_there(actor: str) -> bool:
    try:
        ray.get_actor(actor, NAMESPACE)
    except ValueError:
        return False
    return True
