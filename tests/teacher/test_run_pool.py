"""What a run's pool is told to be, and where its replicas may be placed."""

from pathlib import Path
from typing import Any

import pytest

from configs.load import parse_run
from configs.run import RunConfig
from orchestrator import run_pool, teacher_groups
from orchestrator.launch_spec import LaunchSpec
from orchestrator.teacher_pool import _actor_options
from tests.helpers.runs import tiny_values

TPU = {"accelerator": "v4", "topology": "2x2x2", "num_slices": 2}


def config_of(cluster: dict[str, Any] | None = None, **teacher: Any) -> RunConfig:
    values = tiny_values(Path("storage"), "run") | {"objective": {"kind": "distill"}}
    values |= {"teacher": {"checkpoint": "elder", **teacher}, "cluster": cluster or {}}
    values["mesh"] = {"data": 2, "fsdp": 2, "model": 2} if cluster else {}
    values["batch"] = {"rows": 16}
    return parse_run(values, "test")


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    made: list[tuple[str, Any]] = []
    monkeypatch.setattr(
        teacher_groups, "TeacherPool", lambda app, job, *rest: made.append((app, job))
    )
    return made


def spec() -> LaunchSpec:
    values = dict.fromkeys(LaunchSpec.__dataclass_fields__)
    values |= {"run_id": "run-1", "storage_url": "s", "run_url": "s/runs/run", "code": "c"}
    return LaunchSpec(**{**values, "teacher_url": "elder", "work": "train"})  # pyright: ignore


def test_teachers_stay_off_the_students_slices(pools):
    run_pool.make_pool(spec(), config_of(TPU), lambda event, **details: None)
    ((app, job),) = pools
    assert app == "teachers-run-1" and job.not_on == "v4-16"
    options = _actor_options(job.config, job.not_on)
    assert options["label_selector"] == {"ray.io/tpu-pod-type": "!v4-16"}


def test_each_kind_of_replica_has_an_application_and_machines_of_its_own(pools):
    groups = [{"name": "gpu", "replicas": 3, "gpus_per_replica": 2, "cpus_per_replica": 5}]
    config = config_of(tpus_per_replica=4, groups=groups, sameness="mixed")
    run_pool.make_pool(spec(), config, lambda event, **details: None)
    assert [app for app, _ in pools] == ["teachers-run-1", "teachers-run-1-gpu"]
    assert run_pool.pool_apps(spec(), config) == [app for app, _ in pools]
    (_, first), (_, group) = pools
    assert (first.num_devices, group.num_devices) == (4, 2)
    assert first.not_on is None
    assert _actor_options(first.config, None) == {"num_cpus": 1.0, "resources": {"TPU": 4}}
    assert _actor_options(group.config, None) == {"num_cpus": 5.0, "num_gpus": 2}


def test_a_replica_without_chips_sees_none(pools):
    run_pool.make_pool(spec(), config_of(), lambda event, **details: None)
    options = _actor_options(pools[0][1].config, None)
    assert options["runtime_env"]["env_vars"] == {"JAX_PLATFORMS": "cpu"}
