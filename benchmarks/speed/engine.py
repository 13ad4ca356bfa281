"""One engine with one model, for `speed.engines`: runs a forward for every line that it reads.

python -m benchmarks.speed.engine ENGINE FOLDER THREADS

It says "ready" after a forward that does not count, then the seconds of each forward, and at the
end of the lines how much resident memory the process took at most during those beyond what it had
before the model was loaded, mapped files included.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

#: What a forward of the model is asked with.
Inputs = dict[str, torch.Tensor]


def by_torch(folder: Path, inputs: Inputs, backend: str) -> Callable[[], Any]:
    """Return the forward of a float model ("bf16"), or of the quantized one on a back end."""
    import loraq
    from loraq.integrations.diffusers import load_float

    model = (
        load_float(folder / "float")
        if backend == "bf16"
        else loraq.load(folder / "quantized", backend=backend, dtype=torch.bfloat16, verify=False)
    )
    given = {
        name: tensor.bfloat16() if name != "timestep" else tensor for name, tensor in inputs.items()
    }
    conditions = {"resolution": None, "aspect_ratio": None}

    @torch.no_grad()
    def run() -> Any:
        return model(**given, added_cond_kwargs=conditions, return_dict=False)[0]

    return run


def by_onnx_runtime(folder: Path, inputs: Inputs, level: int, threads: int) -> Callable[[], Any]:
    """Return the forward of ONNX Runtime at a level of accuracy: 4 rounds activations to INT8."""
    import onnx
    import onnxruntime

    home = folder / "onnx"
    graph = onnx.load(home / "model.onnx", load_external_data=False)
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = level
    file = home / f"level_{level}.onnx"
    onnx.save(graph, file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    given = {name: tensor.numpy() for name, tensor in inputs.items()}
    return lambda: session.run(None, given)


def by_openvino(folder: Path, inputs: Inputs, precision: str, threads: int) -> Callable[[], Any]:
    """Return the forward of OpenVINO: in fp32 and exact, or in bf16 with INT8 activations."""
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "64" if precision == "bf16" else "0",
        "INFERENCE_NUM_THREADS": threads,
    }
    file = folder / "openvino" / "model.xml"
    request = openvino.Core().compile_model(str(file), "CPU", options).create_infer_request()
    given = {name: tensor.numpy() for name, tensor in inputs.items()}
    return lambda: request.infer(given, share_inputs=True, share_outputs=True)


def prepare(engine: str, folder: Path, threads: int) -> Callable[[], Any]:
    """Return the forward of an engine by its name."""
    inputs = torch.load(folder / "inputs.pt")
    kind, _, way = engine.partition(" ")
    if kind == "onnxruntime":
        return by_onnx_runtime(folder, inputs, int(way), threads)
    if kind == "openvino":
        return by_openvino(folder, inputs, way, threads)
    return by_torch(folder, inputs, way)


def main() -> None:
    """Serve."""
    engine, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    # What libraries take is no part of a model.
    from diffusers import PixArtTransformer2DModel  # noqa: F401

    from loraq.integrations.diffusers import load  # noqa: F401

    before = _resident("VmRSS")
    run = prepare(engine, folder, threads)
    run()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)
    print(_resident("VmHWM") - before, flush=True)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
