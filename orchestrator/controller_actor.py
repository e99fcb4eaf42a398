"""The controller as a Ray actor: gathers what happened, carries out what the machine decides.

Named, detached, and restarted by Ray as often as it dies: all it knows lies in the run's
folder, and all it drives (attempt, teachers) outlives it. No array passes through it.
"""

import logging
import os
import threading
import time
import uuid
from typing import Any

import ray

from configs.checks import layout
from configs.elastic import on_slices
from configs.run import RunConfig
from configs.topology import slice_topology
from orchestrator import catalogue, run_state
from orchestrator.controller import STOP_WITHIN_S, Controller
from orchestrator.fault_policy import LONGEST_PAUSE_S
from orchestrator.history import read_events
from orchestrator.launch_spec import LaunchSpec
from orchestrator.lives import holder, insist
from orchestrator.run_folder import LEASE_RENEWAL_S, RunFolder
from orchestrator.run_parts import AttemptPart, EvaluationPart, PreparationPart
from orchestrator.run_pool import make_pool
from orchestrator.run_state import Snapshot, State
from orchestrator.slices import draining_nodes, num_free_slices
from orchestrator.student_pulse import StudentPulse
from orchestrator.tracking import TrackingPart
from orchestrator.watchdog import Watch
from workers.epochs import SupersededError, check_epoch, take_epoch
from workers.host_watch import STACKS, hosts_with_stacks
from workers.phases import Doing
from workers.record import EventWriter, LogSegments
from workers.student_host import NAMESPACE, controller_name
from workers.tally import Tally

TICK_S = 0.2
LOOK_AT_STORAGE_S = 1.0
TELL_OF_STORAGE_EVERY_S = 60.0
NOTICE_S = 600.0
"""A machine that has longer to live is still worked on."""

_log = logging.getLogger(__name__)


class ControllerActor:
    """One run's controller."""

    def __init__(self, spec: LaunchSpec):
        self._spec = spec
        self._life = uuid.uuid4().hex[:8]
        self._folder = RunFolder(spec.storage_url, spec.name)
        logging.getLogger().addHandler(LogSegments(self._folder.url, f"controller-{self._life}"))
        self._events = EventWriter(self._folder.url, f"controller-{self._life}")
        self._config: RunConfig = insist(self._folder.config)
        this = holder() or self._life
        self._epoch = insist(lambda: take_epoch(spec.run_url, spec.run_id, this, spec.address))
        self._pulse = StudentPulse()
        self._watch = Watch(self._config.watchdog)
        self._looked_at_s = self._renewed_at_s = 0.0
        self._pool = make_pool(spec, self._config, self._events.say)
        self._tracking = TrackingPart(self._folder.url, self._config, spec)
        self._clock_ahead_s = time.time() - time.monotonic()
        self._machine = Controller(self._config, insist(self._load_snapshot))
        self._remembered: Snapshot | None = None
        self._heard: list[run_state.Event] = []
        self._actions: list[run_state.Action] = []
        self._told_of_storage_s = -TELL_OF_STORAGE_EVERY_S
        self._preparation = PreparationPart(spec, self._config)
        self._attempt = AttemptPart(spec, self._config)
        self._evaluation = EvaluationPart(spec, self._config)
        self._take_up()
        threading.Thread(target=self._run, name="controller", daemon=True).start()

    def heartbeat(self, attempt: int, line: dict[str, Any], tally: Tally, doing: Doing) -> int:
        """From the first student host: its newest line, sums over all its lines, what it does.

        The answer is 1 to ask it to save and stop.
        """
        self._pulse.beat(attempt, line, tally, doing)
        snapshot = self._machine.snapshot
        leaving = snapshot.leaving and attempt == snapshot.attempt
        return int(snapshot.stop_asked or leaving)

    def busy(self, attempt: int) -> None:
        """From any student host: it does what may take longer than a step, others may wait."""
        self._pulse.busy(attempt)

    def state(self) -> str:
        """The run's state."""
        return self._machine.snapshot.state.value

    def _now_s(self) -> float:
        """The wall clock as it was at the start of this life, and what has passed since.

        A wall clock that is set back would have nothing happen until it has caught up.
        """
        return self._clock_ahead_s + time.monotonic()

    # Start and restart.

    def _load_snapshot(self) -> Snapshot:
        values = self._folder.snapshot()
        if values is None:
            return Snapshot(teachers=self._spec.replicas)
        # Whatever was under way with an evaluator went down with the last life, and no pause is
        # longer than the longest, wherever the clock was set meanwhile.
        now_s = self._now_s()
        dues = {
            "relaunch_at_s": min(values["relaunch_at_s"], now_s + LONGEST_PAUSE_S),
            "kill_at_s": min(values["kill_at_s"], now_s + STOP_WITHIN_S),
        }
        return Snapshot.from_json({**values, **dues, "evaluating": None})

    def _take_up(self) -> None:
        snapshot = self._machine.snapshot
        away_s = insist(self._folder.lease_age_s)
        insist(lambda: self._folder.write_lease(self._life, self._spec.address))
        state = snapshot.state.value
        self._events.say("controller_started", pid=os.getpid(), state=state, away_s=away_s)
        if snapshot.state is State.PREPARING:
            self._preparation.start()
        elif snapshot.state.is_terminal:
            self._release()  # the last life may not have come to it
        elif self._pool is not None:
            self._pool.scale(snapshot.teachers)

    # The loop.

    def _run(self) -> None:
        try:
            while not (self._machine.snapshot.state.is_terminal and not self._actions):
                self._turn_patiently()
                time.sleep(TICK_S)
        except SupersededError as error:
            # Nothing is written any more: the run's folder is another's.
            _log.warning("This controller leaves: %s", error)
            self._release()
            self._end_actor()
            return
        except Exception as error:
            _log.exception("The controller met an error of its own")
            self._fail(error)
        self._leave()

    def _turn_patiently(self) -> None:
        """One turn; storage that does not answer is tried again as long as it takes.

        The students train on meanwhile: a full disk is no reason to end a run.
        """
        try:
            self._turn()
        except OSError as error:
            now_s = time.monotonic()
            if now_s - self._told_of_storage_s > TELL_OF_STORAGE_EVERY_S:
                self._told_of_storage_s = now_s
                _log.warning("Storage does not answer, will try again: %s", error)

    def _turn(self) -> None:
        self._carry_out()  # what storage refused the last time
        now_s = self._now_s()
        self._heard += [run_state.Ticked(), *self._poll()]
        ended = (run_state.AttemptFinished, run_state.AttemptFailed)
        commands: list[tuple[str, dict[str, Any]]] = []
        look = now_s - self._looked_at_s >= LOOK_AT_STORAGE_S
        if look or any(isinstance(event, ended) for event in self._heard):
            # Before an end or a relaunch is decided on, the last checkpoint has to be known.
            check_epoch(self._folder.url, self._epoch)
            commands = self._folder.commands()
            found = [_event_of(command) for _, command in commands]
            here = [*self._look_for_steps(), *self._look_for_slices()]
            self._heard = [*here, *found, *self._heard, *self._look_for_notice()]
            self._looked_at_s = now_s
        while self._heard:
            self._actions += self._machine.on(self._heard.pop(0), now_s)
            self._carry_out()
        for name, _ in commands:
            # Only now is it remembered; to take a command in twice does no harm.
            self._folder.take(name)
        if look:  # whose run it is has just been seen
            self._show()
            if now_s - self._renewed_at_s >= LEASE_RENEWAL_S:
                self._renewed_at_s = now_s
                self._folder.write_lease(self._life, self._spec.address)

    def _poll(self) -> list[run_state.Event]:
        snapshot = self._machine.snapshot
        events: list[run_state.Event] = []
        if snapshot.state is State.PREPARING:
            events += self._preparation.poll()
        if snapshot.state in (State.STARTING, State.TRAINING, State.STOPPING):
            if self._pulse.line(snapshot.attempt):
                events.append(run_state.Stepped(snapshot.attempt))
            events += self._attempt.poll(snapshot.attempt) or self._look_for_hang(snapshot)
        if snapshot.evaluating is not None:
            events += self._evaluation.poll()
        if self._pool is not None:
            if reason := self._pool.failure():
                events.append(run_state.Broken(reason))
            if steps := self._pulse.window(snapshot.attempt):
                serving = self._pool.serving()
                events.append(run_state.Observed(snapshot.attempt, steps, serving))
        return events

    def _look_for_hang(self, snapshot: Snapshot) -> list[run_state.Event]:
        attempt = snapshot.attempt
        reason = self._watch.look(attempt, self._pulse.signs(attempt), time.monotonic())
        # A gang that is to stop has a time of its own for it.
        if reason is None or snapshot.state is State.STOPPING:
            return []
        written = hosts_with_stacks(self._folder.url, attempt)
        config = on_slices(self._config, snapshot.num_slices)
        missing = sorted(set(range(layout(config).num_hosts)) - set(written))
        reason += f"; in {STACKS}/ are those of hosts {written}"
        if missing:
            reason += f", and none of hosts {missing}: look at these first"
        return [run_state.Hung(attempt, reason)]

    def _look_for_steps(self) -> list[run_state.Event]:
        steps = tuple(catalogue.committed_steps(self._folder.url))
        pinned = tuple(catalogue.pinned_steps(self._folder.url))
        known = self._machine.snapshot
        if (steps, pinned) == (known.steps, known.pinned):
            return []
        return [run_state.Committed(steps, pinned)]

    def _look_for_slices(self) -> list[run_state.Event]:
        cluster = self._config.cluster
        if cluster.min_slices is None:
            return []
        shape = slice_topology(cluster.accelerator, cluster.topology or "")
        return [run_state.SlicesFree(num_free_slices(shape))]

    def _look_for_notice(self) -> list[run_state.Event]:
        now = self._machine.snapshot
        if now.leaving or now.state not in (State.STARTING, State.TRAINING):
            return []
        nodes = draining_nodes(NOTICE_S)
        if not nodes:
            return []
        told = read_events(self._folder.url, writers=f"-a{now.attempt:04d}")
        ready = [event for event in told if event["event"] == "host_ready"]
        machines = nodes.intersection(event.get("node", "") for event in ready)
        return [run_state.Noticed(now.attempt, tuple(sorted(machines)))] if machines else []

    def _carry_out(self) -> None:
        if self._machine.snapshot != self._remembered:
            # What is remembered comes first: an action lost with the controller is made good
            # by its next life, one done twice might not be.
            self._folder.write_snapshot(self._machine.snapshot.to_json())
            self._remembered = self._machine.snapshot
        while self._actions:
            self._act(self._actions[0])
            del self._actions[0]

    def _act(self, action: run_state.Action) -> None:
        facts = self._machine.snapshot.facts
        if isinstance(action, run_state.Say):
            self._events.say(action.event, **action.details)
        elif isinstance(action, run_state.StartAttempt):
            assert facts is not None
            check_epoch(self._folder.url, self._epoch)
            self._attempt.start(action, facts, self._machine.snapshot, self._epoch)
        elif isinstance(action, run_state.KillAttempt):
            self._attempt.kill(action.attempt)
        elif isinstance(action, run_state.SetTeachers):
            if self._pool is not None:
                self._pool.scale(action.replicas)
        elif isinstance(action, run_state.Evaluate):
            assert facts is not None
            self._evaluation.start(action.step, facts)
        elif isinstance(action, run_state.Delete):
            catalogue.delete_checkpoint(self._folder.url, action.step)
            self._events.say("checkpoint_deleted", step=action.step)
        elif isinstance(action, run_state.Quarantine):
            catalogue.quarantine(self._folder.url, action.step, action.reason)
        elif isinstance(action, run_state.DropSnapshots):
            self._attempt.drop_snapshots()
        else:
            self._release()

    def _release(self) -> None:
        """Gives back what the run holds on the cluster."""
        self._preparation.kill()
        self._attempt.kill(self._machine.snapshot.attempt)
        self._evaluation.kill()
        self._attempt.drop_snapshots()
        if self._pool is not None:
            self._pool.remove()

    def _fail(self, error: Exception) -> None:
        reason = f"The controller failed: {type(error).__name__}: {error}"
        self._machine.snapshot = Snapshot.from_json(
            {**self._machine.snapshot.to_json(), "state": State.FAILED, "reason": reason}
        )
        self._release()
        try:
            self._folder.write_snapshot(self._machine.snapshot.to_json())
        except OSError:
            _log.exception("Storage does not take the run's last state")
        self._events.say("state", state="failed", before=None, reason=reason)

    def _leave(self) -> None:
        """The end of a run: last words, and this actor itself."""
        try:
            self._show()
            self._tracking.finish()
            self._events.close()
            self._folder.release_lease()
        except OSError:
            _log.exception("Storage does not take the run's last words; its lease runs out")
        self._end_actor()

    def _end_actor(self) -> None:
        me = ray.get_actor(controller_name(self._spec.run_id), NAMESPACE)
        ray.kill(me, no_restart=True)

    def _show(self) -> None:
        snapshot = self._machine.snapshot
        line = self._pulse.line(snapshot.attempt)
        status = {
            "name": self._spec.name,
            "run_id": self._spec.run_id,
            "state": snapshot.state.value,
            "reason": snapshot.reason,
            "attempt": snapshot.attempt,
            "step": max(line.get("step") or 0, snapshot.step or 0),
            "num_steps": self._config.steps,
            "line": line,
            "preparing": self._preparation.progress(),
            "teachers": {
                "wanted": snapshot.teachers,
                "needed": snapshot.scaling.needed,
                "pool": self._config.teacher.pool if self._config.teacher else None,
                "replicas": self._pool.status() if self._pool is not None else {},
            },
            "checkpoints": list(snapshot.steps),
            "bits_per_byte": {str(s): v for s, v in snapshot.evaluated.items()},
            "faults": snapshot.used,
            "digest": snapshot.digest,
            "time_s": time.time(),
        }
        self._folder.write_status(status)
        self._tracking.gauge(status)


def _event_of(command: dict[str, Any]) -> run_state.Event:
    if command["kind"] == "stop":
        return run_state.StopAsked()
    assert command["kind"] == "scale", f"unknown command {command}"
    teachers = command["teachers"]
    return run_state.ScaleAsked(None if teachers == "auto" else teachers)
