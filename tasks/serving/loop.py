"""The event loop on which all requests of a process run."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import functools
import gc
import resource
import threading
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from tasks.core.errors import InterruptedRun

T = TypeVar("T")


async def gather_all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of all, in order; the first exception cancels the rest and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(w) for w in work]
    except BaseExceptionGroup as error:
        first: BaseException = error
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
    return [t.result() for t in tasks]


class Loop:
    """An event loop on a thread of its own, where all requests of the process run.

    Shards are worked on in other threads (or Prefect's); they hand coroutines to `run` and wait. So one
    pool, with one limit per server, serves them all.
    """

    def __init__(self) -> None:
        import uvloop

        _calm_collector()
        _many_files()
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="winnow-requests", daemon=True)
        self._thread.start()
        self._stopped = threading.Event()

    def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine there, wait for its result. Raises InterruptedRun after `stop`."""
        if self._stopped.is_set():
            raise InterruptedRun("interrupted")
        future = asyncio.run_coroutine_threadsafe(work(), self._loop)
        if self._stopped.is_set():  # between the look above and the line above
            future.cancel()
        try:
            return future.result()
        except (asyncio.CancelledError, concurrent.futures.CancelledError) as error:
            raise InterruptedRun("interrupted") from error

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a coroutine there, beside everything else, until `stop`."""
        if not self._stopped.is_set():
            asyncio.run_coroutine_threadsafe(work(), self._loop)

    def finish(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a coroutine even after `stop`, for closing; waits at most 5 s."""
        with contextlib.suppress(TimeoutError, asyncio.CancelledError, concurrent.futures.CancelledError):
            asyncio.run_coroutine_threadsafe(work(), self._loop).result(timeout=5)

    def stop(self) -> None:
        """Cancel everything in flight; callers of `run` get InterruptedRun."""
        self._stopped.set()
        self._loop.call_soon_threadsafe(self._cancel_all)

    def end(self) -> None:
        """End the thread, once everything is cancelled and closed."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)

    def _cancel_all(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()


@functools.cache
def _calm_collector() -> None:
    """Keep the garbage collector away from what was imported: to look through a million objects of the libraries again
    and again stops every thread for 0.3 s and took a quarter of the CPU of a request."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or libraries that count what they leave behind complain at the end


@functools.cache
def _many_files() -> None:
    """A connection is an open file, and 64 servers with 128 requests each are more than the usual 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
