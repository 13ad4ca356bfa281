"""Which installable packages leave less error than LoRaQ at the same stored bytes?

Every rival in `packages/` is installed into its own environment and quantizes the same weights as
our methods, without data, through its public interface where it has one: `packages/NAME.txt` says
which version, `packages/run_NAME.py` how.

Reading guide: "bits" are those of every tensor that is stored for a weight, scales, zero points and
factors included ("*": counted as packed, because the package keeps unpacked codes or only
simulates). "weight" is the relative weight error; A16, A8 and A4 are relative output errors on
synthetic heavy-tailed inputs, with the main path's input left alone or rounded by our 8- and 4-bit
formats of the rival's family. A rival's branch always sees 16-bit inputs, ours 8-bit ones beside A8
and A4. "-" stands where the package rotates its input itself. The right half is LoRaQ at the
default effort in the same or fewer bytes: main format of the family, or `int4_b128` where the bytes
do not pay for a branch beside that; 6-bit factors, no rotation. The ratios are the rival's error
over LoRaQ's: above 1 LoRaQ is better. "CPU s" is process time of one thread for all weights of a
table, the first call included.

1152x1152 and 1152x4608 are `matrices.dit_like`; "digits" are linear layers of the trained
transformer that ships with the package, with ranks scaled to their width. Slow rivals run on the
square weight only.

    python -m benchmarks.rivals.run [--only NAME ...] [--quick] [--save]
"""

import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.quality.methods import NOMINAL, Entry, Measured, output_error, trained_layers
from benchmarks.record import options, report
from benchmarks.rivals.environment import RivalError, environment, run_runner
from benchmarks.rivals.packages.contract import SQUARE, rank_of
from benchmarks.rivals.row import Found, RivalRow
from benchmarks.worlds.matrices import dit_like, heavy_tailed
from loraq.budget import Budget, with_rank
from loraq.errors import SchemeError
from loraq.evaluation.metrics import relative_error
from loraq.formats import get_format
from loraq.methods import RTN, LoRaQ, Method, SVDQuant, layer_seed
from loraq.scheme import Branch, Scheme

RUNNERS = Path(__file__).parent / "packages"
#: Activation formats of the main path for each family of codes, by column.
ACTIVATIONS = {
    "int4": {"A16": "bf16", "A8": "int8", "A4": "int4"},
    "mxfp4": {"A16": "bf16", "A8": "mxint8", "A4": "mxfp4"},
    "nvfp4": {"A16": "bf16", "A8": "mxint8", "A4": "nvfp4"},
}
#: Main formats of LoRaQ beside a rival of a family: the first that leaves bytes for a branch.
MAINS = {
    "int4": ("int4", "int4_b128"),
    "mxfp4": ("mxfp4", "int4_b128"),
    "nvfp4": ("nvfp4", "int4_b128"),
}


@dataclass(frozen=True, eq=False)
class Weight:
    """A matrix, and inputs for its layer."""

    name: str
    #: The table it belongs to.
    table: str
    value: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.value.shape[0], self.value.shape[1]

    @cached_property
    def x(self) -> Tensor:
        """512 heavy-tailed inputs, channels of different size."""
        seed, n_in = layer_seed(100, self.name), self.shape[1]
        channels = torch.randn(n_in, generator=torch.Generator().manual_seed(seed))
        return heavy_tailed(512, n_in, seed=seed) * torch.exp(0.5 * channels)


class Ours:
    """Our methods, each scheme solved once for a weight."""

    def __init__(self) -> None:
        self._found: dict[object, Found] = {}

    def solve(self, weight: Weight, method: Method, scheme: Scheme, family: str) -> Found:
        """Return the errors of a method.

        A quantized branch sees 16 bits beside A16 and 8 bits else. The 4-bit column has its own
        solution if the method takes activations into account.
        """
        key = (weight.name, method, scheme, family)
        if key in self._found:
            return self._found[key]
        seed = layer_seed(0, weight.name)
        first = measured = Measured.of(Entry("", method, scheme), weight.value, seed)
        errors = {}
        for column, activation in ACTIVATIONS[family].items():
            branch = scheme.branch
            if branch and branch.weight != "bf16" and column != "A16":
                branch = replace(branch, activation="mxint8")
            asked = replace(scheme, activation=activation, branch=branch)
            if column == "A4" and isinstance(method, LoRaQ):
                measured = Measured.of(Entry("", method, asked), weight.value, seed)
            errors[column] = output_error(weight.value, measured.solution, asked, weight.x)
        self._found[key] = Found(
            first.solution.nbytes, first.solution.relative_error, errors, first.seconds
        )
        return self._found[key]

    def beside(self, table: str, rival: dict[Weight, Found], family: str) -> RivalRow | None:
        """Return LoRaQ at a rival's bytes, or `None` if they pay for no branch."""
        found, used = {}, set()
        for weight, theirs in rival.items():
            budget = Budget(bits_per_weight=8 * theirs.nbytes / weight.value.numel())
            scheme = _affordable(weight.shape, family, budget)
            if scheme is None:
                return None
            found[weight] = self.solve(weight, LoRaQ(), scheme, family)
            used.add(f"{scheme.weight} r{scheme.branch.rank}")
        label = used.pop() if len(used) == 1 else f"{len(used)} ranks"
        return RivalRow.of(table, label, pairs(found), family=family)


def pairs(found: dict[Weight, Found]) -> list[tuple[Tensor, Found]]:
    """Return what was found of each matrix."""
    return [(weight.value, one) for weight, one in found.items()]


def _affordable(shape: tuple[int, int], family: str, budget: Budget) -> Scheme | None:
    for main in MAINS[family]:
        try:
            return with_rank(Scheme(main, branch=Branch(weight="mxfp6_e2m3")), shape, budget)
        except SchemeError:
            continue
    return None


def our_rows(table: str, weights: list[Weight], ours: Ours, *, best: bool) -> list[RivalRow]:
    """Return plain rounding, and our methods in the bytes of a 16-bit branch of `rank_of`."""
    lines: list[tuple[str, Method, str, Branch | None]] = []
    for main in ACTIVATIONS:
        lines.append((f"RTN {main}", RTN(), main, None))
        lines.append((f"SVDQuant {main} w16, one-shot", SVDQuant(scale_rule=None), main, Branch()))
        for name, branch in NOMINAL.items():
            open_branch = Branch(weight=branch.weight)
            lines.append((f"LoRaQ {main} {name[: name.index('a')]}", LoRaQ(), main, open_branch))
            if best:
                lines.append(
                    (
                        f"LoRaQ {main} {name[: name.index('a')]}, best",
                        LoRaQ.at("best"),
                        main,
                        open_branch,
                    )
                )
    lines.append(("RTN int5", RTN(), "int5", None))
    rows = []
    for label, method, main, branch in lines:
        family = main if main in ACTIVATIONS else "int4"
        found = {}
        for weight in weights:
            scheme = with_rank(
                Scheme(main, branch=branch), weight.shape, Budget(rank_16bit=rank_of(weight.value))
            )
            found[weight] = ours.solve(weight, method, scheme, family)
        rows.append(RivalRow.of(table, f"our {label}", pairs(found), family=family))
    return rows


def judge(weight: Weight, line: dict, folder: Path) -> Found:
    """Return the errors of what a rival's runner wrote for one weight."""
    parts = load_file(folder / line["file"])
    main, branch = parts["main"], parts.get("branch", torch.zeros(weight.shape))
    exact, errors = weight.x @ weight.value.T, {}
    for column, activation in ACTIVATIONS[line["family"]].items():
        rounded = weight.x if column == "A16" else get_format(activation).for_rows().round(weight.x)
        known = line["splits"] or column == "A16"
        errors[column] = (
            relative_error(exact, rounded @ main.T + weight.x @ branch.T) if known else None
        )
    return Found(
        line["nbytes"], relative_error(weight.value, main + branch), errors, line["seconds"]
    )


def rival_rows(
    name: str,
    python: Path,
    weights: list[Weight],
    ours: Ours,
    *,
    limit: float,
    runners: Path = RUNNERS,
) -> tuple[list[RivalRow], list[str]]:
    """Run one rival and return its rows, and a line for everything that failed."""
    package = (runners / f"{name}.txt").read_text().strip()
    found: dict[tuple[str, str, str, str], dict[Weight, Found]] = defaultdict(dict)
    failures: dict[str, None] = {}  # a set in the order of insertion
    by_name = {weight.name: weight for weight in weights}
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "weights.safetensors", Path(folder) / "out"
        out.mkdir()
        save_file({weight.name: weight.value for weight in weights}, source)
        lines, reason = run_runner(python, runners / f"run_{name}.py", source, out, limit)
        if reason:
            failures[f"{name}: {reason}"] = None
        for line in lines:
            weight = by_name[line["weight"]]
            if "error" in line:
                failures[f"{name} {line['variant']}, {weight.table}: {line['error']}"] = None
                continue
            key = (weight.table, f"{name} {line['variant']}", line["family"], line["counted"])
            found[key][weight] = judge(weight, line, out)
    rows = []
    for (table, label, family, counted), of_weights in found.items():
        wanted = sum(weight.table == table for weight in weights)
        if len(of_weights) < wanted:
            failures[f"{label}, {table}: only {len(of_weights)} of {wanted} weights, left out"] = (
                None
            )
            continue
        beside = ours.beside(table, of_weights, family)
        more = {"family": family, "package": package, "counted": counted, "loraq": beside}
        rows.append(RivalRow.of(table, label, pairs(of_weights), **more))
    return rows, list(failures)


def show(rows: list[RivalRow], table: str, n_weights: int) -> None:
    """Print one table, by stored bits."""
    columns = "".join(f"{name:>8}" for name in ("bits", "weight", "A16", "A8", "A4"))
    print(f"\n{table}, {n_weights} weight(s)\n")
    print(f"{'':46}{columns}{'CPU s':>8}   LoRaQ at these bytes{columns}{'weight':>9}{'A4':>7}")
    for row in sorted(rows, key=lambda row: (row.bits_per_weight, -row.weight_error)):
        mark = "" if row.counted == "stored" else " *"
        line = f"{row.label + mark:46}{_figures(row)}{row.seconds:8.2f}"
        if row.loraq:
            ratio = row.weight_error / row.loraq.weight_error
            line += f"   {row.loraq.label:20}{_figures(row.loraq)}{ratio:9.3f}"
            theirs, ours = row.output_errors["A4"], row.loraq.output_errors["A4"]
            line += f"{theirs / ours:7.3f}" if theirs and ours else f"{'-':>7}"
        elif not row.label.startswith("our "):
            line += "   no branch fits"
        print(line)


def _figures(row: RivalRow) -> str:
    errors = "".join(
        "       -" if error is None else f"{error:8.4f}" for error in row.output_errors.values()
    )
    return f"{row.bits_per_weight:8.3f}{row.weight_error:8.4f}{errors}"


def weights_to_quantize(*, quick: bool) -> list[Weight]:
    """Return the weights of all tables; with `quick` the square one only."""
    weights = [Weight(SQUARE, SQUARE, dit_like(1152, 1152))]
    if not quick:
        weights.append(Weight("1152x4608", "1152x4608", dit_like(1152, 4608, seed=1)))
        weights += [
            Weight(name, "digits", value) for name, value in trained_layers("int4", every=4).items()
        ]
    return weights


def main() -> None:
    """Install and run all rivals, print the tables, the failures and the JSON line."""
    names = sorted(path.stem for path in RUNNERS.glob("*.txt"))
    chosen = options(
        __doc__,
        only=(("",), f"only these rivals; known: {', '.join(names)}"),
        environments=(
            str(Path.home() / ".cache" / "loraq-rivals"),
            "folder of the rivals' environments",
        ),
        limit=(3600, "seconds after which a rival is stopped"),
        quick="only the square weight",
    )
    only = [name for name in chosen.only if name]
    if unknown := sorted(set(only) - set(names)):
        raise SystemExit(f"Unknown rivals: {', '.join(unknown)}. Known: {', '.join(names)}.")
    weights, ours = weights_to_quantize(quick=chosen.quick), Ours()
    rows: list[RivalRow] = []
    failures: list[str] = []
    for name in only or names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            python = environment(RUNNERS / f"{name}.txt", Path(chosen.environments))
        except RivalError as error:
            failures.append(f"{name}: {error}")
            continue
        more, failed = rival_rows(name, python, weights, ours, limit=chosen.limit)
        rows += more
        failures += failed
    for table in dict.fromkeys(weight.table for weight in weights):
        of_table = [weight for weight in weights if weight.table == table]
        rows += our_rows(table, of_table, ours, best=table == SQUARE)
        show([row for row in rows if row.group == table], table, len(of_table))
    print("\nCould not be measured:" if failures else "\nAll rivals were measured.")
    for failure in failures:
        print(f"  {failure}")
    records = [row.to_record() for row in rows]
    report([*records, *({"failure": failure} for failure in failures)], save=chosen.save)


if __name__ == "__main__":
    main()
