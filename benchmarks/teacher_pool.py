"""What the teacher pool costs a student, and how it grows.

    python -m benchmarks.teacher_pool throughput   # bytes per second against a plain actor
    python -m benchmarks.teacher_pool scaling      # tokens per second with 1, 2, 4, 8 replicas
    python -m benchmarks.teacher_pool live         # a student's steps, with targets made or stored
    python -m benchmarks.teacher_pool autoscaling  # a teacher that becomes slower, and fast again

All of it on one machine with Ray and Serve up, both sides of a ratio in one run, turn by turn.
"""

import contextlib
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import click
import numpy as np
import ray

from benchmarks.autoscaling import autoscaling
from benchmarks.figures import Figure, show, tell
from benchmarks.live_teachers import live
from benchmarks.run_pool import scale_to
from benchmarks.scripted_teacher import SPEC, ScriptedReplica, request_of, scripted_job
from orchestrator.launch import connect
from orchestrator.teacher_pool import TeacherPool
from workers.asking import PatientSource
from workers.code_identity import code_digest
from workers.dataset import RowId
from workers.serve_replicas import ServeReplicas
from workers.targets_protocol import row_digest

APP = "teachers-benchmark"
CHUNK_MIB = 8
TOKENS_PER_ROW = 1024


@click.group()
def main() -> None:
    pass


main.add_command(live)
main.add_command(autoscaling)


@contextlib.contextmanager
def _pool(job: Any, replicas: int) -> Iterator[tuple[TeacherPool, PatientSource]]:
    """A scripted pool that is up, and a way to ask it."""
    with tempfile.TemporaryDirectory() as scratch:
        pool = TeacherPool(APP, job, scratch, code_digest(), ScriptedReplica)
        try:
            scale_to(pool, replicas)
            source = PatientSource(ServeReplicas([APP], 60.0), lambda event, **details: None)
            source.sameness()
            yield pool, source
        finally:
            pool.remove()


def _rate(source: PatientSource, at_once: int, rows: int, seconds: float) -> float:
    """Rows per second of `at_once` requests for the same `rows` rows, again and again."""
    request, stop_at = request_of(range(rows)), [float("inf")]
    came: list[tuple[float, int]] = []

    def ask() -> None:
        while time.perf_counter() < stop_at[0]:
            for answer in source.ask(request):
                came.append((time.perf_counter(), len(answer.chunk.rows)))

    threads = [threading.Thread(target=ask) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    while len(came) < 2 * at_once:
        time.sleep(0.01)
    began = time.perf_counter()
    stop_at[0] = began + seconds
    for thread in threads:
        thread.join()
    return sum(num for at, num in came if began < at <= stop_at[0]) / seconds


# (b) Bytes through Serve, the router, the batcher and the asking side, against a bare actor.


@ray.remote(num_cpus=0)
class _PlainActor:
    def __init__(self, num_bytes: int):
        self._chunk = np.tile(np.arange(256, dtype=np.uint8), num_bytes // 256)

    def chunk(self) -> dict[str, np.ndarray]:
        return {"x": self._chunk}


def _plain_rate(actor: Any, seconds: float, check: bool = False) -> float:
    """Chunks per second, eight calls under way at once.

    Args:
        check: whether the bytes that come are digested, as the pool's are.
    """
    waiting = deque(actor.chunk.remote() for _ in range(8))
    began, num = time.perf_counter(), 0
    while time.perf_counter() < began + seconds:
        chunk: Any = ray.get(waiting.popleft())
        if check:
            row_digest(SPEC, RowId(0, 0), chunk)
        waiting.append(actor.chunk.remote())
        num += 1
    return num / (time.perf_counter() - began)


@main.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=4.0, show_default=True, help="Of each arm in each round.")
def throughput(rounds: int, seconds: float) -> None:
    """Precomputed targets of one replica, against a plain actor that moves the same bytes."""
    connect(None)
    rows_per_chunk = 4
    chunk_bytes = CHUNK_MIB << 20
    actor = _PlainActor.remote(chunk_bytes)
    with tempfile.TemporaryDirectory() as storage:
        job = scripted_job(storage, rows_per_chunk, 0.0, chunk_bytes // rows_per_chunk)
        rates = []
        with _pool(job, 1) as (_, source):
            _plain_rate(actor, 1.0)  # memory that was never used is slower in its first round
            for _ in range(rounds):
                plain = _plain_rate(actor, seconds), _plain_rate(actor, seconds, check=True)
                rates.append((*plain, _rate(source, 2, 64, seconds) / rows_per_chunk))
    to_gb = chunk_bytes / 1e9
    table = [
        [n, a * to_gb, b * to_gb, c * to_gb, c / a, c / b] for n, (a, b, c) in enumerate(rates)
    ]
    columns = ["round", "plain actor", "with digests", "pool", "over plain", "over digests"]
    show("GB/s of one replica", columns, table)
    ratio = statistics.median(c / a for a, _, c in rates)
    checked = statistics.median(c / b for _, b, c in rates)
    tell(
        {
            "throughput_over_object_store": Figure(ratio, "1", ">= 0.8"),
            "throughput_over_checked_actor": Figure(checked, "1"),
        }
    )


# (d) Growth.


@main.command()
@click.option("--seconds", default=10.0, show_default=True, help="With each number of replicas.")
@click.option("--batch-s", default=0.2, show_default=True, help="A batch's time on the teacher.")
def scaling(seconds: float, batch_s: float) -> None:
    """Tokens per second as replicas go 1, 2, 4, 8, each with a fixed time for a batch."""
    connect(None)
    rows_per_batch, rates = 8, {}
    with tempfile.TemporaryDirectory() as storage:
        # 140 bytes per token: the hybrid codec with k=16 and 32 draws at V = 256k.
        job = scripted_job(storage, rows_per_batch, batch_s, TOKENS_PER_ROW * 140)
        with _pool(job, 1) as (pool, source):
            for replicas in (1, 2, 4, 8):
                scale_to(pool, replicas)
                _rate(source, 2 * replicas, 2 * rows_per_batch, 3.0)  # the router learns of them
                rate = _rate(source, 3 * replicas, 2 * rows_per_batch, seconds)
                rates[replicas] = rate * TOKENS_PER_ROW
    table = [[n, rate, rate / rates[1] / n] for n, rate in rates.items()]
    show("Tokens per second", ["replicas", "tokens/s", "of linear"], table)
    tell(
        {
            f"scaling_efficiency_{n}": Figure(rate / rates[1] / n, "1", ">= 0.9" if n == 8 else "")
            for n, rate in rates.items()
            if n > 1
        }
    )


if __name__ == "__main__":
    main()
