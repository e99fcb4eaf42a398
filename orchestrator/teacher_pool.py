"""A pool of teachers, as a Ray Serve application of its own."""

import threading
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import ProxyLocation, RequestRouterConfig
from ray.serve.schema import ApplicationStatus

from configs.run import TeacherConfig
from workers.jobs import TeacherJob
from workers.serve_teacher import DEPLOYMENT, TeacherReplica
from workers.teacher_router import TeacherRouter

_TRIES = 10
# A replica that is to go answers what it was asked for so long at most. That comes off the notice
# of 30 s or so that a cloud gives, in which another replica has to start.
_ANSWERS_TO_THE_END_S = 10.0
_SERVING = ("RUNNING", "PENDING_MIGRATION")
# Serve registers modules while it takes in a deployment, which two threads must not do at once.
_deploying = threading.Lock()


def num_serving(states: Mapping[str, int]) -> int:
    """Of replicas by state. One that waits for its substitute, as its node is to go, serves."""
    return sum(states.get(state, 0) for state in _SERVING)


class TeacherPool:
    """Deploys, scales and removes the replicas; only `remove` waits.

    Args:
        folder_url: whose events and logs the replicas write.
        code: digest of the sources that they have to run.
    """

    def __init__(
        self,
        app: str,
        job: TeacherJob,
        folder_url: str,
        code: str,
        replica: type[TeacherReplica] = TeacherReplica,
    ):
        self._replica = replica
        self._app, self._job, self._folder_url, self._code = app, job, folder_url, code
        self._lock = threading.Lock()
        self._wanted = 0
        self._removed = False
        self._failure: str | None = None

    def scale(self, replicas: int) -> None:
        """Asks for so many replicas; those that run go on running."""
        self._wanted = replicas
        threading.Thread(target=self._apply, name="teacher-pool", daemon=True).start()

    def failure(self) -> str | None:
        """Why the pool cannot serve at all, as far as it is known."""
        return self._failure

    def status(self) -> dict[str, int]:
        """Replicas by state, such as RUNNING or STARTING; {} where there is no pool."""
        try:
            application = serve.status().applications.get(self._app)
        except RayError:
            return {}  # Serve's controller is on its way back
        if application is None or DEPLOYMENT not in application.deployments:
            return {}
        deployment = application.deployments[DEPLOYMENT]
        if application.status == ApplicationStatus.DEPLOY_FAILED:
            self._failure = f"The teachers cannot be served: {deployment.message}"
        states = deployment.replica_states
        return {str(getattr(state, "value", state)): count for state, count in states.items()}

    def serving(self) -> int:
        """How many replicas serve."""
        return num_serving(self.status())

    def remove(self) -> None:
        """Takes the application down and returns when it is gone."""
        with self._lock:
            self._removed = True
            if self._app in serve.status().applications:
                serve.delete(self._app)

    def _apply(self) -> None:
        with self._lock:
            if self._removed:
                return
            for _ in range(_TRIES):
                try:
                    if self._app in serve.status().applications:
                        self._set_replicas(self._wanted)
                    else:
                        with _deploying:
                            self._deploy(self._wanted)
                    return
                except RayError as error:  # Serve's controller may be on its way back
                    reason: Exception = error
                    time.sleep(1)
                except Exception as error:
                    reason = error
                    break
            self._failure = f"The teachers cannot be served: {reason}"

    def _deploy(self, replicas: int) -> None:
        serve.start(proxy_location=ProxyLocation.Disabled)
        target = serve.RunTarget(
            self._application(replicas),
            name=self._app,
            route_prefix=None,
            external_scaler_enabled=True,
        )
        # Not until they run: there may be no room for them, and the run may want to stop.
        serve.run_many([target], wait_for_applications_running=False)

    def _set_replicas(self, replicas: int) -> None:
        """What Serve's own scaling endpoint does. Deploying anew would restart every replica."""
        from ray.serve._private.common import DeploymentID
        from ray.serve.context import _get_global_client

        client = _get_global_client()
        assert client is not None, "the application is up"
        deployment = DeploymentID(name=DEPLOYMENT, app_name=self._app)
        ray.get(client._controller.update_deployment_replicas.remote(deployment, replicas))

    def _application(self, replicas: int) -> Any:
        config: TeacherConfig = self._job.config
        deployment = serve.deployment(
            name=DEPLOYMENT,
            num_replicas=replicas,
            request_router_config=RequestRouterConfig(
                request_router_class=TeacherRouter  # pyright: ignore[reportArgumentType]
            ),
            # Enough for every student host to have all its prefetched steps asked for.
            max_ongoing_requests=1024,
            ray_actor_options=_actor_options(config, self._job.not_on),
            health_check_period_s=5,
            # A replica that says nothing at all is replaced after the third time.
            health_check_timeout_s=min(max(config.answer_within_s, 2.0), 10.0),
            graceful_shutdown_timeout_s=min(config.answer_within_s, _ANSWERS_TO_THE_END_S),
            graceful_shutdown_wait_loop_s=0.2,
        )(self._replica)
        return deployment.bind(self._job, self._folder_url, self._code)


def _actor_options(config: TeacherConfig, not_on: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": config.cpus_per_replica}
    if not_on is not None:
        # A slice that students have lost for a moment must be free when they come back.
        options["label_selector"] = {"ray.io/tpu-pod-type": f"!{not_on}"}
    if config.tpus_per_replica:
        return {**options, "resources": {"TPU": config.tpus_per_replica}}
    if config.gpus_per_replica:
        return {**options, "num_gpus": config.gpus_per_replica}
    return {**options, "runtime_env": {"env_vars": {"JAX_PLATFORMS": "cpu"}}}
