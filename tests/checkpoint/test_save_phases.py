"""A kill in any phase of a save: the checkpoint is there whole or not at all."""

import signal
from pathlib import Path

import pytest

from orchestrator import catalogue
from orchestrator.history import read_steps
from tests.helpers.killed_save import PHASES, killed_in_a_save
from tests.helpers.students import NUM_STEPS, config_of, job_of
from workers.checkpoint import checkpoint_url
from workers.jobs import StartPoint
from workers.preparer import Prepared
from workers.student import Finish, train

pytestmark = pytest.mark.slow

EVERY_STEPS = 2


@pytest.fixture(scope="module")
def undisturbed(text_storage: Path, facts: Prepared) -> Finish:
    return train(job_of(facts, config_of(text_storage, "undisturbed")))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.shows("student host: killed in each phase of a save")
def test_a_kill_in_a_save_costs_that_save_at_most(
    phase: str, text_storage: Path, facts: Prepared, undisturbed: Finish
) -> None:
    config = config_of(
        text_storage, f"killed-{list(PHASES).index(phase)}", checkpoint={"every_steps": EVERY_STEPS}
    )
    job = job_of(facts, config)
    assert killed_in_a_save(job, phase) == -signal.SIGKILL

    steps = catalogue.committed_steps(job.run_url)
    told = list(PHASES)[-1]
    assert steps == ([EVERY_STEPS, 2 * EVERY_STEPS] if phase == told else [EVERY_STEPS])
    start = StartPoint("resume", checkpoint_url(job.run_url, steps[-1]), steps[-1])
    finish = train(job_of(facts, config, start, attempt=2))
    assert (finish.step, finish.digest) == (NUM_STEPS, undisturbed.digest)
    assert catalogue.committed_steps(job.run_url) == [*range(EVERY_STEPS, NUM_STEPS, 2), NUM_STEPS]
    assert [line["step"] for line in read_steps(job.run_url)] == list(range(1, NUM_STEPS + 1))
