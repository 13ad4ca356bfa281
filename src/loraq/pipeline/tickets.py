"""Jobs as tickets on a board: the leader writes them, workers take them; see `ranks`."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from loraq import errors
from loraq.errors import LoraqError, layer_failure
from loraq.pipeline.board import Board, Pulse

#: Seconds after which a ticket whose pulse stands still is given to another worker.
LEASE = 15.0

#: Plain data: a job, and what it gave. Both have the "name" of a layer.
Data = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Which of the workers a process is."""

    #: Among all workers of the run.
    index: int
    #: Among those of its machine.
    local: int


class Work(Protocol):
    """What is done to each job; a worker process gets a copy by pickle."""

    def open(self, place: Place) -> Callable[[Data], Data]:
        """Set a worker up, once and before its first job, and return what does its jobs."""
        ...


class Tickets:
    """The leader's side of a phase: which jobs are open, and who seems to be lost."""

    def __init__(self, board: Board, phase: int, jobs: Sequence[Data]) -> None:
        self._board, self._phase = board, phase
        self._jobs: list[Data] = []
        #: Numbers of the jobs without a result; a job that was written twice has two.
        self.open: dict[int, Data] = {}
        #: The last pulse of each ticket that was taken, and when it was new.
        self._pulses: dict[int, tuple[int, float]] = {}
        self._looked = 0.0
        for job in jobs:
            self._write(job)

    def _write(self, job: Data) -> None:
        number = len(self._jobs)
        self._jobs.append(job)
        self.open[number] = job
        self._board.write(f"{self._phase}/ticket/{number}", {"job": job})

    def taken(self) -> list[int]:
        """Return the open tickets that somebody has taken."""
        n_taken = self._board.count(f"{self._phase}/next", 0)
        return [number for number in self.open if number < n_taken]

    def collect(self) -> Iterator[Data]:
        """Yield the results that have come."""
        for number in self.taken():
            key = f"{self._phase}/result/{number}"
            if number not in self.open or not self._board.has(key):
                continue
            result = result_of(self._board.read(key))
            name = self.open[number]["name"]
            self.open = {n: job for n, job in self.open.items() if job["name"] != name}
            yield result

    def renew_lost(self) -> None:
        """Write the tickets again whose pulse stands still; those that wait take them."""
        now = time.monotonic()
        if now < self._looked + 1:
            return
        self._looked = now
        for number in self.taken():
            pulse = self._board.count(f"{self._phase}/pulse/{number}", 0)
            last, since = self._pulses.setdefault(number, (pulse, now))
            if pulse != last:
                self._pulses[number] = pulse, now
            elif now > since + LEASE:
                # Once: from now on the new one is watched.
                self._pulses[number] = pulse, float("inf")
                self._write(self.open[number])

    def end(self, n_workers: int) -> None:
        """Let all who wait for a ticket go."""
        n_tickets = len(self._jobs)
        for number in range(n_tickets, n_tickets + n_workers):
            self._board.write(f"{self._phase}/ticket/{number}", {"end": n_tickets})


def take_tickets(board: Board, phase: int, work: Work, place: Place) -> int:
    """Do jobs until there are no more, and return how many tickets there were."""
    do: Callable[[Data], Data] | None = None

    def begin_and_do(job: Data) -> Data:
        nonlocal do
        do = do or work.open(place)
        return do(job)

    with Pulse(board) as pulse:
        while True:
            number = board.count(f"{phase}/next") - 1
            ticket = board.read(f"{phase}/ticket/{number}")
            if "end" in ticket:
                return int(ticket["end"])
            pulse.key = f"{phase}/pulse/{number}"
            result: Data
            try:
                result = {"done": attempt(begin_and_do, ticket["job"])}
            except (LoraqError, OSError) as error:
                result = {"error": type(error).__name__, "args": _args_of(error)}
            pulse.key = ""
            board.write(f"{phase}/result/{number}", result)


def attempt(do: Callable[[Data], Data], job: Data) -> Data:
    """Do a job; an error that carries no message of ours gets the name of the layer."""
    try:
        return do(job)
    except (LoraqError, OSError):
        raise
    except Exception as error:
        raise layer_failure(job["name"], error) from error


def _args_of(error: LoraqError | OSError) -> list[Any]:
    if isinstance(error, LoraqError):
        return [str(error)]
    return [error.errno, error.strerror, None if error.filename is None else str(error.filename)]


def result_of(result: Mapping[str, Any]) -> Data:
    """Return what a job gave, or raise what it raised."""
    if "error" in result:
        raise getattr(errors, result["error"], OSError)(*result["args"])
    return dict(result["done"])
