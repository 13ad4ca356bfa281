"""Is it worth solving layers of one shape together?

Eight layers are solved one by one and as one batch. Read the ratio: above 1 the batch is faster.
`quantize_` solves layers alone all the same: sums of small matrices depend on where in memory a
batch puts them, so a layer's bytes would depend on its neighbours. On a GPU, where a small layer is
bound by launches, try `--cuda`.

    python benchmarks/batch_gain.py [--cuda] [--save]
"""

import time
from collections.abc import Callable

import torch

from common import options, report
from loraq.methods import LoRaQ
from loraq.scheme import Branch, Scheme
from matrices import dit_like

LAYERS = 8
SCHEME = Scheme("mxfp4", branch=Branch(10, "mxint8"))


def main() -> None:
    """Print seconds for each layer, alone and in a batch, by shape."""
    args = options(__doc__, cuda="run on the GPU")
    device = "cuda" if args.cuda else "cpu"
    method = LoRaQ.at("fast")
    rows: list[dict[str, object]] = []
    print("shape       alone s/layer  batch s/layer  alone / batch")
    seeds = range(LAYERS)
    for n_out, n_in in ((192, 192), (768, 192), (1152, 1152)):
        weights = [dit_like(n_out, n_in, seed).to(device) for seed in seeds]
        alone = _seconds(
            lambda w=weights: [
                method.solve(x, SCHEME, seed=s) for x, s in zip(w, seeds, strict=True)
            ]
        )
        batch = _seconds(lambda w=weights: method.solve_batch(w, SCHEME, seeds=seeds))
        print(f"{n_out:4}×{n_in:<5} {alone:14.4f} {batch:14.4f} {alone / batch:14.2f}")
        rows.append({"shape": [n_out, n_in], "alone_s": alone, "batch_s": batch})
    report(rows, save=args.save, device=device)


def _seconds(run: Callable[[], object]) -> float:
    run()
    begin = time.perf_counter() if torch.cuda.is_available() else time.process_time()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / LAYERS
    return (time.process_time() - begin) / LAYERS


if __name__ == "__main__":
    main()
