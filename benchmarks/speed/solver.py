"""How many seconds does the solver take for a layer, and where do they go?

Reading guide: process time (on a GPU wall time) of `LoRaQ` on synthetic transformer weights,
"s/layer" with the steps that the installed version takes at an effort, "ms/step" of each phase (1:
full-precision factors, 2: rounded ones), "ends" for all before, between and after them (SVDs, the
candidates that are stored). The largest shape takes a few steps only, and its s/layer is then ends
+ steps of the effort × ms/step, which the row says in "extrapolated". "rounding" is the share of
`Format.round` in the steps, "products" that of dense matrix products, "other" the rest: norms,
updates, inverses; on a GPU there are no shares.

It takes 3 to 6 minutes at the default effort, and three times as long at "best". What is to be
compared is measured in one run: a table is made of the newest one. Only names that every version of
the package has are used, so that an older one can be measured by the same script ("before" is the
commit that precedes the first profile of the solver):

    python -m benchmarks.speed.solver --label after --save
    python -m benchmarks.speed.solver --label after --effort fast default best --save
    git worktree add old 52424a7
    PYTHONPATH=old/src python -m benchmarks.speed.solver --label before --save
"""

import inspect
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.record import DEVICE, device_of, options, report
from benchmarks.worlds.matrices import dit_like
from loraq.formats import BlockFormat
from loraq.methods import EFFORTS, LoRaQ
from loraq.scheme import Branch, Scheme

#: (out, in), and whether all steps are taken.
SHAPES = {(1152, 1152): True, (1152, 4608): True, (3072, 12288): False}
TINY = (96, 128)
#: Main weight, its activations, weight and activations of the branch.
SCHEMES = {
    "mxfp4-a8+w6a8": ("mxfp4", "mxint8", "mxfp6_e2m3", "mxint8"),
    "int4-a8+w8a8": ("int4", "int8", "mxint8", "mxint8"),
}
#: Steps of both phases where not all are taken, and under the profiler.
FEW = (10, 4)
TOP = 6
ROUNDING = "loraq: rounding"
PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::baddbmm_"}


def main() -> None:
    """Print a table and the JSON line."""
    chosen = options(
        __doc__,
        label=("after", "written in every row: before or after"),
        effort=(("default",), f"of {', '.join(EFFORTS)}; several in turn (default: default)"),
        quick="without the largest",
        tiny="one small shape, to see that it runs",
        device=DEVICE,
    )
    if unknown := {*chosen.effort} - {*EFFORTS}:
        raise SystemExit(f"No such effort: {', '.join(unknown)}. Known: {', '.join(EFFORTS)}.")
    device = device_of(chosen.device)
    rows: list[dict[str, object]] = []
    print(
        f"{'shape':12}{'scheme':15}{'effort':8}{'s/layer':>9}{'ms/step 1':>11}{'ms/step 2':>11}"
        f"{'ends s':>8}   where"
    )
    for shape, complete in ({TINY: False} if chosen.tiny else SHAPES).items():
        if chosen.quick and not complete:
            continue
        weight = dit_like(*shape).to(device)
        for name, effort in product(SCHEMES, chosen.effort):
            scheme = scheme_of(name, shape)
            row = {
                "shape": list(shape),
                "scheme": name,
                "rank": scheme.branch.rank if scheme.branch else 0,
                "effort": effort,
            }
            row |= {"label": chosen.label, "package_commit": commit_of_the_package()}
            row |= seconds_of(weight, scheme, EFFORTS[effort], complete)
            if device.type == "cpu":  # what the host does while a GPU works tells nothing
                row |= shares_of(weight, scheme)
            rows.append(row)
            show(row)
    print()
    report(rows, save=chosen.save, device=device.type)


def scheme_of(name: str, shape: tuple[int, int]) -> Scheme:
    """Return a scheme with the largest rank that takes no more bytes than 16 bits at rank 32."""
    main, activation, weight, inner = SCHEMES[name]
    allowed = 2 * 32 * sum(shape)
    rank = max(r for r in range(1, 129) if Branch(r, weight).nbytes(shape) <= allowed)
    return Scheme(main, activation, Branch(rank, weight, inner))


def watched(
    steps: tuple[int, int], around: Callable[[str], AbstractContextManager[object]]
) -> LoRaQ:
    """Return a solver each of whose phases runs inside a context that `around` makes."""

    class Watched(LoRaQ):
        def _anneal(self, *args: Any) -> Any:
            with around("anneal"):
                return super()._anneal(*args)

        def _refine(self, *args: Any) -> Any:
            with around("refine"):
                return super()._refine(*args)

    return Watched(steps=steps[0], refine_steps=steps[1])


def seconds_of(
    weight: Tensor, scheme: Scheme, planned: tuple[int, int], complete: bool
) -> dict[str, object]:
    """Return seconds for a layer with planned steps, and for each step of both phases."""
    spent: dict[str, float] = {}

    @contextmanager
    def clock(name: str) -> Iterator[None]:
        begin = now(weight.device)
        yield
        spent[name] = now(weight.device) - begin

    steps = planned if complete else FEW
    # What is done once in a process.
    LoRaQ(steps=2, refine_steps=2).solve(weight[:256, :512], scheme)
    with clock("layer"):
        watched(steps, clock).solve(weight, scheme)
    each = [spent["anneal"] / steps[0], spent["refine"] / steps[1]]
    ends = spent["layer"] - spent["anneal"] - spent["refine"]
    return {
        "seconds": ends + each[0] * planned[0] + each[1] * planned[1],
        "extrapolated": not complete,
        "default_steps": list(planned),
        "measured_steps": list(steps),
        "seconds_per_step": each,
        "seconds_of_ends": ends,
    }


def now(device: torch.device) -> float:
    """Return the process time; on a GPU the wall time, once all work is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def shares_of(weight: Tensor, scheme: Scheme) -> dict[str, object]:
    """Return the shares of rounding, of matrix products and of the largest operators."""
    profiles: list[profile] = []

    def watch(name: str) -> profile:
        profiles.append(profile(activities=[ProfilerActivity.CPU]))
        return profiles[-1]

    with rounding_marked():
        watched(FEW, watch).solve(weight, scheme)
    events = [event for found in profiles for event in found.key_averages()]
    own: dict[str, float] = defaultdict(float)
    for event in events:
        own[event.key] += event.self_cpu_time_total
    total = sum(own.values())
    rounding = sum(event.cpu_time_total for event in events if event.key == ROUNDING) / total
    products = sum(own[name] for name in PRODUCTS) / total
    top = sorted(
        ((own[name] / total, name) for name in own if name.startswith("aten::")), reverse=True
    )[:TOP]
    return {
        "share_of_rounding": rounding,
        "share_of_products": products,
        "share_of_the_rest": 1 - rounding - products,
        "top_operators": {name.removeprefix("aten::"): share for share, name in top},
    }


@contextmanager
def rounding_marked() -> Iterator[None]:
    """Give the rounding of block formats a name in profiles."""
    plain = BlockFormat.round

    def marked(*args: Any, **kwargs: Any) -> Tensor:
        with record_function(ROUNDING):
            return plain(*args, **kwargs)

    BlockFormat.round = marked  # type: ignore[method-assign]
    try:
        yield
    finally:
        BlockFormat.round = plain  # type: ignore[method-assign]


def commit_of_the_package() -> str:
    """Return the commit of the package that is measured, which need not be this script's."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    folder = Path(inspect.getfile(BlockFormat)).parent
    return (
        subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip()
        or "unknown"
    )


def show(row: dict) -> None:
    """Print one line."""
    names = (("rounding", "rounding"), ("products", "products"), ("other", "the_rest"))
    where = ""
    if "top_operators" in row:
        shares = ", ".join(f"{what} {row[f'share_of_{key}']:.0%}" for what, key in names)
        top = ", ".join(f"{name} {share:.0%}" for name, share in row["top_operators"].items())
        where = f"{shares} ({top})"
    first, second = (1e3 * seconds for seconds in row["seconds_per_step"])
    shape = "×".join(map(str, row["shape"]))
    print(
        f"{shape:12}{row['scheme']:15}{row['effort']:8}{row['seconds']:8.2f}"
        f"{'*' if row['extrapolated'] else ' '}{first:11.1f}{second:11.1f}"
        f"{row['seconds_of_ends']:8.2f} "
        f"  {where}",
        flush=True,
    )


if __name__ == "__main__":
    main()
