"""Owns work that threads share: in the order of its items, on all cores, within some memory."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Asked = TypeVar("Asked")
Made = TypeVar("Made")
_AHEAD = 8  # items for each thread that are begun before the first one's result is taken


def count_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_threads(
    work: Callable[[Asked], Made], items: Iterable[Asked], n_threads: int | None = None
) -> Iterator[Made]:
    """Results in the items' order, by as many threads as there are cores; no more than some are waiting to be
    taken. What `work` raises is raised here, and what was not begun by then is not."""
    n = n_threads or count_cores()
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(n) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= _AHEAD * n:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Room:
    """Memory that threads share: whoever needs more than is left waits."""

    def __init__(self, n_bytes: int):
        self.n_bytes = self.left = n_bytes
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, n_bytes: int) -> Iterator[None]:
        """As much, or all of it where that is less."""
        taken = min(n_bytes, self.n_bytes)
        with self.changed:
            self.changed.wait_for(lambda: self.left >= taken)
            self.left -= taken
        try:
            yield
        finally:
            with self.changed:
                self.left += taken
                self.changed.notify_all()
