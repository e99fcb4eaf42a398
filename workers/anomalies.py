"""Steps that would harm the student: which they are, and what is done about them.

Every decision is a pure function of the configuration and of the steps before, as the record has
them, so that an attempt that resumes decides as a run that never stopped.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from configs.run import AnomalyConfig, RunConfig

Reason = Literal["nan", "spike", "rollback"]
"""Why a step is not part of the student; the last is of the steps that a rollback leaves out."""

# The loop puts a step on the devices before it reads the metrics of the one before.
_UNSETTLED_STEPS = 1


class SettledStep(NamedTuple):
    """What is remembered of a step."""

    step: int
    loss: float
    skipped: Reason | None


class Anomaly(NamedTuple):
    """A step that is not part of the student; loss and limit in nats per token."""

    step: int
    reason: Reason
    loss: float
    grad_norm: float
    limit: float | None
    """What the loss of a spike is above; None of other anomalies."""


class RollbackError(RuntimeError):
    """An anomaly that the run goes back for. `steps` are to be left out from then on."""

    def __init__(self, message: str, steps: tuple[int, ...]):
        super().__init__(message, steps)  # all that it takes to be made again in another process
        self.steps = steps

    def __str__(self) -> str:
        return self.args[0]


class AnomalyError(ValueError):
    """An anomaly that ends the run; the message says where, and how the run goes on."""


def needs_guard(config: AnomalyConfig, to_skip: Iterable[int]) -> bool:
    """Whether the state has to outlive a bad step. Where the run ends with it, it need not."""
    goes_on = {config.on_nan, config.on_spike} & {"skip", "rollback"}
    return bool(goes_on or tuple(to_skip))


def num_remembered(config: AnomalyConfig) -> int:
    """How many of the newest steps decide about the next one."""
    return config.window_steps + _UNSETTLED_STEPS


def loss_limit(config: AnomalyConfig, before: Sequence[SettledStep], step: int) -> float:
    """The largest loss of `step` that is no spike: mean + `spike_deviations` · deviation.

    Mean and standard deviation are those of the `window_steps` steps up to `step` − 2, without the
    skipped ones. Infinite while there are not so many steps, and where spikes are ignored.

    Args:
        before: steps in order, without gaps; newer ones than `step` − 2 count for nothing.
    """
    if config.on_spike == "ignore":
        return math.inf
    last = step - 1 - _UNSETTLED_STEPS
    window = [each for each in before if last - config.window_steps < each.step <= last]
    losses = [each.loss for each in window if each.skipped is None]
    if len(window) < config.window_steps or len(losses) < 2:
        return math.inf
    mean = math.fsum(losses) / len(losses)
    variance = math.fsum((loss - mean) ** 2 for loss in losses) / len(losses)
    # As the devices compare: in float32.
    return float(np.float32(mean + config.spike_deviations * math.sqrt(variance)))


class Anomalies:
    """What an attempt knows of its steps; the same on every host, since metrics are global.

    Args:
        before: the newest steps before the attempt, in order; `num_remembered` of them suffice.
        to_skip: steps that rollbacks leave out.
        saved_step: the newest step on storage when the attempt begins.
    """

    def __init__(
        self,
        config: RunConfig,
        before: Iterable[SettledStep],
        to_skip: Iterable[int],
        saved_step: int,
    ):
        self._run, self._config, self._saved_step = config, config.anomalies, saved_step
        self._to_skip = frozenset(to_skip)
        self._steps = deque(before, num_remembered(self._config))

    def limit(self, step: int) -> float:
        """The largest loss of `step` that the state may take in; −∞ if it is to be left out."""
        if step in self._to_skip:
            return -math.inf
        return loss_limit(self._config, self._steps, step)

    def settle(self, step: int, loss: float, grad_norm: float) -> Anomaly | None:
        """Remembers the next step; what was wrong with it, if anything.

        The same question as that of a guarded step (`workers.train_step`), to the same numbers.
        """
        limit = self.limit(step)
        reason: Reason | None = None
        if step in self._to_skip:
            reason = "rollback"
        elif not (math.isfinite(loss) and math.isfinite(grad_norm)):
            reason = "nan"
        elif loss > limit:
            reason = "spike"
        self._steps.append(SettledStep(step, loss, reason))
        if reason is None:
            return None
        return Anomaly(step, reason, loss, grad_norm, limit if reason == "spike" else None)

    def error(self, anomaly: Anomaly) -> RollbackError | AnomalyError | None:
        """What the newest step's anomaly is to be raised as; None where the run goes on."""
        if anomaly.reason == "rollback":
            return None
        name = f"on_{anomaly.reason}"
        policy = getattr(self._config, name)
        if policy == "stop":
            return AnomalyError(
                f"{self._where(anomaly)}. Leave the step out with `stillhouse resume "
                f"{self._run.name} --set anomalies.{name}=skip`, or lower optimizer.peak_lr"
            )
        if policy == "rollback":
            return self._rollback(anomaly)
        return self._too_many_skips(anomaly)

    def _rollback(self, anomaly: Anomaly) -> RollbackError:
        every = self._run.checkpoint.every_steps
        checkpoint = max(self._saved_step, (anomaly.step - 1) // every * every)
        first = max(checkpoint, anomaly.step - self._config.rollback_steps) + 1
        return RollbackError(
            f"{self._where(anomaly)}. The run goes back to step {checkpoint}, and leaves out steps "
            f"{first} to {anomaly.step}",
            tuple(range(first, anomaly.step + 1)),
        )

    def _too_many_skips(self, anomaly: Anomaly) -> AnomalyError | None:
        newest = list(self._steps)[-self._config.window_steps :]
        num_skips = sum(each.skipped in ("nan", "spike") for each in newest)
        if num_skips <= self._config.max_skips:
            return None
        return AnomalyError(
            f"{self._where(anomaly)}. {num_skips} of the last {len(newest)} steps had to be "
            f"skipped, and anomalies.max_skips allows {self._config.max_skips}: lower "
            "optimizer.peak_lr, look at these rows and at the teacher, or raise anomalies.max_skips"
        )

    def _where(self, anomaly: Anomaly) -> str:
        end = anomaly.step * self._run.batch.rows
        limit = "" if anomaly.limit is None else f", above {anomaly.limit:.6g}"
        return (
            f"Step {anomaly.step}, rows {end - self._run.batch.rows} to {end - 1} of the stream: "
            f"loss {anomaly.loss:.6g}{limit}, gradient norm {anomaly.grad_norm:.6g}"
        )
