"""Around a source of targets: none is asked for that is stored."""

import time
from collections.abc import Callable, Iterator

from workers.target_cache import TargetCache
from workers.targets_protocol import (
    CACHE,
    Answer,
    TargetChunk,
    TargetRequest,
    TargetSource,
)


class CachedSource(TargetSource):
    """Answers from a cache first; asks for what it lacks, and keeps that.

    Args:
        cache: the cache to use, looked up at each request; None: none.
    """

    def __init__(self, cache: Callable[[], TargetCache | None], source: TargetSource):
        self._cache, self._source = cache, source

    def sameness(self) -> str:
        return self._source.sameness()

    def num_replicas(self) -> int:
        return self._source.num_replicas()

    def ask(self, request: TargetRequest) -> Iterator[Answer]:
        cache = self._cache()
        if cache is None:
            yield from self._source.ask(request)
            return
        began = time.perf_counter()
        found = cache.get(request.rows)
        read_s = time.perf_counter() - began
        for row, stored in found.items():
            yield Answer(
                TargetChunk((row,), stored.arrays, (stored.digest,), CACHE), read_s / len(found)
            )
        missing = [place for place, row in enumerate(request.rows) if row not in found]
        if missing:
            for answer in self._source.ask(request.only(missing)):
                cache.put(answer.chunk)
                yield answer
