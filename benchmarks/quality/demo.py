"""What does `make demo` show?

Its rows with their figures, as the README has them: this prints what `loraq demo` prints, and
`--save` writes the rows to a result file. Seconds are wall time of the solver, two layers at a
time; "run" is the time of the whole demo, pictures included.

    python -m benchmarks.quality.demo --save
"""

import sys
import time

from benchmarks.record import options, report
from benchmarks.worlds.emoji import EMOJI
from loraq.cli.demo import print_demo
from loraq.evaluation.demo import run


def main() -> None:
    """Print the tables and the JSON line."""
    chosen = options(
        __doc__,
        workers=(2, "layers solved at a time (default: 2)"),
    )
    begin = time.monotonic()
    result = run(
        EMOJI.subject(),
        effort="fast",
        workers=chosen.workers,
        progress=lambda line: print(line, file=sys.stderr),
    )
    seconds = time.monotonic() - begin
    print_demo(result.rows)
    print(f"\nrun: {seconds:.0f} s")
    report([row.to_record() | {"run_seconds": seconds} for row in result.rows], save=chosen.save)


if __name__ == "__main__":
    main()
