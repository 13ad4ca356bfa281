"""Target `openvino`: OpenVINO's IR, a graph and a file with every number of it.

By tensor, for a matrix (N, K) in blocks of B, which is a layer's main weight, or a factor:

    weight_codes    (N, K/B, B)   OpenVINO's `i4` (element 2j in the low half), `i8`, `f4e2m1` (as
                                  `i4`), `f8e4m3` or `f8e5m2`; codes of 5 and 6 bits take 8
    weight_scales   (N, K/B, 1)   fp32
    down, up        (R, K), (N, R), of 16 bits or with a LoRA on top, in fp32

Factors that are codes are filled up with zeros to a rank of whole blocks, and to an even one.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from loraq.exports.codes import e2m1_values, per_block, signed_values, split_low_first
from loraq.exports.graph_files import GraphFiles
from loraq.exports.graph_target import EXACT, TRAPS, GraphTarget
from loraq.exports.layer import Decoded, Factors, Head, Layer, Specs, Tensors
from loraq.exports.openvino_graph import Stored, build_graph, rank_in_graph
from loraq.exports.target import About
from loraq.formats import Format, QTensor
from loraq.formats.block import BlockFormat
from loraq.formats.element import E2M1, E5M2
from loraq.formats.packing import unpack
from loraq.safetensors.header import DTYPES, TensorSpec

#: Dtype of codes in a file, by OpenVINO's.
_DTYPES = {"i4": "U8", "f4e2m1": "U8", "i8": "I8", "f8e4m3": "F8_E4M3", "f8e5m2": "F8_E5M2"}
_HALF_BYTES = ("i4", "f4e2m1")


class OpenVino(GraphTarget):
    """A graph whose weights OpenVINO decodes as it multiplies."""

    about = About(
        name="openvino",
        loaded_by="OpenVINO (FLUX, PixArt, SANA, SD3)",
        holds="every format of 4 to 8 bits, 4 bits as 4; any rank in each layer; 1×1 convolutions",
        exact="codes, scales, and branches of every format (8-bit ones stay 8 bits, those of 16 "
        "are written in fp32; ranks are filled up with zeros to whole blocks, and to even ones)",
        activations="8 bits beside INT4 and INT8 in blocks of 32 or more, unless it is told not "
        "to; else bf16 where the CPU has it, or fp32",
        verified="whole models (FLUX, SANA, PixArt) on a CPU",
        unverified="Intel GPUs and NPUs; SD3",
        load=f"import openvino\n\n{EXACT}"
        'fast = {{"INFERENCE_PRECISION_HINT": "bf16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "64"}}\n'
        'model = openvino.Core().compile_model("{folder}/model.xml", "CPU", fast)\n'
        "print(model.inputs)",
        traps=(
            "`model.xml` and `model.bin` belong together, under these names.",
            "Activations are rounded to 8 bits in blocks where `DYNAMIC_QUANTIZATION_GROUP_SIZE` "
            "is no longer than a block of the weight, and 0 switches that off.",
            *TRAPS,
        ),
    )
    graph_file, one_file = "model.xml", "model.bin"

    def refuses(self, head: Head) -> str:
        """Return why a layer is dense."""
        if head.main is None:
            return f"its weight is in {head.scheme.weight}, which has no codes"
        if _stored(head.main, head.shape) is None:
            return f"rows of {head.shape[1]} are no multiple of a block of {head.block}"
        return ""

    def specs(self, head: Head) -> Specs:
        """Return the tensors of a layer."""
        specs: Specs = {}
        for leaf, (fmt, shape) in _matrices(head).items():
            name, stored = f"{head.name}.{leaf}", _stored(fmt, shape)
            if stored is None:
                specs[name] = TensorSpec("F32", shape)
                continue
            width = shape[1] // 2 if stored.kind in _HALF_BYTES else shape[1]
            specs[f"{name}_codes"] = TensorSpec(_DTYPES[stored.kind], (shape[0], width))
            specs[f"{name}_scales"] = TensorSpec("F32", stored.blocks[:2])
        return specs

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        """Return codes, scales and factors."""
        head, made = layer.head, dict[str, Tensor]()
        for leaf, (fmt, shape) in _matrices(head).items():
            name, stored = f"{head.name}.{leaf}", _stored(fmt, shape)
            if stored is None:
                assert layer.branch is not None, "a layer with a factor has a branch"
                made[name] = getattr(layer.branch, leaf)
                continue
            matrix = layer.main
            if leaf != "weight":
                assert layer.packed_branch is not None, "codes of a factor are those of a branch"
                matrix = getattr(layer.packed_branch, f"proj_{leaf}")
            made[f"{name}_codes"], made[f"{name}_scales"] = _codes(matrix, stored), _scales(matrix)
        return {name: _fill(made[name], spec.shape) for name, spec in self.specs(head).items()}

    def decode(self, tensors: Tensors, head: Head) -> Decoded:
        """Return codes times scales, or the float matrix."""
        made = {}
        for leaf, (fmt, shape) in _matrices(head).items():
            name, stored = f"{head.name}.{leaf}", _stored(fmt, shape)
            if stored is None:
                made[leaf] = tensors[name]
            else:
                values = _values(tensors[f"{name}_codes"], stored.kind)
                made[leaf] = per_block(values, tensors[f"{name}_scales"])
        branch = Factors(made["up"], made["down"]) if head.rank else None
        return Decoded(made["weight"], branch)

    def build(self, files: GraphFiles) -> GraphFiles:
        """Build the graph."""
        layers = {head.name: (head, _stored_parts(head)) for head in self.held}
        return build_graph(self.job.model, layers, self.inputs, self.fixed, files)


def _stored_parts(head: Head) -> dict[str, Stored]:
    """Return the matrices of a layer that are stored as codes, by their full names."""
    return {
        f"{head.name}.{leaf}": stored
        for leaf, (fmt, shape) in _matrices(head).items()
        if (stored := _stored(fmt, shape))
    }


def _matrices(head: Head) -> dict[str, tuple[Format | None, tuple[int, int]]]:
    """Return format and shape of each matrix of a layer; no format for fp32."""
    (n, k), rank, branch = head.shape, rank_in_graph(head), head.scheme.branch
    made: dict[str, tuple[Format | None, tuple[int, int]]] = {"weight": (head.main, (n, k))}
    if rank:
        fmt = branch.weight_format if branch and not head.lora_rank else None
        made |= {"down": (fmt, (rank, k)), "up": (fmt, (n, rank))}
    return made


def _stored(fmt: Format | None, shape: tuple[int, int]) -> Stored | None:
    """Return how a matrix is stored as codes; `None` if it is not."""
    if not isinstance(fmt, BlockFormat):
        return None
    rows, n = shape
    size = min(fmt.block_size or n, n)
    if n % size or (fmt.bits == 4 and n % 2):
        return None
    if fmt.element.is_float:
        kind = {E2M1: "f4e2m1", E5M2: "f8e5m2"}.get(fmt.element, "f8e4m3")
    else:
        kind = "i4" if fmt.bits == 4 else "i8"
    return Stored(kind, (rows, n // size, size))


def _codes(matrix: QTensor, stored: Stored) -> Tensor:
    """Return the codes of a matrix in OpenVINO's dtype."""
    fmt = matrix.format
    assert isinstance(fmt, BlockFormat)
    if stored.kind in _HALF_BYTES:
        return matrix.packed
    codes = unpack(matrix.packed, matrix.shape[-1], fmt.bits)
    if fmt.element.is_float:
        return fmt.element.decode(codes).to(DTYPES[_DTYPES[stored.kind]])
    spare = 8 - fmt.bits  # two's complement again: up to the sign bit, and back with it
    return (codes << spare).view(torch.int8) >> spare


def _fill(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a matrix with zeros below and beside it up to a shape."""
    rows, columns = (new - old for new, old in zip(shape, matrix.shape, strict=True))
    if not (rows or columns):
        return matrix
    raw = matrix.view(torch.uint8) if matrix.element_size() == 1 else matrix
    return pad(raw, (0, columns, 0, rows)).view(matrix.dtype)


def _scales(matrix: QTensor) -> Tensor:
    """Return what every block is multiplied by, (rows, blocks)."""
    fmt = matrix.format
    assert isinstance(fmt, BlockFormat)
    scales = fmt.scales(matrix) if fmt.element.is_float else fmt.code_scales(matrix)
    return scales.squeeze(-1)


def _values(codes: Tensor, kind: str) -> Tensor:
    """Return what codes stand for in OpenVINO, in fp32."""
    if kind not in _HALF_BYTES:
        return codes.float()
    halves = split_low_first(codes)
    return signed_values(halves) if kind == "i4" else e2m1_values(halves)
