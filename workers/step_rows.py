"""The rows of each step: named by a pure function, read a little ahead."""

import functools
from concurrent.futures import ThreadPoolExecutor

from configs.run import RunConfig
from workers.dataset import RowId
from workers.rows import BatchArrays, RowReader, batch_arrays, row_at
from workers.targets_protocol import TargetRequest, TargetSpec

_READ_AHEAD_STEPS = 2
_KEPT_STEPS = 64


class StepRows:
    """One host's rows of every step.

    Args:
        reader: of the training rows.
        config: gives seed, weights and rows per step.
        local_rows: this host's places in the global batch.
    """

    def __init__(self, reader: RowReader, config: RunConfig, local_rows: range):
        self._reader = reader
        self._weights = [source.weight for source in config.data.sources]
        self._seed = config.seed
        self._rows_per_step = config.batch.rows
        self._local_rows = local_rows
        self.num_rows = len(local_rows)
        self.first_row = local_rows.start
        """This host's first place in the global batch."""
        self._arrays = functools.lru_cache(maxsize=_KEPT_STEPS)(self._read)
        self._read_to = 0  # whoever asked for the steps below it reads them
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="rows")

    def ids(self, index: int) -> tuple[RowId, ...]:
        """The names of the rows of step `index`, counted from 0."""
        return self._ids(index, self._local_rows)

    def ids_everywhere(self, index: int) -> tuple[RowId, ...]:
        """The names of the rows of step `index`, of all hosts."""
        return self._ids(index, range(self._rows_per_step))

    def batch(self, index: int) -> BatchArrays:
        """What the model reads at step `index`; the steps after it are then read ahead."""
        arrays = self._arrays(index)
        end = index + 1 + _READ_AHEAD_STEPS
        for later in range(max(index + 1, self._read_to), end):
            self._ahead.submit(self._arrays, later)
        self._read_to = max(self._read_to, end)
        return arrays

    def request(self, index: int, spec: TargetSpec) -> TargetRequest:
        """What the teacher is asked for step `index`."""
        self._read_to = max(self._read_to, index + 1)
        arrays = self._arrays(index)
        return TargetRequest(
            spec, self.ids(index), arrays.inputs, arrays.segments, arrays.positions
        )

    def close(self) -> None:
        """Ends reading ahead."""
        self._ahead.shutdown(wait=False, cancel_futures=True)

    def _ids(self, index: int, rows: range) -> tuple[RowId, ...]:
        first = index * self._rows_per_step
        return tuple(
            row_at(self._reader.manifest, self._weights, self._seed, first + row) for row in rows
        )

    def _read(self, index: int) -> BatchArrays:
        return batch_arrays(self._reader.read(self.ids(index)))
