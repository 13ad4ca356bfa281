"""`onnx`: whole models by ONNX Runtime and OpenVINO."""

import numpy as np
import onnxruntime
import openvino
import pytest
import torch

import loraq
from tests.exports.models import MODELS, distance, exact_output, save_quantized

#: ONNX Runtime adds in another order: of the tiny SANA torch itself is 5e-7 from the sums in fp64,
#: and ONNX Runtime 1.6e-6, as many with its optimizations switched off.
LARGEST = {"flux": 1e-6, "pixart": 1e-6, "sana": 2e-6}
CASES = [
    ("flux", "int4-a16+bf16-r16"),
    ("flux", "int4-a16+w8a8-r32"),
    ("flux", "mxint4-a16+w6a6-r32"),
    ("pixart", "int4_b32-a16+w8a8-r32"),
    ("sana", "int4-a16+bf16-r16"),
]


EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def by_onnx_runtime(file, inputs):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def by_openvino(file, inputs):
    return openvino.Core().compile_model(str(file), "CPU", EXACT)(inputs)[0]


@pytest.mark.parametrize(("name", "recipe"), CASES, ids=str)
def test_a_whole_model_is_the_exact_weight_only_forward(tmp_path, name, recipe):
    model = save_quantized(name, recipe, tmp_path / "quantized")
    report = loraq.export(
        *(tmp_path / "quantized", tmp_path / "out"),
        **{"to": "onnx", "allow_dense": name == "sana", "progress": False},
    )
    assert report.counts["rounded"] == 0
    tensors = {k: v for k, v in MODELS[name].inputs().items() if isinstance(v, torch.Tensor)}
    inputs = {key: tensor.numpy().astype(np.float32) for key, tensor in tensors.items()}
    wanted, without = exact_output(model, name), exact_output(model, name, branch=False)
    for run in (by_onnx_runtime, by_openvino):
        found = torch.tensor(run(tmp_path / "out/model.onnx", inputs))
        assert distance(found, wanted) < LARGEST[name]
        assert distance(without, found) > 1e-2
