"""How fast is one quantized layer on each back end, against bf16 `F.linear`?

Reading guide: real layer shapes of PixArt-Sigma, SANA and FLUX (`shapes.csv`), bf16 inputs, bias
and quantization of the activation included. All contenders of a shape run in turn in one process;
"ms" is the median wall time with its quartiles, "x bf16" is how many times faster than bf16
`F.linear` (more is better), "error" is the distance to the reference on 64 tokens. "int8", "int4"
and "fp8" are the products of int8_row, openvino and fp8_row without a branch; the branch of the
others has rank 64 in 8 bits. "torchao int8" is its dynamic INT8 linear, the nearest thing that
torchao has.

Bar of openvino: 0.9 x bf16 in the median of the shapes, from 1024 tokens, with the branch.

"int8 product" is the integer product of int8_row alone: what no INT8 layer can beat here.

Bars on a CPU with 2 threads: int8_row at least 1.5 x bf16 from 1024 tokens, in and out from 1152,
with the branch; the branch costs int8_row at most 15 %; resident with 16-bit activations takes at
most 1.25 times what bf16 takes. They were set on a CPU whose INT8 instructions are twice as fast as
its bf16 ones. From matrix units (AMX) bf16 gains more; the second command keeps torch from using
them.

    python -m benchmarks.speed.layer --threads 2 --save
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python -m benchmarks.speed.layer --threads 2 --save
"""

import csv
import warnings
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.record import DEVICE, HERE, device_of, options, report
from benchmarks.timing import interleaved_seconds, peak_mib, spread
from benchmarks.worlds.random_layers import bias_of, random_layer
from loraq.errors import KernelError
from loraq.kernels import get_backend
from loraq.kernels.int8_matrix import Rows, can_pack, pack_rows, packed_product
from loraq.nn import QuantizedLinear
from loraq.recipe_names import parse_scheme
from loraq.transforms import rotate

#: Label, recipe, back end; the three labels without a branch are what the branch's cost is measured
#: against.
CONTENDERS = (
    ("resident a16", "mxfp4-a16+w8a8-r64", "resident"),
    ("low_memory a16", "mxfp4-a16+w8a8-r64", "low_memory"),
    ("resident a8", "mxfp4-a8+w8a8-r64", "resident"),
    ("int8", "int8-a8", "int8_row"),
    ("int8_row", "int4-a8+int8-r64", "int8_row"),
    ("int4", "int4-a8", "openvino"),
    ("openvino", "int4-a8+int8-r64", "openvino"),
    ("fp8", "fp8_e4m3-a8", "fp8_row"),
    ("fp8_row", "mxfp4-amxfp8_e4m3+w8a8-r64", "fp8_row"),
    ("triton", "mxfp4-amxfp8_e4m3+mxfp8_e4m3-r64", "triton"),
    ("triton a16", "mxfp4-a16+w8a8-r64", "triton"),
)
#: Of all contenders.
BACKENDS = tuple(dict.fromkeys(backend for _, _, backend in CONTENDERS))
WITHOUT_BRANCH = {"int8_row": "int8", "openvino": "int4", "fp8_row": "fp8"}
TOKENS = (256, 1024, 4096)
#: What one image has at a time in modulation layers: on a GPU they are timed as well.
FEW_TOKENS = (8,)


def main() -> None:
    """Print a table and the JSON line."""
    chosen = options(
        __doc__,
        pixart="only the shapes of PixArt-Sigma",
        sana="only the shapes of SANA",
        flux="only the shapes of FLUX",
        quick="one small shape, to see that it runs",
        device=DEVICE,
        backends=(BACKENDS, "back ends to measure (default: all)"),
    )
    device = device_of(chosen.device)
    wanted = {model for model in ("pixart", "sana", "flux") if getattr(chosen, model)}
    with (HERE / "worlds" / "shapes.csv").open() as file:
        shapes = [row for row in csv.DictReader(file) if not wanted or row["model"] in wanted]
    tokens: tuple[int, ...] = TOKENS if device.type == "cpu" else (*FEW_TOKENS, *TOKENS)
    if chosen.quick:
        shapes, tokens = (
            [{"model": "tiny", "layer": "tiny", "n_in": "192", "n_out": "128"}],
            (8, 64),
        )
    rows: list[dict[str, object]] = []
    for shape in shapes:
        layers, plain = build(
            (int(shape["n_out"]), int(shape["n_in"])), device, tuple(chosen.backends)
        )
        print(f"\n{shape['model']} {shape['layer']}: {shape['n_in']} -> {shape['n_out']}")
        for n_tokens in tokens:
            found = measure(layers, plain, n_tokens, chosen.repeats)
            rows += [{**shape, "tokens": n_tokens, **row} for row in found]
            show(n_tokens, found)
    report(rows, save=chosen.save, device=device.type)


def build(
    shape: tuple[int, int], device: torch.device, backends: tuple[str, ...] = BACKENDS
) -> tuple[dict[str, QuantizedLinear], nn.Linear]:
    """Return every contender that this device runs and that is asked for, and the bf16 layer."""
    plain = nn.Linear(shape[1], shape[0], device=device, dtype=torch.bfloat16)
    plain.bias = nn.Parameter(bias_of(shape[0], device))
    layers = {}
    for label, recipe, backend in CONTENDERS:
        if backend not in backends:
            continue
        if backend == "fp8_row" and device.type == "cpu":
            continue  # emulated there
        layer = random_layer(shape, parse_scheme(recipe), device)
        try:
            layer.ask_activations("stored", simulate=backend == "resident")
            layer.backend = backend
            layer.prepare(torch.bfloat16)
        except KernelError as error:
            print(f"{label}: {error}")
            continue
        layers[label] = layer
    return layers, plain


@torch.no_grad()
def measure(
    layers: dict[str, QuantizedLinear],
    plain: nn.Linear,
    n_tokens: int,
    repeats: int,
) -> list[dict[str, object]]:
    """Return one row for every contender, and for what is no layer of ours."""
    device = plain.weight.device
    x = (
        torch.randn(n_tokens, plain.in_features, generator=torch.Generator().manual_seed(0))
        .bfloat16()
        .to(device)
    )
    runs: dict[str, Callable[[], object]] = {"bf16": lambda: linear(x, plain.weight, plain.bias)}
    for label, layer in layers.items():
        runs[label] = lambda layer=layer: layer(x)
    if "int8_row" in layers:  # what it is to be compared with
        runs["int8 product"] = int8_product(plain, n_tokens)
        if (other := torchao_int8(plain)) is not None:
            runs["torchao int8"] = lambda: other(x)
    runs = {label: run for label, run in runs.items() if label == "bf16" or runs_here(label, run)}
    seconds = interleaved_seconds(runs, repeats, device)
    base = median(seconds["bf16"])
    rows = []
    for label in runs:
        low, middle, high = (1e3 * value for value in spread(seconds[label]))
        row: dict[str, object] = {"contender": label, "ms": middle, "ms_low": low, "ms_high": high}
        row["times_bf16"] = base / median(seconds[label])
        row["error"] = error_of(layers[label], x[:64]) if label in layers else None
        row["scratch_mib"] = peak_mib(runs[label], device)
        if label in WITHOUT_BRANCH and WITHOUT_BRANCH[label] in seconds:
            row["branch_cost"] = median(seconds[label]) / median(seconds[WITHOUT_BRANCH[label]]) - 1
        rows.append(row)
    return rows


def runs_here(label: str, run: Callable[[], object]) -> bool:
    """Whether a contender runs: a shape may be none that its product takes."""
    try:
        run()
    except Exception as error:
        print(f"{label}: {error}")
        return False
    return True


def error_of(layer: QuantizedLinear, x: Tensor) -> float:
    """Return the distance to the reference."""
    y, scheme = layer(x).double(), layer.prepare(x.dtype).scheme
    seen = rotate(x, scheme.rotation)
    expected = get_backend("reference").linear(seen, layer.packed, scheme, layer.bias).double()
    return (torch.linalg.vector_norm(y - expected) / torch.linalg.vector_norm(expected)).item()


def int8_product(plain: nn.Linear, n_tokens: int) -> Callable[[], object]:
    """Return the integer product that int8_row uses, on random codes of the layer's shape."""
    generator = torch.Generator().manual_seed(0)
    sizes = (n_tokens, plain.in_features), (plain.out_features, plain.in_features)
    x, w = (torch.randint(-127, 128, size, generator=generator, dtype=torch.int8) for size in sizes)
    x, w = x.to(plain.weight.device), w.to(plain.weight.device)
    if not can_pack(w.device):
        return lambda: torch._int_mm(x, w.t())
    tokens, rows = x.view(torch.uint8), pack_rows(Rows(w, torch.ones(len(w))))
    return lambda: packed_product(tokens, rows, torch.bfloat16)


def torchao_int8(plain: nn.Linear) -> nn.Module | None:
    """Return torchao's linear layer with dynamic INT8 activations and INT8 weights.

    Without torchao it is `None`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
        except ImportError:
            return None
        copy = nn.Sequential(
            nn.Linear(plain.in_features, plain.out_features, dtype=plain.weight.dtype)
        )
        copy.load_state_dict({"0.weight": plain.weight, "0.bias": plain.bias})
        copy = copy.to(plain.weight.device).requires_grad_(False)
        quantize_(copy, Int8DynamicActivationInt8WeightConfig())
    return copy


def show(n_tokens: int, rows: list[dict[str, object]]) -> None:
    """Print the rows of one shape and number of tokens."""
    print(
        f"{n_tokens} tokens{'':8}{'ms':>9}{'quartiles':>18}{'x bf16':>9}{'error':>10}{'branch':>9}"
    )
    for row in rows:
        quartiles = f"{row['ms_low']:.2f}-{row['ms_high']:.2f}"
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        cost = row.get("branch_cost")
        branch = "" if cost is None else f"{100 * cost:+.1f} %"
        print(
            "  "
            f"{row['contender']:16}{row['ms']:9.2f}{quartiles:>18}{row['times_bf16']:9.2f}{error:>10}{branch:>9}"
        )


if __name__ == "__main__":
    main()
