"""How much error does each scale rule leave, and which constants are best for power-of-two scales?

Reading guide: relative error |x - Q(x)| / |x| in percent, on a Gaussian, a Student-t (4 degrees)
and a synthetic transformer weight. First table: every rule of every format; less is better,
"search" is the bound for one scale for each block. Second table: a block takes the scale
2^(floor(log2(c * max)) - emax); c = 1 is the rule of the MX specification, "best c" the one with
the least error on that matrix, "excess" how much more error than that the constant in use
(`loraq.formats.presets`) leaves, in percent of the error. The optimum is flat: an excess below 0.5
is no reason to change a constant.
"""

import torch
from torch import Tensor

from benchmarks.record import options, report
from benchmarks.worlds.matrices import dit_like, gaussian, heavy_tailed
from loraq.formats import FORMATS, BlockFormat
from loraq.formats.scale_rules import rule_names

MATRICES = {
    "gaussian": gaussian(576, 1152),
    "student_t4": heavy_tailed(576, 1152),
    "dit_like": dit_like(576, 1152),
}
FACTORS = [round(0.70 + 0.01 * i, 2) for i in range(81)]


def percent(x: Tensor, rounded: Tensor) -> float:
    """Return the relative error in percent."""
    return 100 * float((rounded.double() - x).norm() / x.double().norm())


def error_with_factor(fmt: BlockFormat, x: Tensor, factor: float) -> float:
    """Return the relative error in percent.

    Every block's maximum is taken `factor` times as large as it is.
    """
    blocks = x.unflatten(-1, (-1, fmt.block_size or x.shape[-1]))
    scale = fmt.scale_format.propose(blocks.abs().amax(-1, keepdim=True), fmt.element, factor)
    return percent(blocks, fmt.element.round(blocks / scale) * scale)


def compare_rules(formats: list[BlockFormat]) -> list[dict[str, object]]:
    """Print the error of every rule."""
    print(f"{'format':12}{'rule':10}" + "".join(f"{name:>12}" for name in MATRICES))
    rows: list[dict[str, object]] = []
    for fmt in formats:
        for rule in rule_names(fmt.scale_format):
            errors = {name: percent(x, fmt.round(x, rule)) for name, x in MATRICES.items()}
            print(
                f"{fmt.name:12}{rule:10}" + "".join(f"{error:12.3f}" for error in errors.values())
            )
            rows.append({"table": "rules", "format": fmt.name, "rule": rule, **errors})
    return rows


def sweep_factors(formats: list[BlockFormat]) -> list[dict[str, object]]:
    """Print the best constant of every power-of-two format, and what the one in use loses."""
    print(f"\n{'':12}{'':8}" + "".join(f"{name:>18}" for name in MATRICES))
    print(
        f"{'format':12}{'in use':>8}"
        + f"{'best c':>9}{'excess':>9}" * len(MATRICES)
        + f"{'best for all':>14}"
    )
    rows: list[dict[str, object]] = []
    for fmt in formats:
        if not fmt.scale_format.is_power_of_two:
            continue
        used = fmt.scale_rule("fitted").factors[0]
        errors = torch.tensor(
            [[error_with_factor(fmt, x, c) for c in FACTORS] for x in MATRICES.values()]
        )
        ratio = errors / errors.min(1, keepdim=True).values
        best = [FACTORS[int(i)] for i in errors.argmin(1)]
        best_for_all = FACTORS[int(ratio.log().mean(0).argmin())]
        excess = [100 * (float(r[FACTORS.index(used)]) - 1) for r in ratio]
        cells = "".join(f"{c:9.2f}{e:9.2f}" for c, e in zip(best, excess, strict=True))
        print(f"{fmt.name:12}{used:8.2f}{cells}{best_for_all:14.2f}")
        rows.append(
            {"table": "factors", "format": fmt.name, "in_use": used, "best_for_all": best_for_all}
            | {"factors": FACTORS, "errors": dict(zip(MATRICES, errors.tolist(), strict=True))}
        )
    print()
    return rows


def main() -> None:
    """Print both tables and the JSON line."""
    chosen = options(__doc__)
    formats = [fmt for fmt in FORMATS.values() if isinstance(fmt, BlockFormat)]
    report(compare_rules(formats) + sweep_factors(formats), save=chosen.save)


if __name__ == "__main__":
    main()
