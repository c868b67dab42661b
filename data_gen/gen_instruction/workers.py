"""Work shared out over processes, its results in the order of the tasks."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

AHEAD = 4  # tasks per worker that may be done before their turn: bounds memory

_function: Callable[[Any, Any], Any] | None = None
_shared: Any = None


class WorkerKilled(RuntimeError):
    """A worker process ended from outside."""


def ordered(function: Callable[[Any, Any], Any], shared: Any, tasks: Iterable[Any], num_workers: int) -> Iterator[Any]:
    """`function(shared, task)` for every task, in order; `shared` goes to every worker once.

    One worker is this process itself. Raises WorkerKilled if a worker was killed.
    """
    if num_workers <= 1:
        yield from (function(shared, task) for task in tasks)
        return
    pool = ProcessPoolExecutor(num_workers, initializer=_begin, initargs=(function, shared))
    waiting: deque = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(_work, task))
            if len(waiting) >= AHEAD * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise WorkerKilled(
            "a worker process was killed, perhaps for lack of memory: start the same command again with fewer "
            "--num_workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin(function: Callable[[Any, Any], Any], shared: Any) -> None:
    global _function, _shared
    _function, _shared = function, shared
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _work(task: Any) -> Any:
    return _function(_shared, task)


def _end_with_parent() -> None:
    """Workers of a killed process would wait for their next task for ever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
