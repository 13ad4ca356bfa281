"""How fast is PixArt-Sigma on a CPU in loraq's back ends, ONNX Runtime and OpenVINO?

Reading guide: a PixArt transformer of real width (1152) with random weights, batch 1, one forward;
"block" has one block, "step" all 28. Every linear layer inside the blocks is quantized
(int4-a8+w8a8-r64), the same stored bytes for all; `loraq export` makes the graphs. Each engine runs
in a process of its own, and takes turns with bf16 torch in another, so that both see the same
machine: "x bf16" is the median of bf16 over that of the engine (more is better). "MiB" is the peak
of resident memory during a forward beyond that before the model was loaded. "torch NAME" are back
ends; "onnxruntime 0" computes in fp32, "onnxruntime 4" rounds activations to INT8; "openvino f32"
computes in fp32, "openvino bf16" in bf16 with activations in INT8.

"load" is that of the machine when the engine began, over 1 minute: more than 0 means that other
programs took part of it.

It needs Linux, and the packages of `loraq[onnx,openvino]` and onnxruntime.

    python -m benchmarks.speed.engines --threads 2 --save
    python -m benchmarks.speed.engines --threads 2 --step --save
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

import loraq
from benchmarks.record import options, report
from benchmarks.speed.block import pixart
from benchmarks.timing import spread
from benchmarks.worlds.random_layers import quantize_randomly
from loraq.recipe_names import parse_scheme

ENGINES = (
    "torch resident",
    "torch low_memory",
    "torch openvino",
    "onnxruntime 0",
    "onnxruntime 4",
    "openvino f32",
    "openvino bf16",
)
FLOAT = "torch bf16"
SCHEME = "int4-a8+w8a8-r64"


class Engine:
    """A process of `speed.engine`."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        """Start it, and wait until it is ready."""
        command = [sys.executable, "-m", "benchmarks.speed.engine", name, folder, str(threads)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if (said := self._read()) != "ready":
            raise SystemExit(f"'{name}' did not start: {said}")

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def seconds(self) -> float:
        """Run a forward."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self._read())

    def stop(self) -> int:
        """End it, and return the bytes that it took."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        nbytes = int(self._read())
        self.process.wait()
        return nbytes


def main() -> None:
    """Print a table and the JSON line."""
    chosen = options(
        __doc__,
        step="the whole step of 28 blocks instead of one block",
        quick="a tiny model",
    )
    heads, side = (2, 8) if chosen.quick else (16, 64)
    what, n_blocks = ("step", 28) if chosen.step else ("block", 1)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write(folder, n_blocks, heads, side)
        floats = Engine(FLOAT, folder, chosen.threads)
        for name in ENGINES:
            rows.append({"what": what, "tokens": (side // 2) ** 2})
            rows[-1] |= measure(name, folder, floats, chosen.threads, chosen.repeats)
            show(rows[-1])
        rows.append({**rows[0], "contender": FLOAT, "times_bf16": 1.0, "load": None})
        rows[-1] |= {"ms": median(float(str(row["bf16_ms"])) for row in rows[:-1])}
        rows[-1] |= {"ms_low": None, "ms_high": None, "mib": floats.stop() / 2**20}
        show(rows[-1])
    report(rows, save=chosen.save)


def write(folder: Path, n_blocks: int, heads: int, side: int) -> None:
    """Write the float model, the quantized one, both graphs, and inputs."""
    model = pixart(n_blocks, heads, side).eval()
    model.save_pretrained(folder / "float")
    quantize_randomly(model.transformer_blocks, parse_scheme(SCHEME), "auto")
    loraq.save(model, folder / "quantized")
    for to in ("onnx", "openvino"):
        loraq.export(folder / "quantized", folder / to, to=to, allow_dense=True, progress=False)
    inputs = {
        "hidden_states": torch.randn(1, 4, side, side),
        "encoder_hidden_states": torch.randn(1, 120, 256),
        "timestep": torch.tensor([500.0]),
    }
    torch.save(inputs, folder / "inputs.pt")


def measure(
    name: str, folder: Path, floats: Engine, threads: int, repeats: int
) -> dict[str, object]:
    """Return the row of an engine, which takes turns with bf16 torch."""
    load, engine = os.getloadavg()[0], Engine(name, folder, threads)
    ours, theirs = [], []
    for _ in range(repeats):
        theirs.append(floats.seconds())
        ours.append(engine.seconds())
    low, middle, high = (1e3 * value for value in spread(ours))
    row: dict[str, object] = {"contender": name, "ms": middle, "ms_low": low, "ms_high": high}
    row |= {"bf16_ms": 1e3 * median(theirs), "times_bf16": median(theirs) / median(ours)}
    return row | {"mib": engine.stop() / 2**20, "load": load}


def show(row: dict[str, object]) -> None:
    """Print a row."""
    load = "" if row["load"] is None else f"load {row['load']:.1f}"
    print(
        f"{row['what']:6}{row['contender']:18}{row['ms']:10.1f} ms"
        f"{row['times_bf16']:8.2f} x bf16{row['mib']:9.0f} MiB  {load}",
        flush=True,
    )


if __name__ == "__main__":
    main()
