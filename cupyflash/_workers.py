"""Threads for the CPU path: tasks in order, one BLAS thread for each of them, safe in forks and nested calls.

NumPy releases the interpreter lock inside ufuncs and BLAS, so plain threads fill the cores. BLAS's own threads
would compete with them; its limit is process-wide, so the first call that runs sets it and the last restores it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

Task = TypeVar("Task")
Worker = Callable[[Task], None]

VARIABLE = "CUPYFLASH_NUM_THREADS"


def worker_count() -> int:
    """How many threads a call may use: ``CUPYFLASH_NUM_THREADS``, or the cores that the process may run on."""
    if (count := check_variable()) is not None:
        return count
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_variable() -> int | None:
    """``CUPYFLASH_NUM_THREADS`` as a number; ValueError where it is none, also for calls that need no workers.

    A small call like one before does not look.
    """
    text = os.environ.get(VARIABLE)
    if text is None:
        return None
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise ValueError(f"{VARIABLE}={text!r}: the number of worker threads is an integer of at least 1")
    return count


def run(
    make_worker: Callable[[], Worker[Task]], tasks: Sequence[Task], abandon: Callable[[], None] | None = None
) -> None:
    """Give the tasks, in order, to workers in this thread and in as many pool threads as there is use for.

    Each thread makes its own worker, which owns the thread's workspace and dies with the call. An exception
    ends the call: no further task starts, `abandon` wakes tasks that wait for others, those under way finish,
    and it is raised here.
    """
    count = min(worker_count(), len(tasks))
    job = _Job(make_worker, tasks, abandon)
    helpers: list[Future[None]] = []
    with one_blas_thread():
        try:
            if count > 1:
                _pool.submit(job.help, count - 1, helpers)
            job.work()
        finally:
            job.join(helpers)
    if job.error is not None:
        raise job.error


class _Job(Generic[Task]):
    """The tasks of one call, taken one after another by however many threads come."""

    def __init__(
        self,
        make_worker: Callable[[], Worker[Task]],
        tasks: Sequence[Task],
        abandon: Callable[[], None] | None,
    ) -> None:
        self.make_worker, self.abandon = make_worker, abandon
        self.tasks: Iterator[Task] = iter(tasks)
        self.lock = threading.Lock()
        self.error: BaseException | None = None

    def help(self) -> None:
        """Do the same in a pool thread."""
        with _one_thread_here(_blas):
            self.work()

    def work(self) -> None:
        """Take and do tasks until none is left. NumPy's warnings are off: NaN and inf are data here."""
        try:
            with np.errstate(all="ignore"):
                task = self.take()
                if task is None:
                    return
                worker = self.make_worker()
                while task is not None:
                    worker(task)
                    task = self.take()
        except BaseException as error:
            self.stop(error)

    def take(self) -> Task | None:
        with self.lock:
            return next(self.tasks, None)

    def stop(self, error: BaseException) -> None:
        with self.lock:
            self.tasks = iter(())
            self.error = self.error or error
        if self.abandon is not None:
            self.abandon()

    def join(self, helpers: list[Future[None]]) -> None:
        """Wait until no helper touches the call's arrays any more, whatever interrupts the wait."""
        for helper in helpers:
            while not (helper.cancel() or helper.done()):
                try:
                    helper.result()
                except BaseException as error:  # an interrupt of this thread; work() raises nothing
                    self.stop(error)


# ---------------------------------------------------------------------------------------------------- thread pool


class _Pool:
    """The pool threads, kept between calls; idle ones hold no memory."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.size = 0
        self.executor: ThreadPoolExecutor | None = None

    def submit(self, work: Callable[[], None], count: int, helpers: list[Future[None]]) -> None:
        with self.lock:
            if count > self.size or self.executor is None:
                from concurrent.futures import ThreadPoolExecutor

                if self.executor is not None:
                    self.executor.shutdown(wait=False)  # finishes what it was given
                self.executor, self.size = ThreadPoolExecutor(count, "cupyflash"), count
            for _ in range(count):
                try:
                    helpers.append(self.executor.submit(work))
                except RuntimeError:  # no thread can be started (a limit, or the interpreter shuts down)
                    break  # the calling thread does what nobody else takes


# ----------------------------------------------------------------------------------------------------- BLAS limit


class _BlasLimit:
    """BLAS held at one thread while any call runs."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.calls = 0
        self.controller: Any = None
        self.limit: Any = None

    def libraries(self) -> Any:
        """threadpoolctl's controller; it scans the loaded libraries once, NumPy's BLAS among them."""
        with self.lock:
            if self.controller is None:
                from threadpoolctl import ThreadpoolController

                self.controller = ThreadpoolController()
            return self.controller

    def enter(self) -> None:
        """Set the limit, if no call runs yet."""
        controller = self.libraries()
        with self.lock:
            if self.calls == 0:
                self.take_control()
                self.limit = controller.limit(limits=1, user_api="blas")
            self.calls += 1

    def leave(self) -> None:
        """Restore what was before, if no call runs any more."""
        with self.lock:
            self.calls -= 1
            if self.calls == 0:
                self.release()

    def release(self) -> None:
        """Restore what was before the first call."""
        limit, self.limit = self.limit, None
        if limit is not None:
            self.take_control()
            limit.restore_original_limits()
            self.take_control()

    def take_control(self) -> None:
        """Let this thread set limits, and after that any other.

        threadpoolctl 3.8 lets only the first thread that asks set the limit of OpenBLAS and ignores all others
        while it lives; here the thread that restores is not always the one that began.
        """
        for library in self.controller.lib_controllers:
            if hasattr(library, "clear_controlling_thread"):
                library.clear_controlling_thread(force=True)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Hold BLAS at one thread: the first of concurrent calls sets the limit, the last one restores it."""
    blas = _blas  # a fork inside the block replaces the global
    with _one_thread_here(blas):
        blas.enter()
        try:
            yield
        finally:
            blas.leave()


@contextmanager
def _one_thread_here(blas: _BlasLimit) -> Iterator[None]:
    """The same for libraries on OpenMP, whose limits belong to the thread that sets them."""
    here = blas.libraries().select(threading_layer="openmp")
    if not here.lib_controllers:
        yield
        return
    limit = here.limit(limits=1, user_api="blas")
    try:
        yield
    finally:
        limit.restore_original_limits()


_pool = _Pool()
_blas = _BlasLimit()


def _after_fork() -> None:
    """A forked child has none of its parent's threads and may have inherited locks that they held."""
    global _pool, _blas
    _pool = _Pool()
    parent, _blas = _blas, _BlasLimit()
    parent.release()  # no call runs in the child, so nobody else would restore the limit


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
