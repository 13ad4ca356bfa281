"""What does each method buy for its stored bytes and its time?

Reading guide: every figure is the relative weight error divided by that of one-shot SVDQuant with a
16-bit rank-32 branch, the same main format and direct scales ("absmax" or "floor"), on the same
matrix in the same run: less is better, 1 is that baseline. "CPU s" is process time of one thread
for a layer, "bits" what is stored for each weight, all scales counted. "Nominal" ranks cost the
bytes of the baseline's branch if scales were free, as in the paper; "strict" ranks cost them with
scales. A plain 5-bit format without a branch is the honest rival: on hardware that has one, it is
simpler.

1. Synthetic transformer weights (`matrices.dit_like`), with the bars that the solver must keep.
2. What the three effort levels buy.
3. The linear layers of the digits transformer of the repository: trained weights. A
   16-bit rank-5 branch takes the share of bytes there that rank 32 takes at width 1152.
4. Relative error of the layer's output when activations are rounded as well, on synthetic
   heavy-tailed activations. Weight error alone does not decide that: a large 4-bit part and a large
   branch that cancel lose it again.
"""

import time
from collections import defaultdict
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.record import options, report
from benchmarks.worlds.matrices import dit_like, heavy_tailed
from loraq.budget import Budget, with_rank
from loraq.evaluation.digits import transformer_folder
from loraq.methods import EFFORTS, LQER, RTN, LoRaQ, Method, SVDQuant
from loraq.nn import QuantizedLinear
from loraq.packed import LayerSolution
from loraq.recipe import Recipe
from loraq.scheme import Branch, Scheme

Row = dict[str, object]

#: Branches of the bytes of a 16-bit rank-32 one if scales were free.
NOMINAL = {"w16a16": Branch(32), "w8a8": Branch(64, "mxint8"), "w6a6": Branch(85, "mxfp6_e2m3")}
NOMINAL |= {"w4a8": Branch(128, "mxfp4")}
#: Bars on the mean ratio over the shapes, and on CPU seconds for each shape.
ERROR_BARS = {
    "int4": {"w16a16": 0.70, "w8a8": 0.56, "w6a6": 0.54, "w4a8": 0.60},
    "mxfp4": {"w16a16": 0.73, "w8a8": 0.62, "w6a6": 0.60, "w4a8": 0.66},
}
SECONDS_BARS = {(1152, 1152): 6.0, (1152, 4608): 20.0}
BASELINE = SVDQuant(scale_rule=None)
#: How many times LoRaQ's error SVDQuant x100 with scale search is to have, beside the same branch.
RIVAL_BAR, JUDGED_BRANCHES = 1.20, ("w8a8", "w6a6")


@dataclass(frozen=True)
class Entry:
    """One line of a table: a method and what it is asked for."""

    label: str
    method: Method
    scheme: Scheme
    bar: float | None = None


@dataclass(frozen=True)
class Measured:
    """A solution and what it cost."""

    solution: LayerSolution
    seconds: float

    @classmethod
    def of(cls, entry: Entry, weight: Tensor, seed: int = 0) -> "Measured":
        """Solve once and take the process time."""
        start = time.process_time()
        solution = entry.method.solve(weight, entry.scheme, seed=seed)
        return cls(solution, time.process_time() - start)


def opened(branch: Branch) -> Branch:
    """Return the branch with its rank left to a budget."""
    return replace(branch, rank=0)


def rival_label(name: str) -> str:
    """Return how alternated SVDQuant with a quantized branch is called."""
    return f"SVDQuant r{NOMINAL[name].rank} {name} x100"


def own_label(name: str) -> str:
    """Return how LoRaQ with a branch is called."""
    return f"LoRaQ r{NOMINAL[name].rank} {name}"


def judge_rivals(
    main: str, ratios: dict[tuple[str, tuple[int, int]], list[float]], shapes: list[tuple[int, int]]
) -> list[Row]:
    """Print and return how much more error SVDQuant x100 has than LoRaQ, beside the same branch.

    The mean over shapes of the mean over seeds, run by run.
    """
    rows: list[Row] = []
    for name in JUDGED_BRANCHES:
        ours = own_label(name)
        over = [
            fmean(
                theirs / own
                for theirs, own in zip(
                    ratios[rival_label(name), shape], ratios[ours, shape], strict=True
                )
            )
            for shape in shapes
        ]
        kept, shown = fmean(over) >= RIVAL_BAR, " ".join(f"{ratio:.3f}" for ratio in over)
        print(
            f"SVDQuant x100 / LoRaQ, {main} {name}: {shown}, mean {fmean(over):.3f}, "
            f"bar {RIVAL_BAR:.2f} {verdict(kept)}"
        )
        rows.append({"table": "same branch", "main": main, "branch": name, "ratios": over})
    return rows


def verdict(kept: bool) -> str:
    """Return how a bar is shown."""
    return "met" if kept else "MISSED"


def entries(main: str, shape: tuple[int, int]) -> list[Entry]:
    """Return all lines of the first table for one shape."""
    plain, r32 = Scheme(main), Scheme(main, branch=NOMINAL["w16a16"])
    lines = [
        Entry("RTN, direct scales", RTN(scale_rule=None), plain),
        Entry("RTN", RTN(), plain),
        Entry("RTN int5", RTN(), Scheme("int5")),
        Entry("LQER r32 w16a16", LQER(), r32),
        Entry("SVDQuant r32 w16a16, direct", BASELINE, r32),
        Entry("SVDQuant r32 w16a16", SVDQuant(), r32),
        Entry("SVDQuant r32 w16a16 x100", SVDQuant(rounds=100), r32),
    ]
    for name, branch in NOMINAL.items():
        if branch.weight != "bf16":
            scheme = Scheme(main, branch=branch)
            lines.append(Entry(rival_label(name), SVDQuant(rounds=100), scheme))
    for name, branch in NOMINAL.items():
        bar = ERROR_BARS.get(main, {}).get(name)
        lines.append(Entry(own_label(name), LoRaQ(), Scheme(main, branch=branch), bar))
    for name, branch in NOMINAL.items():
        if branch.weight != "bf16":
            strict = with_rank(Scheme(main, branch=opened(branch)), shape)
            lines.append(Entry(f"LoRaQ {name} strict", LoRaQ(), strict))
    return lines


def synthetic_weights(mains: list[str], shapes: list[tuple[int, int]], seeds: range) -> list[Row]:
    """Table 1: every method on matrices that look like a transformer's."""
    rows: list[Row] = []
    for main in mains:
        ratios: dict[tuple[str, tuple[int, int]], list[float]] = defaultdict(list)
        seconds: dict[tuple[str, tuple[int, int]], list[float]] = defaultdict(list)
        bits: dict[tuple[str, tuple[int, int]], float] = {}
        for shape in shapes:
            for seed in seeds:
                weight = dit_like(*shape, seed=seed)
                base = BASELINE.solve(weight, Scheme(main, branch=NOMINAL["w16a16"])).relative_error
                for entry in entries(main, shape):
                    measured, key = Measured.of(entry, weight, seed), (entry.label, shape)
                    ratios[key].append(measured.solution.relative_error / base)
                    seconds[key].append(measured.seconds)
                    bits[key] = measured.solution.bits_per_weight
        print(
            f"\n1. Synthetic weights, main {main}, {len(seeds)} seed(s): error / SVDQuant r32 "
            f"w16a16, direct scales\n"
        )
        print(
            f"{'':28}"
            + "".join(f"{f'{m}x{n}':>10}{'CPU s':>7}{'bits':>7}" for m, n in shapes)
            + f"{'mean':>8}   bar"
        )
        for entry in entries(main, shapes[0]):
            keys = [(entry.label, shape) for shape in shapes]
            mean = fmean(fmean(ratios[key]) for key in keys)
            in_time = all(fmean(seconds[key]) <= SECONDS_BARS[key[1]] for key in keys)
            line = f"{entry.label:28}"
            line += "".join(
                f"{fmean(ratios[key]):10.3f}{fmean(seconds[key]):7.2f}{bits[key]:7.3f}"
                for key in keys
            )
            line += f"{mean:8.3f}"
            if entry.bar is not None:
                complete = len(shapes) == len(SECONDS_BARS)
                line += f"   {entry.bar:.2f} " + (
                    verdict(mean <= entry.bar) if complete else "(for both shapes)"
                )
                line += f", time {verdict(in_time)}"
            print(line)
            rows += [
                {
                    "table": "synthetic",
                    "main": main,
                    "method": label,
                    "shape": shape,
                    "bar": entry.bar,
                }
                | {"mean_over_shapes": mean, "bits_per_weight": bits[label, shape]}
                | {"ratios": ratios[label, shape], "cpu_seconds": seconds[label, shape]}
                for label, shape in keys
            ]
        rows += judge_rivals(main, ratios, shapes)
    return rows


def effort_levels(mains: list[str], seeds: range) -> list[Row]:
    """Table 2: error and time of each effort level."""
    rows: list[Row] = []
    shape = (1152, 1152)
    for main in mains:
        print(
            f"\n2. Effort levels on 1152x1152, main {main}, {len(seeds)} seed(s): ratio as above, "
            f"CPU s\n"
        )
        print(f"{'':16}" + "".join(f"{effort:>14}{'CPU s':>8}" for effort in EFFORTS))
        weights = [dit_like(*shape, seed=seed) for seed in seeds]
        bases = [
            BASELINE.solve(weight, Scheme(main, branch=NOMINAL["w16a16"])).relative_error
            for weight in weights
        ]
        for name, branch in NOMINAL.items():
            line = f"r{branch.rank} {name}".ljust(16)
            for effort in EFFORTS:
                entry = Entry(effort, LoRaQ.at(effort), Scheme(main, branch=branch))
                runs = [
                    Measured.of(entry, weight, seed)
                    for seed, weight in zip(seeds, weights, strict=True)
                ]
                ratio = fmean(
                    run.solution.relative_error / base
                    for run, base in zip(runs, bases, strict=True)
                )
                seconds = fmean(run.seconds for run in runs)
                line += f"{ratio:14.3f}{seconds:8.2f}"
                rows.append(
                    {"table": "effort", "main": main, "branch": name, "effort": effort}
                    | {"ratio": ratio, "cpu_seconds": seconds}
                )
            print(line)
    return rows


def trained_layers(main: str, every: int) -> dict[str, Tensor]:
    """Return every n-th weight of the digits transformer that a recipe quantizes."""
    recipe = Recipe.of(Scheme(main))
    tensors = load_file(transformer_folder() / "diffusion_pytorch_model.safetensors")
    layers = {
        name.removesuffix(".weight"): t
        for name, t in tensors.items()
        if name.endswith(".weight") and t.dim() == 2
    }
    chosen = [
        name
        for name, weight in layers.items()
        if recipe.scheme_for(name, (weight.shape[0], weight.shape[1]), "PixArtTransformer2DModel")
    ]
    return {name: layers[name].float() for name in chosen[::every]}


def trained_weights(mains: list[str], every: int) -> list[Row]:
    """Table 3: mean error over the layers of a trained model, at equal stored bytes."""
    rows: list[Row] = []
    same_bytes, as_int5, r5 = Budget(rank_16bit=5), Budget(bits_per_weight=5.25), Branch(5)
    for main in mains:
        lines = {
            "RTN": (RTN(), Scheme(main)),
            "SVDQuant r5 w16a16, direct": (BASELINE, Scheme(main, branch=r5)),
            "SVDQuant r5 w16a16": (SVDQuant(), Scheme(main, branch=r5)),
            "SVDQuant r5 w16a16 x100": (SVDQuant(rounds=100), Scheme(main, branch=r5)),
            "LoRaQ r5 w16a16": (LoRaQ(), Scheme(main, branch=r5)),
        }
        for name, branch in NOMINAL.items():
            if branch.weight != "bf16":
                lines[f"LoRaQ {name} strict"] = (LoRaQ(), Scheme(main, branch=opened(branch)))
        lines["LoRaQ w6a6, 5.25 bits"] = (LoRaQ(), Scheme(main, branch=opened(NOMINAL["w6a6"])))
        lines["RTN int5"] = (RTN(), Scheme("int5"))
        layers = trained_layers(main, every)
        errors: dict[str, list[float]] = defaultdict(list)
        stored: dict[str, int] = defaultdict(int)
        seconds: dict[str, float] = defaultdict(float)
        for weight in layers.values():
            for label, (method, scheme) in lines.items():
                budget = as_int5 if label.endswith("5.25 bits") else same_bytes
                ranked = with_rank(scheme, (weight.shape[0], weight.shape[1]), budget)
                measured = Measured.of(Entry(label, method, ranked), weight)
                errors[label].append(measured.solution.relative_error)
                stored[label] += measured.solution.nbytes
                seconds[label] += measured.seconds
        values = sum(weight.numel() for weight in layers.values())
        print(f"\n3. Digits transformer, {len(layers)} layers, main {main}: mean relative error\n")
        print(f"{'':28}{'error':>9}{'ratio':>9}{'bits':>8}{'CPU s':>8}")
        base = fmean(errors["SVDQuant r5 w16a16, direct"])
        for label, of_layers in errors.items():
            mean, bits = fmean(of_layers), 8 * stored[label] / values
            print(f"{label:28}{mean:9.5f}{mean / base:9.3f}{bits:8.3f}{seconds[label]:8.2f}")
            rows.append(
                {
                    "table": "trained",
                    "main": main,
                    "method": label,
                    "layers": len(layers),
                    "mean_error": mean,
                }
                | {"ratio": mean / base, "bits_per_weight": bits, "cpu_seconds": seconds[label]}
            )
        order = [
            "RTN",
            "SVDQuant r5 w16a16",
            "SVDQuant r5 w16a16 x100",
            "LoRaQ r5 w16a16",
            "LoRaQ w8a8 strict",
        ]
        means = [fmean(errors[label]) for label in order]
        kept = means == sorted(means, reverse=True)
        print("RTN > SVDQuant > alternating > LoRaQ-16 > LoRaQ-8: " + verdict(kept))
        rows.append({"table": "trained", "main": main, "method": "ordering", "kept": kept})
    return rows


#: Main format to (4-bit, 8-bit) activation formats of its recipes.
ACTIVATIONS = {"int4": ("int4", "int8"), "mxfp4": ("mxfp4", "mxfp8_e4m3")}


def output_error(weight: Tensor, solution: LayerSolution, scheme: Scheme, x: Tensor) -> float:
    """Return the relative error of the layer's output, computed by the reference back end."""
    layer = QuantizedLinear.from_packed(replace(solution.packed, scheme=scheme))
    layer.backend = "reference"
    exact = x @ weight.T
    return float(torch.linalg.vector_norm(layer(x) - exact) / torch.linalg.vector_norm(exact))


def outputs(mains: list[str], seeds: range) -> list[Row]:
    """Table 4: output error by the formats of activations."""
    rows: list[Row] = []
    r32, w8, w6, w4 = (NOMINAL[name] for name in ("w16a16", "w8a8", "w6a6", "w4a8"))
    lines = {
        "RTN": (RTN(), None),
        "SVDQuant r32 w16, direct": (BASELINE, r32),
        "SVDQuant r32 w16 x100": (SVDQuant(rounds=100), r32),
        "LoRaQ r64 w8, unaware": (LoRaQ(activation_aware=False), w8),
        "LoRaQ r64 w8": (LoRaQ(), w8),
        "LoRaQ r85 w6": (LoRaQ(), w6),
        "LoRaQ r128 w4": (LoRaQ(), w4),
    }
    for main in mains:
        four, eight = ACTIVATIONS[main]
        columns = {
            "A16/A16": ("bf16", "bf16"),
            "A8/A8": (eight, "mxint8"),
            "A4/A8": (four, "mxint8"),
            "A4/A4": (four, four),
        }
        print(
            f"\n4. Relative output error, 1152x1152, main {main}, {len(seeds)} seed(s), by "
            f"main/branch activations\n"
        )
        print(f"{'':28}" + "".join(f"{name:>10}" for name in columns))
        errors: dict[tuple[str, str], list[float]] = defaultdict(list)
        for seed in seeds:
            weight = dit_like(1152, 1152, seed=seed)
            generator = torch.Generator().manual_seed(seed)
            x = heavy_tailed(512, 1152, seed=seed + 100) * torch.exp(
                0.5 * torch.randn(1152, generator=generator)
            )
            for label, (method, branch) in lines.items():
                aware = isinstance(method, LoRaQ) and method.activation_aware
                solution: LayerSolution | None = None
                for column, (activation, of_branch) in columns.items():
                    if branch is w6 and of_branch == "mxint8":
                        of_branch = w6.weight  # w6a6 stays below 8 bits
                    scheme = Scheme(
                        main, activation, branch and replace(branch, activation=of_branch)
                    )
                    if solution is None or aware:
                        solution = method.solve(weight, scheme, seed=seed)
                    errors[label, column].append(output_error(weight, solution, scheme, x))
        for label in lines:
            print(
                f"{label:28}"
                + "".join(f"{fmean(errors[label, column]):10.4f}" for column in columns)
            )
            rows += [
                {"table": "output", "main": main, "method": label, "activations": column}
                | {"formats": columns[column], "errors": errors[label, column]}
                for column in columns
            ]
    return rows


def main() -> None:
    """Print the four tables and the JSON line."""
    chosen = options(
        __doc__, quick="one seed, one main format in tables 2 and 4, every eighth trained layer"
    )
    shapes, mains = list(SECONDS_BARS), list(ERROR_BARS)
    seeds, every = range(3), 1
    few = mains
    if chosen.quick:
        few, seeds, every = mains[:1], range(1), 8
    rows = synthetic_weights(mains, shapes, seeds)
    rows += effort_levels(few, seeds[:1])
    rows += trained_weights(mains, every)
    rows += outputs(few, seeds[:1])
    print()
    report(rows, save=chosen.save)


if __name__ == "__main__":
    main()
