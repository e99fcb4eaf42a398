"""Applies faults to one run, one after the other, and compares it with an undisturbed one."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console

from tests.chaos.faults import Fault
from tests.chaos.subject import Subject
from tests.chaos.world import World


class Outcome(NamedTuple):
    """What a fault did to the run."""

    fault: Fault
    told: str
    """Kinds of those faults that ended an attempt, in the controller's words."""
    starts: str
    """From where the attempts after it went on."""
    num_lost_steps: int
    recovery_s: float

    @property
    def row(self) -> tuple[str, ...]:
        lost = str(self.num_lost_steps) if self.starts else ""
        fault, seconds = self.fault, f"{self.recovery_s:.0f}"
        return fault.mechanism, fault.target, self.told or "none", self.starts, lost, seconds


def disturb(run: Subject, fault: Fault) -> Outcome:
    """Applies a fault; returns when the run has made new steps."""
    run.goes_on()
    num_faults, num_starts = len(run.faults()), len(run.starts())
    num_lost, began = run.num_lost_steps(), time.monotonic()
    fault.apply(run)
    run.goes_on()
    recovery_s = time.monotonic() - began
    return Outcome(
        fault,
        ", ".join(run.faults()[num_faults:]),
        ", ".join(run.starts()[num_starts:]),
        run.num_lost_steps() - num_lost,
        recovery_s,
    )


def apply_all(
    world: World, name: str, faults: Sequence[Fault], console: Console, **teacher: Any
) -> list[Outcome]:
    """Applies `faults` in order to a run `name`, then compares it with an undisturbed run.

    A fault that needs a right this process lacks is printed and left out.

    Args:
        teacher: settings of the run's teacher.
    """
    outcomes = []
    run = Subject(world, name, **teacher)
    for fault in faults:
        if fault.takes and getattr(world, fault.takes) is None:
            console.print(f"{fault.name}: not tried, this process may not make a {fault.takes}")
            continue
        outcomes.append(disturb(run, fault))
        console.print(" | ".join(outcomes[-1].row), highlight=False, soft_wrap=True)
    run.stop()
    run.compare()
    return outcomes
