"""Target `onnx`: one graph for ONNX Runtime and OpenVINO, its weights in a file beside it.

By tensor, for a layer (N, K) in blocks of B, operator `MatMulNBits` of the domain com.microsoft:

    weight_codes   (N, K/B, B/2)   code + 8, element 2j in the low half; zero point 8
    weight_scales  (N · K/B)       fp32
    down_codes     (R, K/32, 32)   an 8-bit branch: code + 128;   down_scales (R · K/32)
    up_codes       (N, R/32, 32)                                  up_scales   (N · R/32)
    down, up       (K, R), (R, N)  any other branch, in fp32
"""

from dataclasses import replace

from torch import Tensor

from loraq.exports.codes import offset_codes, per_block, split_low_first
from loraq.exports.graph_files import GraphFiles
from loraq.exports.graph_target import EXACT, TRAPS, GraphTarget
from loraq.exports.layer import Decoded, Factors, Head, Layer, Specs, Tensors
from loraq.exports.onnx_graph import build_graph
from loraq.exports.target import About
from loraq.formats import QTensor
from loraq.formats.block import BlockFormat
from loraq.safetensors.header import TensorSpec


class Onnx(GraphTarget):
    """A graph of ONNX Runtime's 4- and 8-bit products."""

    about = About(
        name="onnx",
        loaded_by="ONNX Runtime and OpenVINO (FLUX, PixArt, SANA, SD3)",
        holds="INT4 in blocks of 16, 32, 64 …, MXINT4; any rank in each layer; 8-bit branches as "
        "8 bits where the rank is a multiple of 32; no 1×1 convolutions, no FP4",
        exact="codes, scales, and branches of every format (8-bit ones stay 8 bits, others are "
        "written in fp32)",
        activations="fp32; OpenVINO rounds to 8 bits unless it is told not to",
        verified="whole models (FLUX, SANA, PixArt) by both on a CPU",
        unverified="GPUs and NPUs; SD3; speed",
        load="import onnxruntime\n\n"
        'session = onnxruntime.InferenceSession("{folder}/model.onnx")\n'
        "print([(each.name, each.shape) for each in session.get_inputs()])\n\n"
        f"# or\nimport openvino\n\n{EXACT}"
        'model = openvino.Core().compile_model("{folder}/model.onnx", "CPU", exact)',
        traps=(
            "`model.onnx` and `model.onnx.data` belong together, under these names.",
            "OpenVINO's defaults round activations to 8 bits in blocks, a relative error of about "
            "3e-3; the two settings above switch that off.",
            *TRAPS,
        ),
    )
    graph_file, one_file = "model.onnx", "model.onnx.data"

    def refuses(self, head: Head) -> str:
        """Return why a layer is dense."""
        fmt = head.main
        if fmt is None or fmt.bits != 4 or fmt.element.is_float:
            return f"ONNX Runtime runs INT4 weights here, and this is {head.scheme.weight}"
        if head.block < 16 or head.block & (head.block - 1):
            return f"blocks of {head.block}: powers of two from 16 on are needed"
        return ""

    def specs(self, head: Head) -> Specs:
        """Return the tensors of a layer."""
        (n, k), rank, name, block = head.shape, head.rank, head.name, head.block
        specs = {
            f"{name}.weight_codes": TensorSpec("U8", (n, k // block, block // 2)),
            f"{name}.weight_scales": TensorSpec("F32", (n * k // block,)),
        }
        if _is_8_bit(head):
            return specs | {
                f"{name}.down_codes": TensorSpec("U8", (rank, k // 32, 32)),
                f"{name}.down_scales": TensorSpec("F32", (rank * k // 32,)),
                f"{name}.up_codes": TensorSpec("U8", (n, rank // 32, 32)),
                f"{name}.up_scales": TensorSpec("F32", (n * rank // 32,)),
            }
        if rank:
            specs[f"{name}.down"] = TensorSpec("F32", (k, rank))
            specs[f"{name}.up"] = TensorSpec("F32", (rank, n))
        return specs

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        """Return codes, scales and factors."""
        head, main, made = layer.head, layer.main, dict[str, Tensor]()
        made["weight_codes"], made["weight_scales"] = offset_codes(main.packed), _scales(main)
        if _is_8_bit(head):
            assert layer.packed_branch is not None, "a format of 8 bits is that of a branch"
            for part in ("down", "up"):
                factor: QTensor = getattr(layer.packed_branch, f"proj_{part}")
                made[f"{part}_codes"] = factor.packed ^ 0x80
                made[f"{part}_scales"] = _scales(factor)
        elif layer.branch is not None:
            made["down"], made["up"] = layer.branch.down.mT, layer.branch.up.mT
        specs = self.specs(head)
        return {
            name: made[name.rpartition(".")[2]].reshape(spec.shape) for name, spec in specs.items()
        }

    def decode(self, tensors: Tensors, head: Head) -> Decoded:
        """Return (code − zero point) · scale of every product."""
        n, name = head.shape[0], head.name
        codes = split_low_first(tensors[f"{name}.weight_codes"].view(n, -1)) - 8
        main = per_block(codes.float(), tensors[f"{name}.weight_scales"].view(n, -1))
        if _is_8_bit(head):
            parts = []
            for part, rows in (("up", n), ("down", head.rank)):
                values = tensors[f"{name}.{part}_codes"].view(rows, -1).float() - 128
                parts.append(per_block(values, tensors[f"{name}.{part}_scales"].view(rows, -1)))
            return Decoded(main, Factors(*parts))
        if not head.rank:
            return Decoded(main)
        return Decoded(main, Factors(tensors[f"{name}.up"].mT, tensors[f"{name}.down"].mT))

    def build(self, files: GraphFiles) -> GraphFiles:
        """Build the graph."""

        def place(name: str) -> tuple[str, int, TensorSpec] | None:
            spec = files.specs.get(name)
            return (self.one_file, files.offsets[name], spec) if spec else None

        layers = [(head, self.specs(head)) for head in self.held]
        graph = build_graph(self.job.model, layers, self.inputs, self.fixed, place)
        return replace(files, graph=graph)


def _is_8_bit(head: Head) -> bool:
    """Return whether the branch stays in 8 bits: integers in blocks of 32, no LoRA on top."""
    branch = head.scheme.branch
    fmt = branch.weight_format if branch else None
    return (
        isinstance(fmt, BlockFormat)
        and fmt.bits == 8
        and not fmt.element.is_float
        and fmt.block_size == 32
        and not head.lora_rank
        and head.rank % 32 == 0
        and head.shape[1] % 32 == 0
    )


def _scales(matrix: QTensor) -> Tensor:
    """Return what an integer code is multiplied by, in fp32."""
    assert isinstance(matrix.format, BlockFormat)
    return matrix.format.code_scales(matrix)
