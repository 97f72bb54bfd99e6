"""Who does the pieces of work: one process, its threads, several processes, or a Beam pipeline; results go to files."""

import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Workers(Protocol):
    """Does every job with a function; `advance` is called after each, or at the end."""

    def __call__(self, function: Callable[[Any], Any], jobs: Sequence[Any], advance: Callable[[int], None]) -> None: ...


def in_this_process(function: Callable[[Any], Any], jobs: Sequence[Any], advance: Callable[[int], None]) -> None:
    """Does the jobs one after another."""
    for job in jobs:
        function(job)
        advance(1)


def in_threads(count: int) -> Workers:
    """Does the jobs in so many threads of this process.

    Tokenizers encode outside of Python, on all cores, and all of these read one copy of the tokenizer's tables.
    """

    def work(function: Callable[[Any], Any], jobs: Sequence[Any], advance: Callable[[int], None]) -> None:
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            _wait_for(pool, function, jobs, advance)

    return work


def in_processes(count: int) -> Workers:
    """Does the jobs in so many processes on this machine; `function` and jobs must pickle."""

    def work(function: Callable[[Any], Any], jobs: Sequence[Any], advance: Callable[[int], None]) -> None:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(
            min(count, max(1, len(jobs))), mp_context=context, initializer=_begin_process
        ) as pool:
            _wait_for(pool, function, jobs, advance)

    return work


def _wait_for(
    pool: concurrent.futures.Executor,
    function: Callable[[Any], Any],
    jobs: Sequence[Any],
    advance: Callable[[int], None],
) -> None:
    try:
        for done in concurrent.futures.as_completed([pool.submit(function, job) for job in jobs]):
            done.result()
            advance(1)
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise


def _begin_process() -> None:
    """One thread for each process, and an end when the process that asked for the work is gone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
