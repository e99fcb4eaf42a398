"""What came from the pool adds up, whichever step it was for."""

from collections.abc import Iterator

import numpy as np

from orchestrator.tracking import _train_metrics
from workers.dataset import RowId
from workers.pool_meter import MeteredSource, PoolMeter
from workers.targets_protocol import (
    MIXED,
    Answer,
    TargetChunk,
    TargetRequest,
    TargetSource,
    TargetSpec,
)

SPEC = TargetSpec("dataset", "teacher", "codec", 0, MIXED)


class Pool(TargetSource):
    def sameness(self) -> str:
        return "class"

    def ask(self, request: TargetRequest) -> Iterator[Answer]:
        for place, row in enumerate(request.rows):
            arrays = {"x": np.zeros((1, 10), np.uint8)}
            origin, fill = ("a", 1.0) if place < 3 else ("b", 0.5)
            chunk = TargetChunk((row,), arrays, ("digest",), origin, 0.1, 7 - place, fill)
            yield Answer(chunk, 0.0, hedged=origin == "b")


def test_what_came_is_told_once():
    meter = PoolMeter()
    source = MeteredSource(Pool(), meter)
    tokens = np.zeros((4, 1), np.int32)
    rows = tuple(RowId(0, index) for index in range(4))
    assert source.sameness() == "class"
    assert len(list(source.ask(TargetRequest(SPEC, rows, tokens, tokens, tokens)))) == 4
    meter.retried()
    told = meter.take()
    assert told == {
        "rows": {"a": 3, "b": 1},
        "waiting": {"a": 5, "b": 4},
        "fill": (3 * 1.0 + 0.5) / 4,
        "bytes": 40,
        "retries": 1,
        "hedged": 1,
    }
    nothing = {"rows": {}, "waiting": {}, "fill": None, "bytes": 0, "retries": 0, "hedged": 0}
    assert meter.take() == nothing

    losses = dict.fromkeys(("loss", "kd_loss", "ce_loss", "lr", "grad_norm"), 1.0)
    line = {
        **losses,
        **{"step": 3, "tokens": 100, "step_s": 0.5, "stall_s": {"teacher": 0.1}},
        **{"teacher_busy_s": 0.2, "pool": told},
        "targets": {"from": {"cache": 2, "a": 1, "labels": 1}},
    }
    metrics = _train_metrics(line)
    assert metrics["targets/rows_from_cache"] == 2 and metrics["targets/rows_from_pool"] == 1
    assert metrics["targets/rows_from_labels"] == 1 and metrics["pool/waiting_rows"] == 5
    assert metrics["pool/rows_per_s/a"] == 6.0 and metrics["pool/busy_share"] == 0.4
    assert metrics["pool/batch_fill"] == told["fill"]
    quiet = _train_metrics({**line, "pool": nothing})
    assert "pool/waiting_rows" not in quiet and quiet["pool/bytes"] == 0
