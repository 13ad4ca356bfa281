"""How fast is rounding, packing and unpacking for each format?

Reading guide: one 4608 x 1152 fp32 matrix (21 MB), CPU time of one run, best of several. GB/s
counts the fp32 bytes of the matrix once. "copies" is the same time in units of one copy of the
matrix, measured in this run: it is what to compare between machines. `round` is what a solver and a
fake-quantized activation pay, `quantize` what storing pays, `dequantize` what loading pays. The
direct rule ("floor" or "absmax") is what activations use at run time, "fitted" is the solver's,
"search" is the one for stored weights.
"""

import torch

from benchmarks.record import options, report
from benchmarks.timing import best_cpu_seconds
from benchmarks.worlds.matrices import gaussian
from loraq.formats import FORMATS, CastFormat, Format


def rules_of(fmt: Format) -> tuple[str | None, ...]:
    """Rules worth timing: the direct one and the two that cost more."""
    return (None,) if isinstance(fmt, CastFormat) else (None, "fitted", "search")


def main() -> None:
    """Print a table and the JSON line."""
    chosen = options(__doc__)
    x = gaussian(4608, 1152)
    out = torch.empty_like(x)
    gigabytes = x.numel() * x.element_size() / 1e9
    copy = best_cpu_seconds(lambda: out.copy_(x), chosen.repeats)
    print(f"copy of the matrix: {gigabytes / copy:.2f} GB/s\n")
    print(f"{'':22}{'round':>16}{'quantize':>20}{'dequantize':>20}")
    print(f"{'format':12}{'rule':10}" + f"{'GB/s':>10}{'copies':>10}" * 3)
    rows: list[dict[str, object]] = []
    for name, fmt in FORMATS.items():
        stored = fmt.quantize(x)
        decode = best_cpu_seconds(stored.dequantize, chosen.repeats)
        for rule in rules_of(fmt):
            repeats = 2 if rule == "search" else chosen.repeats
            seconds = {
                "round": best_cpu_seconds(
                    lambda fmt=fmt, rule=rule: fmt.round(x, rule, out=out), repeats
                ),
                "quantize": best_cpu_seconds(
                    lambda fmt=fmt, rule=rule: fmt.quantize(x, rule), repeats
                ),
                "dequantize": decode,
            }
            cells = "".join(f"{gigabytes / s:10.2f}{s / copy:10.1f}" for s in seconds.values())
            print(f"{name:12}{rule or 'direct':10}{cells}")
            rows.append({"format": name, "rule": rule or "direct", "copy_seconds": copy, **seconds})
    print()
    report(rows, save=chosen.save)


if __name__ == "__main__":
    main()
