"""Run inputs and judge what came of them."""

import resource
import signal
import sys
import tempfile
import time
import traceback
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from loraq.errors import LoraqError
from tests.fuzz.readers import READERS, Reader, copy_files

#: What a refusal may take: seconds of this process, bytes of its message.
MOST_SECONDS, MOST_BYTES = 1.0, 4096
#: What anything may take before it is stopped, and the memory that an input may add.
_STOP_SECONDS, _MOST_MEMORY = 20, 1 << 30


@dataclass
class Tally:
    """What became of the inputs of one reader."""

    reader: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    longest: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        """Count the inputs of another tally of the same reader too."""
        self.inputs += other.inputs
        self.accepted += other.accepted
        self.refused += other.refused
        self.slowest = max(self.slowest, other.slowest)
        self.longest = max(self.longest, other.longest)
        self.failures += other.failures


def run(name: str, seed: int, indexes: range) -> Tally:
    """Run some inputs of a reader."""
    if (small := str(Path(__file__).parents[1] / "integrations")) not in sys.path:
        sys.path.insert(0, small)  # small transformers
    reader, tally = READERS[name](), Tally(name)
    with tempfile.TemporaryDirectory(prefix="loraq-fuzz-") as home, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        valid = Path(home) / "valid"
        valid.mkdir()
        reader.make(valid)
        _require_valid(reader, copy_files(valid, Path(home) / "input"))
        for index in indexes:
            once = _run_once(reader, f"{name}/{seed}/{index}", valid, index)
            if once.slowest > MOST_SECONDS:  # perhaps the machine was busy
                again = _run_once(reader, f"{name}/{seed}/{index}", valid, index)
                once = min(once, again, key=lambda each: each.slowest)
            tally.add(once)
    return tally


def _run_once(reader: Reader, seed: str, valid: Path, index: int) -> Tally:
    tally = Tally("")
    folder = copy_files(valid, valid.with_name("input"))
    _run_one(reader, Random(seed), folder, index, tally)
    return tally


def _require_valid(reader: Reader, folder: Path) -> None:
    """Require that a reader accepts its files as they are; it also warms up what is lazy."""
    if folder.joinpath("header.json").exists():
        folder.joinpath("header.json").unlink()
    if reader.__class__.__name__ != "Recipes":
        reader.read(folder)


def _run_one(reader: Reader, random: Random, folder: Path, index: int, tally: Tally) -> None:
    tally.inputs += 1
    try:
        reader.mutate(random, folder)
    except Exception:  # a fault of the mutation, which must not hide what other inputs find
        tally.failures.append((index, f"the mutation: {traceback.format_exc(limit=-3)}"))
        return
    memory, begin, failure = _peak_memory(), time.process_time(), ""
    try:
        with _stop_after(_STOP_SECONDS):
            reader.read(folder)
        tally.accepted += 1
    except LoraqError as error:
        seconds, message = time.process_time() - begin, str(error)
        tally.refused += 1
        tally.slowest = max(tally.slowest, seconds)
        tally.longest = max(tally.longest, len(message.encode(errors="backslashreplace")))
        failure = _judge(message, seconds)
    except BaseException:
        failure = traceback.format_exc(limit=-6)
    if _peak_memory() - memory > _MOST_MEMORY:
        failure = f"it took {(_peak_memory() - memory) >> 20} MiB. {failure}"
    if failure:
        tally.failures.append((index, failure))


def _judge(message: str, seconds: float) -> str:
    """Return what is wrong with a refusal, or ""."""
    if seconds > MOST_SECONDS:
        return f"refused after {seconds:.2f} s: {message[:500]!r}"
    if not message or len(message.encode(errors="backslashreplace")) > MOST_BYTES:
        return f"a message of {len(message)} characters: {message[:500]!r}"
    strange = [c for c in message if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    return f"a message with {strange[:5]!r}: {message[:500]!r}" if strange else ""


@contextmanager
def _stop_after(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in what takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"stopped after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _peak_memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
