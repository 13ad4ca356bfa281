"""The graph of a model as OpenVINO's IR, made without its weights.

OpenVINO converts a program of torch whose weights are inputs. Codes and scales take their place,
and in the text of the graph these become constants, at places of the other file that are known
before a number is.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from loraq.errors import MissingLibraryError
from loraq.exports.graph_files import GraphFiles
from loraq.exports.layer import Head
from loraq.exports.trace import quiet, replace_layers, trace
from loraq.kernels.openvino import filled_rank
from loraq.safetensors.header import DTYPE_NAMES, TensorSpec

#: OpenVINO's names of the dtypes that a model's tensors have once floats are in fp32.
_KINDS = {"F32": "f32", "I64": "i64", "I32": "i32", "I16": "i16", "I8": "i8", "U8": "u8"}
_KINDS |= {"BOOL": "boolean"}


class Stored(NamedTuple):
    """A matrix as codes and scales."""

    #: OpenVINO's dtype of the codes.
    kind: str
    #: Rows, blocks of a row, values of a block.
    blocks: tuple[int, int, int]


def rank_in_graph(head: Head) -> int:
    """Return the rank of a layer's branch, filled up where its factors are codes."""
    branch = head.scheme.branch
    return head.rank if branch is None or head.lora_rank else filled_rank(branch)


class Branched(nn.Module):
    """A quantized layer whose matrices are floats; runs nowhere, is only traced."""

    def __init__(self, head: Head) -> None:
        """Take the shapes of a layer, without numbers."""
        super().__init__()
        (n, k), self.is_conv = head.shape, head.is_conv
        shapes = {"weight": (n, k)}
        if rank := rank_in_graph(head):
            shapes |= {"down": (rank, k), "up": (n, rank)}
        for leaf, shape in shapes.items():
            empty = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
            self.register_parameter(leaf, empty)
        bias = torch.empty(n, device="meta") if head.bias else None
        self.bias = nn.Parameter(bias, requires_grad=False) if bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """Return y = main(x) + up(down(x)) + bias."""
        y = self._product(x, "weight", self.bias)
        if "down" in self._parameters:
            y = y + self._product(self._product(x, "down"), "up")
        return y

    def _product(self, x: Tensor, leaf: str, bias: Tensor | None = None) -> Tensor:
        matrix: Tensor = getattr(self, leaf)  # no parameter while others stand in for them
        if self.is_conv:
            return conv2d(x, matrix[:, :, None, None], bias)
        return linear(x, matrix, bias)


def build_graph(
    model: nn.Module,
    layers: Mapping[str, tuple[Head, Mapping[str, Stored]]],
    inputs: Mapping[str, Tensor],
    fixed: Mapping[str, Any],
    files: GraphFiles,
) -> GraphFiles:
    """Return the files with the text of the graph, and with the numbers that are its own.

    Args:
        model: on the meta device, its quantized layers empty.
        layers: those that stay quantized and, by their full names, the matrices of each that are
            codes; all others become float ones.
        inputs: examples; see `trace`.
        fixed: other arguments of the forward.
        files: where all other numbers stand.

    Raises:
        ExportError: OpenVINO does not convert the model.
        MissingLibraryError: openvino is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingLibraryError(
            f"Target 'openvino' needs openvino ({error}). Run: pip install \"loraq[openvino]\""
        ) from error
    new = replace_layers(model, {name: Branched(head) for name, (head, _) in layers.items()})
    stored = {name: part for _, parts in layers.values() for name, part in parts.items()}
    lifted = _find_lifted(new, files.specs, layers)
    with quiet(model, "OpenVINO"):
        program = trace(new, inputs, fixed, lifted)
        graph = openvino.convert_model(program)
        for name, node in _name_inputs(graph, program, [*inputs, *lifted]).items():
            if name in stored:
                _put_codes(graph, node, stored[name])
        graph.validate_nodes_and_infer_types()
        # Names of its own making count up in a process.
        graph.set_friendly_name(type(model).__name__)
        for i, node in enumerate(graph.get_ordered_ops()):
            if node.get_type_name() != "Parameter":
                node.set_friendly_name(f"{node.get_type_name()}_{i}")
        with tempfile.TemporaryDirectory() as folder:
            text, own = Path(folder) / "graph.xml", Path(folder) / "graph.bin"
            openvino.serialize(graph, text, own)
            return replace(
                files, graph=_place(text.read_bytes(), files), constants=own.read_bytes()
            )


def _find_lifted(
    model: nn.Module, specs: Mapping[str, TensorSpec], layers: Mapping[str, Any]
) -> list[str]:
    """Return the names of all tensors of a model that the file holds, in one form or another."""
    names = [*dict(model.named_parameters()), *dict(model.named_buffers())]
    return [name for name in names if name in specs or name.rpartition(".")[0] in layers]


def _name_inputs(graph: Any, program: Any, names: Sequence[str]) -> dict[str, Any]:
    """Give the graph's inputs names, dtypes and shapes of the program's; return them by name."""
    import openvino

    nodes = (node for node in program.graph.nodes if node.op == "placeholder")
    values = {node.name: node.meta["val"] for node in nodes}
    order = program.graph_signature.user_inputs
    found = dict(zip(names, graph.get_parameters(), strict=True))
    for (name, node), key in zip(found.items(), order, strict=True):
        value = values[key]
        shape = [size if isinstance(size, int) else -1 for size in value.shape]
        node.set_partial_shape(openvino.PartialShape(shape))
        node.set_element_type(_kind(_KINDS[DTYPE_NAMES[value.dtype]]))
        node.set_friendly_name(name)
        node.output(0).get_tensor().set_names({name})
    return found


def _put_codes(graph: Any, node: Any, part: Stored) -> None:
    """Let codes and scales stand for a matrix of a layer, each still an input of the graph."""
    from openvino import opset13 as ops

    name = node.get_friendly_name()
    codes = ops.parameter([*part.blocks], _kind(part.kind), name=f"{name}_codes")
    scales = ops.parameter([*part.blocks[:2], 1], _kind("f32"), name=f"{name}_scales")
    product = ops.multiply(ops.convert(codes, "f32"), scales)
    matrix = ops.reshape(product, [part.blocks[0], part.blocks[1] * part.blocks[2]], False)
    for user in node.output(0).get_target_inputs():
        user.replace_source_output(matrix.output(0))
    graph.remove_parameter(node)
    graph.add_parameters([codes, scales])


def _kind(name: str) -> Any:
    import openvino

    return getattr(openvino.Type, name)


def _place(raw: bytes, files: GraphFiles) -> bytes:
    """Return the text of a graph in which what a file holds is constants, and no inputs."""
    root = ElementTree.fromstring(raw)
    for layer in root.iter("layer"):
        data, name = layer.find("data"), layer.get("name", "")
        if data is None:
            continue
        if layer.get("type") == "Const":
            data.set("offset", str(int(data.get("offset", "")) + files.data_bytes))
        elif layer.get("type") == "Parameter" and name in files.specs:
            layer.set("type", "Const")
            data.set("offset", str(files.offsets[name]))
            data.set("size", str(files.specs[name].nbytes))
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
