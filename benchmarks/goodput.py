"""What faults cost a large run: 54 days of 1,536 student hosts, simulated.

    python -m benchmarks.goodput [--step-s 1.2] [--detect-s 15] …

Faults come at the rate that Llama 3's report gives for its 54 days on 16,384 GPUs (466
interruptions, arXiv 2407.21783). Two arms live through the same ones: with the checkpoints on
storage alone, and with snapshots beside them that are held in memory outside the gang, so that a
lost host or slice costs no reading from storage and few steps. Nothing is measured here: every
input is printed with where it is from, is an option, and is halved and doubled to show what it
weighs. The categories are those of `orchestrator.ledger`.
"""

import dataclasses
import heapq
import statistics
from collections.abc import Callable
from typing import Any

import click
import numpy as np

from benchmarks.figures import Figure, show, tell
from configs.run import FaultConfig
from orchestrator.fault_policy import FaultKind, Relaunch, decide, recent
from orchestrator.ledger import Category

DAY_S = 86400.0
NUM_SEEDS = 20
_SHOWN = {
    Category.STEP: "steps that count",
    Category.STALL_CHECKPOINT: "held up by saves and snapshots",
    Category.LOST: "steps made again",
    Category.DETECT: "until a fault is noticed",
    Category.PAUSE: "pause before the next launch",
    Category.CAPACITY: "waiting for a slice",
    Category.START: "gang and state",
    Category.COMPILE: "program",
}


def _input(default: float, unit: str, source: str) -> Any:
    return dataclasses.field(default=default, metadata={"unit": unit, "source": source})


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the simulation assumes; each is an option of the command."""

    days: float = _input(54.0, "days", "Llama 3")
    num_slices: int = _input(24, "1", "6,144 chips of v5p, as Gemma 2 27B had: 1,536 hosts")
    hosts_per_slice: int = _input(64, "1", "v5p slices of 8x8x4 chips, 4 to a host")
    faults_per_host_day: float = _input(
        466 / 2048 / 54, "1", "Llama 3: 466 in 54 days on 2,048 hosts of 8 GPUs"
    )
    hardware_share: float = _input(0.78, "1", "Llama 3: share of faults that take a slice away")
    spare_slices: int = _input(2, "1", "assumed")
    repair_s: float = _input(3600.0, "s", "assumed: a host replaced, its slice whole again")
    hang_share: float = _input(0.1, "1", "assumed: share of faults in which nothing dies")
    detect_s: float = _input(15.0, "s", "assumed; until a death is noticed")
    hang_detect_s: float = _input(130.0, "s", "watchdog.step_at_least_s, and 10 s for stacks")
    schedule_s: float = _input(60.0, "s", "assumed: processes, and jax.distributed")
    compile_s: float = _input(30.0, "s", "assumed; from the compilation cache")
    restore_storage_s: float = _input(60.0, "s", "assumed: 330 GB of state, verified")
    restore_memory_s: float = _input(10.0, "s", "assumed: 53 MB per chip over the network")
    step_s: float = _input(1.2, "s", "27 B params, 8 Mi tokens, 40 % of 459 TFLOP/s per chip")
    save_every_steps: int = _input(200, "steps", "storage alone: about Young's optimum")
    save_every_steps_tiered: int = _input(800, "steps", "beside memory: about Young's optimum")
    save_s: float = _input(2.0, "s", "assumed; holds the students up, per save")
    commit_s: float = _input(60.0, "s", "assumed; until a save counts")
    snapshot_every_steps: int = _input(40, "steps", "about Young's optimum")
    snapshot_s: float = _input(0.1, "s", "assumed; holds the students up, per snapshot")
    hand_over_s: float = _input(
        1.0, "s", "assumed: 212 MB per host, kept twice; holds up from one step on"
    )
    memory_lost_share: float = _input(0.05, "1", "assumed: share of faults of the whole job")

    @property
    def faults_per_s(self) -> float:
        return self.faults_per_host_day * self.num_slices * self.hosts_per_slice / DAY_S


class Job:
    """One run through its faults. `seconds` add up to the run's length."""

    def __init__(self, inputs: Inputs, tiered: bool, seed: int):
        self._in, self._tiered = inputs, tiered
        self._rng = np.random.default_rng(seed)
        self.seconds = dict.fromkeys(_SHOWN, 0.0)
        self.num_faults = 0
        self._faults_s: tuple[float, ...] = ()
        self._now_s, self._end_s = 0.0, inputs.days * DAY_S
        self._step = self._stored = self._held = 0
        self._in_memory = False
        self._free = inputs.spare_slices
        self._repairs: list[float] = []
        self._save_every = inputs.save_every_steps_tiered if tiered else inputs.save_every_steps
        self._pace_s = inputs.step_s + inputs.save_s / self._save_every
        if tiered:
            snapshot_s = inputs.snapshot_s + max(0.0, inputs.hand_over_s - inputs.step_s)
            self._pace_s += snapshot_s / inputs.snapshot_every_steps

    def run(self) -> "Job":
        while self._now_s < self._end_s:
            # Both arms draw alike, so that they live through the same faults.
            faulty_after_s = self._rng.exponential(1 / self._in.faults_per_s)
            hardware, hangs, whole_job = self._rng.random(3) < (
                self._in.hardware_share,
                self._in.hang_share,
                self._in.memory_lost_share,
            )
            self._train(self._start(faulty_after_s))
            if self._now_s < self._end_s:
                self._recover(bool(hardware), bool(hangs), bool(whole_job))
        return self

    def _spend(self, category: Category, seconds: float) -> float:
        """At most until the end; returns the seconds that were spent."""
        spent_s = min(seconds, self._end_s - self._now_s)
        self.seconds[category] += spent_s
        self._now_s += spent_s
        return spent_s

    def _start(self, left_s: float) -> float:
        """Starts the gang; what is left of the time until the next fault."""
        restore_s = self._in.restore_memory_s if self._in_memory else self._in.restore_storage_s
        for category, seconds in (
            (Category.START, self._in.schedule_s + restore_s),
            (Category.COMPILE, self._in.compile_s),
        ):
            left_s -= self._spend(category, min(seconds, left_s))
        return left_s

    def _train(self, left_s: float) -> None:
        left_s = min(left_s, self._end_s - self._now_s)
        num_steps = int(left_s / self._pace_s)
        steps_s = num_steps * self._in.step_s
        self._spend(Category.STEP, steps_s)
        self._spend(Category.STALL_CHECKPOINT, num_steps * self._pace_s - steps_s)
        self._spend(Category.LOST, left_s - num_steps * self._pace_s)
        self._step += num_steps
        self._stored = self._newest(self._stored, self._save_every, self._in.commit_s)
        if self._tiered:
            # The step after a snapshot does not count before that is held.
            self._held = self._newest(self._held, self._in.snapshot_every_steps, 0.0)

    def _newest(self, before: int, every: int, commit_s: float) -> int:
        """The newest step that is kept, of those saved in time."""
        committed = self._step - int(np.ceil(commit_s / self._pace_s))
        return max(before, committed // every * every)

    def _recover(self, hardware: bool, hangs: bool, whole_job: bool) -> None:
        self.num_faults += 1
        if whole_job:
            self._held = 0
        self._in_memory = self._held > 0 and self._held >= self._stored
        resumed = max(self._held, self._stored)
        lost_s = (self._step - resumed) * self._in.step_s
        self.seconds[Category.STEP] -= lost_s
        self.seconds[Category.LOST] += lost_s
        self._step = resumed
        self._spend(Category.DETECT, self._in.hang_detect_s if hangs else self._in.detect_s)
        self._spend(Category.PAUSE, self._pause_s())
        if hardware:
            heapq.heappush(self._repairs, self._now_s + self._in.repair_s)
            self._free -= 1
        while self._repairs and (self._repairs[0] <= self._now_s or self._free < 0):
            self._spend(Category.CAPACITY, max(0.0, heapq.heappop(self._repairs) - self._now_s))
            self._free += 1

    def _pause_s(self) -> float:
        """As the controller decides it."""
        budgets = FaultConfig(host_died=self.num_faults)
        self._faults_s = recent(self._faults_s, self._now_s, budgets)
        decision = decide(FaultKind.HOST_DIED, "", len(self._faults_s), budgets)
        assert isinstance(decision, Relaunch), "the budget is as large as it has to be"
        self._faults_s = (*self._faults_s, self._now_s)
        return decision.after_s


def simulate(inputs: Inputs, tiered: bool) -> list[Job]:
    """One job per seed."""
    return [Job(inputs, tiered, seed).run() for seed in range(NUM_SEEDS)]


def goodput(jobs: list[Job]) -> float:
    """Share of the time that went into steps that count, in the mean of all jobs."""
    return statistics.mean(job.seconds[Category.STEP] / sum(job.seconds.values()) for job in jobs)


def scaled(inputs: Inputs, name: str, factor: float) -> Inputs:
    """With one input multiplied; shares stay below 1, numbers whole and positive."""
    value = getattr(inputs, name)
    value = max(1, round(value * factor)) if isinstance(value, int) else value * factor
    return dataclasses.replace(inputs, **{name: min(value, 1.0) if "share" in name else value})


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for field in reversed(dataclasses.fields(Inputs)):
        name, kind = f"--{field.name.replace('_', '-')}", type(field.default)
        command = click.option(name, type=kind, default=field.default, show_default=True)(command)
    return command


@click.command()
@_options
def main(**values: Any) -> None:
    inputs = Inputs(**values)
    fields = dataclasses.fields(Inputs)
    rows = [
        [field.name, getattr(inputs, field.name), field.metadata["unit"], field.metadata["source"]]
        for field in fields
    ]
    show("Inputs", ["input", "value", "unit", "from"], rows)
    arms = {"storage": simulate(inputs, False), "memory": simulate(inputs, True)}
    _show_results(arms)
    rows = [
        [
            field.name,
            *(
                goodput(simulate(scaled(inputs, field.name, factor), tiered))
                for tiered in (False, True)
                for factor in (0.5, 2)
            ),
        ]
        for field in fields
    ]
    columns = ["input", "storage, × ½", "storage, × 2", "memory, × ½", "memory, × 2"]
    show("Goodput with one input halved or doubled", columns, rows)
    tell(
        {
            "goodput_memory_tier": Figure(goodput(arms["memory"]), "1", ">= 0.98"),
            "goodput_storage_tier": Figure(goodput(arms["storage"]), "1"),
        }
    )


def _show_results(arms: dict[str, list[Job]]) -> None:
    rows: list[list[Any]] = []
    for category, text in _SHOWN.items():
        shares = [
            statistics.mean(job.seconds[category] / sum(job.seconds.values()) for job in jobs)
            for jobs in arms.values()
        ]
        rows.append([f"{category.replace('_', ' ')}: {text}", *(f"{s:.3%}" for s in shares)])
    for text, of_job in (
        ("faults", lambda job: job.num_faults),
        ("lost per fault, s", lambda job: job.seconds[Category.LOST] / job.num_faults),
        ("goodput, lowest", lambda job: job.seconds[Category.STEP] / sum(job.seconds.values())),
    ):
        pick = min if text.endswith("lowest") else statistics.mean
        rows.append([text, *(pick([of_job(job) for job in jobs]) for jobs in arms.values())])
    show(f"Share of the time, mean of {NUM_SEEDS} seeds", ["what", *arms], rows)


if __name__ == "__main__":
    main()
