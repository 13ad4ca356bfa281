"""Who does which layer: one engine for the cores of a machine, its GPUs, and many machines.

One process leads: it writes a ticket for each job, the longest first. Workers take tickets until
there are none. They meet on a board (`board`), where these keys stand; 2 is the phase of the run:

    2/ticket/7     the job; or that there are no more, and how many tickets there were
    2/next         how many tickets were taken: to take one is one atomic addition
    2/pulse/7      grows each second as long as the one who took ticket 7 is alive
    2/result/7     what the job gave, or the error that it ended with
    said/layout    what the leader tells all other ranks, by topic
    failed         grows when a rank ends with an error; then all end
    left           how many ranks have all that they need

A ticket whose pulse stands still is written once more, under the next number: what a lost worker
had is done by another one. If it was only slow, both give the same, and write the same bytes.

                    leads            works
    alone           this process     this process, without a board
    workers=N       this process     N children on one thread each
    torchrun        rank 0           every rank; of rank 0 a thread beside the leader

Children are spawned, not forked, leave Ctrl-C to their parent, and end when it ends, however that
happens. Which of all these does a layer never changes a byte.
"""

import atexit
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from loraq.errors import LayerError, LoraqWarning, RankError
from loraq.pipeline.board import Address, Board, Pulse, open_on_loopback, require_distributed
from loraq.pipeline.tickets import (
    LEASE,
    Data,
    Place,
    Tickets,
    Work,
    attempt,
    result_of,
    take_tickets,
)

#: Seconds between two looks at the board.
_LOOK = 0.02

_runs = count()


@dataclass
class Ranks:
    """The processes that share a run, as seen by one of them."""

    rank: int = 0
    #: How many run this program: 1 unless torchrun started more.
    size: int = 1
    #: Children that the leader starts; none if it works itself, and under torchrun.
    workers: int = 0
    board: Board | None = None
    address: Address | None = None
    #: Phases that have begun.
    phases: int = 0

    @property
    def leads(self) -> bool:
        """Whether this rank leads: it prepares, finishes, and speaks to the user."""
        return self.rank == 0

    def broadcast(self, topic: str, value: Any = None) -> Any:
        """Return what the leader gives for a topic; the others wait for it."""
        if self.size == 1:
            return value
        assert self.board is not None
        if self.leads:
            self.board.write(f"said/{topic}", value)
            return value
        return self.board.read(f"said/{topic}")

    def run(self, work: Work, jobs: Sequence[Data] = ()) -> Generator[Data]:
        """Yield what the work gives for each job, as it is ready; on every rank.

        Args:
            work: does one job.
            jobs: in the order in which they begin; those of the leader count.

        Raises:
            LayerError: a job failed with an error that is not loraq's own, or all workers were
                killed; the message names it.
            LoraqError, OSError: what a job raised.
        """
        self.phases += 1
        if self.board is None:
            do = work.open(Place(0, 0))
            yield from (attempt(do, job) for job in jobs)
        elif self.leads:
            yield from self._lead(work, jobs, self.board)
        else:
            place = Place(self.rank, _read_variable("LOCAL_RANK"))
            n_tickets = take_tickets(self.board, self.phases, work, place)
            keys = [f"{self.phases}/result/{number}" for number in range(n_tickets)]
            # Of a ticket that was written twice one result may be missing.
            yield from (result_of(self.board.read(key)) for key in keys if self.board.has(key))

    def _lead(self, work: Work, jobs: Sequence[Data], board: Board) -> Generator[Data]:
        tickets = Tickets(board, self.phases, jobs)
        n_children = min(self.workers, len(jobs))
        children = [self._start(work, index) for index in range(n_children)]
        try:
            with nullcontext() if self.size == 1 else _work_beside(board, self.phases, work):
                while tickets.open:
                    yield from tickets.collect()
                    tickets.renew_lost()
                    _require_one_alive(children, tickets)
                    time.sleep(_LOOK)
                tickets.end(n_children if self.size == 1 else self.size)
        finally:
            for child in children:
                child.kill()
            for child in children:
                child.join()

    def _start(self, work: Work, index: int) -> BaseProcess:
        """Start a child; it inherits a mask that blocks SIGINT from its first moment."""
        context = get_context("spawn")
        resource_tracker.ensure_running()  # would unblock SIGINT if the first process started it
        with _no_interrupts():
            child = context.Process(
                target=_serve,
                args=(self.address, self.phases, work, Place(index, index)),
                daemon=True,
            )
            child.start()
        return child


@contextmanager
def open_ranks(workers: int, *, at_least: int = 1) -> Iterator[Ranks]:
    """Join the processes that share a run: those that torchrun started, or children of this one.

    On an error of a rank all others end too. The first one raises it; the others end silently.

    Args:
        workers: how many layers are solved at a time, where torchrun does not say so.
        at_least: how many there should be, such as one for each device; torchrun knows better.

    Raises:
        MissingLibraryError: several are asked for, and torch was built without torch.distributed.
        RankError: the ranks that torchrun started cannot meet, or `workers` is given there, too.
    """
    size = _read_size()
    workers = max(workers, at_least) if size == 1 else workers
    if size == 1 and workers == 1:
        yield Ranks()
        return
    require_distributed()
    if size == 1:
        address, board = open_on_loopback()
        yield Ranks(workers=workers, board=board, address=address)
        return
    if workers > 1:
        raise RankError(
            f"torchrun started {size} ranks, which share the layers, and {workers} workers were "
            "asked for. Leave `--workers` (`workers=`) out: --nproc-per-node says how many work on "
            "each machine."
        )
    with _join(_read_rank(size), size) as ranks:
        yield ranks


def is_leader() -> bool:
    """Return whether this process speaks to the user: other ranks of torchrun do not."""
    return _read_size() == 1 or _read_variable("RANK") == 0


@contextmanager
def _join(rank: int, size: int) -> Iterator[Ranks]:
    address = Address(
        os.environ.get("MASTER_ADDR", "127.0.0.1"),
        _read_variable("MASTER_PORT", 29500, most=65535),
        # The store of an agent outlives the ranks that it starts again (`--max-restarts`).
        f"loraq/{_read_variable('TORCHELASTIC_RESTART_COUNT')}/{next(_runs)}",
    )
    # torchrun keeps a store itself, unless it was told not to.
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    board = address.connect(n_ranks=None if hosted else size, serve=not hosted and rank == 0)
    if rank:
        _be_quiet()
    with Pulse(board):
        try:
            yield Ranks(rank, size, board=board, address=address)
        except BaseException:
            try:
                speaks = board.count("failed") == 1
            except RankError:  # the store has gone
                speaks = rank == 0
            if not speaks:
                time.sleep(1)  # torchrun ends all when one has ended: the first has not spoken yet
                os._exit(1)
            raise
    board.count("left")
    patience = time.monotonic() + LEASE
    while rank == 0 and not hosted and board.count("left", 0) < size:  # it keeps the store
        if time.monotonic() > patience:
            break
        time.sleep(_LOOK)


@contextmanager
def _work_beside(board: Board, phase: int, work: Work) -> Iterator[None]:
    """Let a thread of the leader take tickets, too."""
    place = Place(0, _read_variable("LOCAL_RANK"))

    def take() -> None:
        with suppress(RankError):  # the leader finds that out, too
            take_tickets(board, phase, work, place)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        # An interpreter that ends in the middle of a layer may crash.
        atexit.register(_exit_at_once)
        raise
    thread.join()


def _exit_at_once() -> None:
    sys.stdout.flush()
    os._exit(1)


def _be_quiet() -> None:
    """Leave notes, and what is kept after Ctrl-C, to rank 0."""
    logging.getLogger("loraq").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", LoraqWarning)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _require_one_alive(children: list[BaseProcess], tickets: Tickets) -> None:
    """Let others do what a child had that was killed; raise `LayerError` if there are none."""
    dead = [child for child in children if not child.is_alive()]
    if not dead:
        return
    code = dead[-1].exitcode or 0
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    if len(dead) == len(children):
        lost = next(iter(tickets.taken() or tickets.open))
        raise LayerError(
            f"Layer '{tickets.open[lost]['name']}' failed: its worker {how}. If memory ran out, "
            "use fewer workers."
        )
    for child in dead:
        children.remove(child)
        warnings.warn(
            f"A worker {how}; the others do its layer. If memory ran out, use fewer workers.",
            LoraqWarning,
            stacklevel=2,
        )


def _serve(address: Address, phase: int, work: Work, place: Place) -> None:
    """Be a child."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    take_tickets(address.connect(), phase, work, place)


def _end_with_parent() -> None:
    """End this process when its parent has ended, so that it cannot disturb a next run."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Block SIGINT, for a child that is started meanwhile too."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _read_variable(name: str, default: int = 0, *, least: int = 0, most: int | None = None) -> int:
    """Return a number that torchrun has set."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise RankError(f"The environment says {name}={value!r}; torchrun sets it to a number.")
    if int(value) < least or (most is not None and int(value) > most):
        bound = f"at least {least}" if int(value) < least else f"at most {most}"
        raise RankError(f"The environment says {name}={value!r}, and it must be {bound}.")
    return int(value)


def _read_size() -> int:
    """Return how many ranks run this program; 1 unless torchrun has started it."""
    return _read_variable("WORLD_SIZE", 1, least=1)


def _read_rank(size: int) -> int:
    """Return which of them this process is."""
    if "RANK" not in os.environ:  # all would lead
        raise RankError(
            f"The environment says WORLD_SIZE={size} and no RANK. torchrun sets both; without it, "
            "give each process its own RANK, from 0 on, or unset WORLD_SIZE to run alone."
        )
    return _read_variable("RANK", most=size - 1)
