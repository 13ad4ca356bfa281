"""How long a test lets something work that must be refused at once."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Seconds of this process's own work. This tells a refusal from a hang, and no more: `make fuzz`
#: holds refusals to one second.
PATIENCE = 10.0


@contextmanager
def at_once() -> Iterator[None]:
    """Fail if the block works for long; what else a busy machine does meanwhile does not count."""
    begin = time.process_time()
    yield
    assert time.process_time() - begin < PATIENCE
