"""The ONNX graph of a model, made without its weights: the only file that needs onnx packages.

Every parameter is a fake tensor, which has a shape and no numbers. The graph names each as external
data, at a place of the data file that is known before a number is.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loraq.errors import MissingLibraryError
from loraq.exports.layer import Head
from loraq.exports.trace import quiet, replace_layers, trace
from loraq.safetensors.header import DTYPES, TensorSpec

_OPSET = 21
#: In front of the name of every parameter in the graph.
_PREFIX = "model."


class MatMulNBits(nn.Module):
    """A quantized layer as operators of ONNX Runtime; runs nowhere, is only exported."""

    def __init__(self, head: Head, specs: Mapping[str, TensorSpec]) -> None:
        """Take the tensors that were laid out for a layer, without numbers."""
        super().__init__()
        self.head = head
        for name, spec in specs.items():
            leaf = name.removeprefix(f"{head.name}.")
            tensor = torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device="meta")
            self.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        bias = torch.empty(head.shape[0], device="meta") if head.bias else None
        self.bias = nn.Parameter(bias, requires_grad=False) if bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """Return y = main(x) + up(down(x)) + bias."""
        (n, k), parameters = self.head.shape, self._parameters
        y = self._product(x, "weight", n, k, 4, self.head.block)
        if "down_codes" in parameters:
            rank = self.head.rank
            inner = self._product(x, "down", rank, k, 8, 32)
            y = y + self._product(inner, "up", n, rank, 8, 32)
        elif "down" in parameters:
            y = y + (x @ self.get_parameter("down")) @ self.get_parameter("up")
        return y if self.bias is None else y + self.bias

    def _product(self, x: Tensor, part: str, n: int, k: int, bits: int, block: int) -> Tensor:
        codes, scales = self.get_parameter(f"{part}_codes"), self.get_parameter(f"{part}_scales")
        attributes: Any = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": 0}
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, codes, scales),
            attrs=attributes,
            dtype=x.dtype,
            shape=(*x.shape[:-1], n),
            version=1,
        )


def build_graph(
    model: nn.Module,
    layers: Sequence[tuple[Head, Mapping[str, TensorSpec]]],
    inputs: Mapping[str, Tensor],
    fixed: Mapping[str, Any],
    place: Callable[[str], tuple[str, int, TensorSpec] | None],
) -> bytes:
    """Return the bytes of an ONNX file whose numbers are in a file beside it.

    Args:
        model: on the meta device, its quantized layers empty.
        layers: the layers that become `MatMulNBits`, and their tensors; all others that are
            quantized become float ones.
        inputs: examples; images and tokens may be more or fewer, height and width are as they are,
            because tables of positions are made for them.
        fixed: other arguments of the forward.
        place: file, offset and spec of a tensor by its name in the model.

    Raises:
        ExportError: torch cannot export the model.
        MissingLibraryError: onnx or onnxscript is not installed.
    """
    try:
        import onnx_ir
        import onnxscript  # noqa: F401 (torch asks for it)
    except ImportError as error:
        raise MissingLibraryError(
            f"Target 'onnx' needs onnx and onnxscript ({error}). Run: pip install \"loraq[onnx]\""
        ) from error
    new = replace_layers(model, {head.name: MatMulNBits(head, specs) for head, specs in layers})
    with quiet(model, "ONNX"):
        program = torch.onnx.export(
            trace(new, inputs, fixed),
            input_names=list(inputs),
            dynamo=True,
            opset_version=_OPSET,
            verbose=False,
            optimize=False,
        )
    assert program is not None, "torch returns a program where it is not told to write one"
    _drop_idle_squeezes(program.model.graph, onnx_ir)
    for name, value in program.model.graph.initializers.items():
        found = place(name.removeprefix(_PREFIX))
        if found is None:
            continue  # a table that no file holds: its numbers are in the graph
        file, offset, spec = found
        assert tuple(value.shape) == spec.shape, f"'{name}' has another shape in the graph"
        value.const_value = onnx_ir.ExternalTensor(
            file, offset, spec.nbytes, value.dtype, name=name, shape=value.shape
        )
    raw: bytes = onnx_ir.serde.serialize_model(program.model).SerializeToString()
    return raw


def _drop_idle_squeezes(graph: Any, ir: Any) -> None:
    """Let every Squeeze of an axis that is not 1 do nothing, as in torch; ONNX refuses it.

    An axis that can vary is not 1: torch makes it a constant otherwise.
    """
    for node in graph:
        if node.op_type != "Squeeze" or len(node.inputs) < 2:
            continue
        axes, shape = ir.convenience.get_const_tensor(node.inputs[1]), node.inputs[0].shape
        if axes is not None and shape is not None and all(shape[i] != 1 for i in axes.numpy()):
            node.op_type = "Identity"
            node.resize_inputs(1)
