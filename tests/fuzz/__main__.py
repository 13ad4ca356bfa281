"""`python -m tests.fuzz`: the counts of each reader, and how to repeat what failed."""

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from tests.fuzz.readers import READERS
from tests.fuzz.runs import Tally, run

#: Inputs that one process runs before it takes others.
_PIECE = 250


def main() -> int:
    """Run all readers, or one; returns 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=main.__doc__)
    parser.add_argument("--inputs", type=int, default=24_000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS, help="only this one")
    parser.add_argument("--index", type=int, help="only this input of --reader")
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    if asked.index is not None:
        tallies = {asked.reader: run(asked.reader, asked.seed, range(asked.index, asked.index + 1))}
    else:
        tallies = run_all(asked.inputs, asked.seed, asked.reader, asked.processes)
    return report(tallies, asked.seed)


def run_all(inputs: int, seed: int, only: str | None, processes: int) -> dict[str, Tally]:
    """Share inputs among the readers, and the readers among processes."""
    names = [only] if only else list(READERS)
    shares = {name: READERS[name]().share for name in names}
    counts = {name: -(-inputs * shares[name] // sum(shares.values())) for name in names}
    tallies = {name: Tally(name) for name in names}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting = [
            pool.submit(run, name, seed, range(start, min(start + _PIECE, count)))
            for name, count in counts.items()
            for start in range(0, count, _PIECE)
        ]
        for future in waiting:
            tally = future.result()
            tallies[tally.reader].add(tally)
    return tallies


def report(tallies: dict[str, Tally], seed: int) -> int:
    """Print the counts and the failures."""
    print(f"{'reader':22}{'inputs':>8}{'accepted':>10}{'refused':>9}{'failed':>8}", end="")
    print(f"{'slowest':>10}{'longest message':>17}")
    total = Tally("all")
    for name, tally in tallies.items():
        total.add(tally)
        _print_row(name, tally)
    _print_row("all", total)
    for name, tally in tallies.items():
        for index, failure in tally.failures:
            again = f"python -m tests.fuzz --reader {name} --seed {seed} --index {index}"
            print(f"\nFAILED: {again}\n{failure}")
    return 1 if total.failures else 0


def _print_row(name: str, tally: Tally) -> None:
    print(
        f"{name:22}{tally.inputs:8}{tally.accepted:10}{tally.refused:9}{len(tally.failures):8}"
        f"{tally.slowest:8.2f} s{tally.longest:15} B",
        flush=True,
    )


if __name__ == "__main__":
    begin = time.monotonic()
    code = main()
    print(f"\n{time.monotonic() - begin:.0f} s")
    sys.exit(code)
