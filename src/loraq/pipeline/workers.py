"""The same job for many layers, in this process or in several; who does what never changes a byte.

Worker processes are spawned, not forked, work on one thread each, leave Ctrl-C to their parent, and
end when it ends, however that happens.
"""

import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

import torch

from loraq.errors import LayerError, LoraqError, layer_failure


class Named(Protocol):
    """A piece of work that has the name of its layer."""

    @property
    def name(self) -> str:
        """Dotted name of the layer."""
        ...


J = TypeVar("J", bound=Named)
R = TypeVar("R")


def run_jobs(work: Callable[[J], R], jobs: Sequence[J], workers: int) -> Generator[R]:
    """Yield what `work` returns for each job, as it is ready.

    Args:
        work: does one job; with several workers it must be picklable, and so must what it returns.
        jobs: in the order in which they begin.
        workers: jobs in flight; with 1 this process does them itself.

    Raises:
        LayerError: a job failed with an error that is not loraq's own, or its worker was killed;
            the message names it.
        LoraqError, OSError: what a job raised.
    """
    if workers == 1:
        yield from (attempt(work, job) for job in jobs)
        return
    yield from _in_processes(work, jobs, min(workers, len(jobs)))


def attempt(work: Callable[[J], R], job: J) -> R:
    """Return `work(job)`; an error that carries no message of ours gets the name of the layer."""
    try:
        return work(job)
    except (LoraqError, OSError):
        raise
    except Exception as error:
        raise layer_failure(job.name, error) from error


def _in_processes(work: Callable[[J], R], jobs: Sequence[J], workers: int) -> Generator[R]:
    waiting = list(reversed(jobs))
    busy: dict[Connection, tuple[BaseProcess, J]] = {}
    processes = []
    try:
        for _ in range(workers):
            process, connection = _start(work)
            processes.append(process)
            busy[connection] = (process, waiting.pop())
            connection.send(busy[connection][1])
        while busy:
            for connection in set(busy).intersection(wait(list(busy))):
                process, job = busy.pop(connection)
                result = _receive(connection, process, job)
                if waiting:
                    busy[connection] = (process, waiting.pop())
                    connection.send(busy[connection][1])
                yield result
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _start(work: Callable[[Any], Any]) -> tuple[BaseProcess, Connection]:
    """Start a worker that never sees SIGINT: it inherits a mask that blocks it from the start."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    resource_tracker.ensure_running()  # would unblock SIGINT if the first process had to start it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return process, ours


def _receive(connection: Connection, process: BaseProcess, job: Named) -> Any:
    try:
        done, result = connection.recv()
    except (EOFError, ConnectionError) as error:
        process.join()
        code = process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise LayerError(
            f"Layer '{job.name}' failed: its worker {how}. If memory ran out, use fewer workers."
        ) from error
    if not done:
        raise result
    return result


def _serve(connection: Connection, work: Callable[[Any], Any]) -> None:
    """Do jobs until the parent has gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, attempt(work, job)))
        except (LoraqError, OSError) as error:
            connection.send((False, error))


def _end_with_parent() -> None:
    """End this process when its parent has ended, so that it cannot disturb a next run."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
