"""Kill ranks, agents and whole hosts of a cluster at random: `python -m tests.crash.ranks`.

After each kill, what is left ends by itself: done, or with an error. Then the same command again
does what is missing, and nothing else, and its bytes are those of one process.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import loraq
from tests.clusters import Cluster, finished, make_source, solved
from tests.folders import files_of

#: Hosts, and ranks on each.
_SHAPES = ((1, 2), (1, 3), (2, 1), (2, 2))
#: Seconds after which what a kill has left must have ended: torchrun gives a rank 30 to end.
_PATIENCE = 120.0


def kill(cluster: Cluster, chance: random.Random) -> str:
    """Kill something of a cluster; return what."""
    victims = cluster.processes()
    what = chance.choice(["rank", "rank", "agent", "host", "all"])
    ranks = [pid for pid, kind in victims.items() if kind != "agent"]
    agents = [pid for pid, kind in victims.items() if kind == "agent"]
    agent = cluster.agents[chance.randrange(cluster.hosts)].pid
    chosen = {
        "rank": [chance.choice(ranks)] if ranks else agents,
        "agent": [agent],
        "host": [agent, *(pid for pid in victims if _parent_of(pid) == agent)],
        "all": [*victims],
    }[what]
    for pid in chosen:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return what if ranks else "early"


def _parent_of(pid: int) -> int:
    with suppress(OSError):
        return int(Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[1])
    return 0


def try_one(place: Path, names: list[str], chance: random.Random) -> tuple[str, str]:
    """Kill one run and start it again; return what was killed, and what was wrong."""
    target = Path(tempfile.mkdtemp(dir=place)) / "out"
    source = place / "source.safetensors"
    command = ["-m", "loraq", "quantize", str(source), str(target), "--effort", "fast"]
    hosts, ranks = chance.choice(_SHAPES)
    after = chance.randrange(len(names) - 1)
    with Cluster(command, hosts, ranks) as cluster:
        while len(finished(target)) < after and cluster.agents[0].poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3) if after else chance.uniform(0, 8))
        what = f"{kill(cluster, chance)} of {hosts}×{ranks}"
        if not cluster.wait_for_end(_PATIENCE):
            return what, f"still there: {cluster.processes()}"
        done = {*names} if target.exists() else finished(target)
    with Cluster(command, hosts, ranks) as cluster:
        outputs = cluster.read_all(_PATIENCE)
        if any(agent.returncode for agent in cluster.agents):
            return what, "again: " + "\n".join(outputs)
    if sorted(solved(outputs[0])) != sorted({*names} - done):
        return what, f"{len(done)} were finished, and {len(solved(outputs[0]))} done again"
    if files_of(target) != files_of(place / "expected"):
        return what, "other bytes"
    if os.listdir(target.parent) != ["out"]:
        return what, f"left {os.listdir(target.parent)}"
    return f"{what}, {'whole' if len(done) == len(names) else 'cut off'}", ""


def main() -> int:
    """Run the trials."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash.ranks", description=__doc__)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts, failures, begin = Counter[str](), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        names = make_source(place / "source.safetensors", n_layers=12, width=224)
        recipe = {**loraq.Recipe.named("default").to_dict(), "effort": "fast"}
        loraq.quantize_checkpoint(
            place / "source.safetensors",
            place / "expected",
            loraq.Recipe.from_dict(recipe),
            progress=False,
        )
        for trial in range(options.trials):
            what, wrong = try_one(place, names, random.Random(options.seed * 1000 + trial))
            counts[what] += 1
            failures += bool(wrong)
            print(f"trial {trial}, {what}: {wrong or 'well'}", flush=True)
    found = ", ".join(f"{what} {counts[what]}" for what in sorted(counts))
    seconds = time.monotonic() - begin
    print(f"ranks: {options.trials} kills ({found}); {failures} failures, {seconds:.0f} s")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
