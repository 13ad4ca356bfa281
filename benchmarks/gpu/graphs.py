"""Do layers and a block run in a CUDA graph on every back end, and how much time does that save?

Reading guide: a graph is captured on one input and replayed on another. "error" is the distance of
its output to that of a plain call; "eager" is the time of a plain call, launches by Python
included, "replay" that of the graph, which is what the GPU itself needs. A row that fails says why.
On a CPU there are no graphs: "replay" is a plain call there, to see that the script runs.

    python -m benchmarks.gpu.graphs --save
"""

from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from benchmarks.record import DEVICE, device_of, options, report
from benchmarks.speed.block import inputs, pixart
from benchmarks.timing import interleaved_seconds
from benchmarks.worlds.random_layers import quantize_randomly, random_layer
from loraq.kernels import BACKENDS
from loraq.recipe_names import parse_scheme

#: Recipe for each back end.
RECIPES = {
    "low_memory": "int4-a4+w8a8-r64",
    "resident": "mxfp4-a16+w8a8-r64",
    "int8_row": "int4-a8+int8-r64",
    "fp8_row": "mxfp4-amxfp8_e4m3+w8a8-r64",
    "triton": "mxfp4-amxfp8_e4m3+mxfp8_e4m3-r64",
    "reference": "mxfp4-a8+w8a8-r64",
}


def main() -> None:
    """Print a table and the JSON line; exit with 1 if something fails."""
    chosen = options(
        __doc__,
        quick="small sizes",
        device=DEVICE,
        backends=(tuple(RECIPES), "back ends to measure (default: all)"),
    )
    device = device_of(chosen.device)
    rows: list[dict[str, object]] = []
    for backend in chosen.backends:
        for what, tokens, make in cases(backend, device, quick=chosen.quick):
            row: dict[str, object] = {"what": what, "contender": backend, "tokens": tokens}
            row["recipe"] = RECIPES[backend]
            try:
                row |= measure(*make(), chosen.repeats, device)
                row["failure"] = judge(row, backend)
            except Exception as error:
                row["failure"] = f"{type(error).__name__}: {error}"
            rows.append(row)
            print({name: value for name, value in row.items() if value is not None}, flush=True)
    report(rows, save=chosen.save, device=device.type)
    if any(row["failure"] for row in rows):
        raise SystemExit(1)


Case = tuple[Callable[[Tensor], Tensor], Tensor]


def cases(
    backend: str, device: torch.device, *, quick: bool
) -> list[tuple[str, int, Callable[[], Case]]]:
    """Return what is captured: its name, its tokens, and what makes it with an input."""
    n_out, n_in = (128, 96) if quick else (4608, 1152)
    heads, side = (2, 8) if quick else (16, 64)
    scheme = parse_scheme(RECIPES[backend])

    def layer(n_tokens: int) -> Case:
        made = random_layer((n_out, n_in), scheme, device)
        made.backend = backend
        return made, torch.randn(n_tokens, n_in, dtype=torch.bfloat16, device=device)

    def block() -> Case:
        model = pixart(1, heads, side).to(device).eval()
        quantize_randomly(model.transformer_blocks, scheme, backend)
        given = inputs(side, device)
        latents = given.pop("hidden_states")
        assert isinstance(latents, Tensor)
        return lambda x: model(x, **given)[0], latents

    sizes = (8, 64) if quick else (8, 1024)
    layers = [("layer", n, lambda n=n: layer(n)) for n in sizes]
    if device.type == "cpu" and backend != "low_memory":  # one block says whether the script runs
        return layers
    return [*layers, ("block", (side // 2) ** 2, block)]


@torch.no_grad()
def measure(
    run: Callable[[Tensor], Tensor], x: Tensor, repeats: int, device: torch.device
) -> dict[str, object]:
    """Capture a call, replay it on another input, and time both ways."""
    other = -0.5 * x
    expected = run(other).double()
    replay = capture(run, x) if device.type == "cuda" else lambda: run(x)
    x.copy_(other)
    y = replay().double()
    norm = torch.linalg.vector_norm
    seconds = interleaved_seconds({"eager": lambda: run(x), "replay": replay}, repeats, device)
    return {
        "error": (norm(y - expected) / norm(expected)).item(),
        "captured": device.type == "cuda",
        "ms_eager": 1e3 * median(seconds["eager"]),
        "ms_replay": 1e3 * median(seconds["replay"]),
    }


def capture(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """Return what replays a captured call on what then stands in x."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # operands, tables and kernels are made outside of the graph
            run(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x)

    def replay() -> Tensor:
        graph.replay()
        return y

    return replay


def judge(row: dict[str, object], backend: str) -> str | None:
    """Return what is wrong with the numbers, or `None`.

    Under capture a library may pick another kernel, whose sums are rounded in another order.
    """
    bound = BACKENDS[backend].bound(parse_scheme(RECIPES[backend]), torch.bfloat16) or 1e-2
    error = row["error"]
    assert isinstance(error, float)
    return None if error <= bound else f"the replay is {error:.2g} off, more than {bound:.2g}"


if __name__ == "__main__":
    main()
