"""What does it cost that the global scale of NVFP4 is a power of two?

Reading guide: relative error |x - Q(x)| / |x| in percent of weights in `nvfp4`, rounded by the rule
for weights. "exact" is the fp32 number that puts the largest block scale onto E4M3's largest, as
the format is described; "power of two" is the next one above it, which loraq stores, and which is
the same number in bf16 and fp16. How far that is from the exact one depends on the matrix alone, so
each is taken times 2^(i/8) for i from 0 to 7: "mean" of the eight, and "worst", the largest ratio
of both errors. A ratio below 1.001 is no cost that a picture could show.
"""

import torch
from torch import Tensor

from benchmarks.quality.scale_rules import MATRICES, percent
from benchmarks.record import options, report
from loraq.evaluation.digits import load_transformer
from loraq.formats import get_format
from loraq.layers import linear_layers, matrix_of

SHIFTS = 8


def exact_scale(x: Tensor) -> Tensor:
    """Return the fp32 scale that puts the largest block scale onto E4M3's largest."""
    return (x.abs().amax() / (6 * 448)).reshape(1)


def compare(x: Tensor) -> list[tuple[float, float]]:
    """Return the error with the exact scale, and with a power of two, of x times 2^(i/8)."""
    fmt, found = get_format("nvfp4"), []
    for i in range(SHIFTS):
        shifted = x * 2 ** (i / SHIFTS)
        exact = fmt.quantize(shifted, "search", above=exact_scale(shifted)).dequantize()
        stored = fmt.quantize(shifted, "search").dequantize()
        found.append((percent(shifted, exact), percent(shifted, stored)))
    return found


def main() -> None:
    """Print the table."""
    chosen = options(__doc__)
    trained = linear_layers(load_transformer(torch.float32))
    names = [
        f"transformer_blocks.{i}.{part}" for i in (0, 7) for part in ("attn1.to_q", "ff.net.2")
    ]
    matrices = MATRICES | {f"digits {name}": matrix_of(trained[name]).detach() for name in names}
    rows: list[dict[str, object]] = []
    ratios: list[float] = []
    print(f"{'matrix':40}{'exact':>10}{'power of two':>14}{'mean ratio':>12}{'worst':>9}")
    for name, x in matrices.items():
        pairs = compare(x)
        exact, stored = (sum(pair[i] for pair in pairs) / SHIFTS for i in (0, 1))
        worst = max(b / a for a, b in pairs)
        ratios.append(stored / exact)
        print(f"{name:40}{exact:10.4f}{stored:14.4f}{ratios[-1]:12.5f}{worst:9.5f}")
        row = {"matrix": name, "exact": exact, "power_of_two": stored, "worst_ratio": worst}
        rows.append(row)
    print(f"\nMean ratio of all: {sum(ratios) / len(ratios):.5f}")
    report(rows, save=chosen.save)


if __name__ == "__main__":
    main()
