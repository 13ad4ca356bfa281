"""torchao: `quantize_` with `IntxWeightOnlyConfig` in 4 bits, and its MXFP4 tensor.

On a CPU its int4 codes stay in int8 tensors, so they are counted as 4 bits each.
"""

from functools import partial

import torch
from contract import Quantized, Variant, linear, nbytes_of, run
from torch import Tensor, nn
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from torchao.quantization.quant_primitives import MappingType
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

SYMMETRIC, ASYMMETRIC = MappingType.SYMMETRIC, MappingType.ASYMMETRIC
PACKED = "codes as 4 bits"


def int4(
    weight: Tensor, rank: int, size: int, mapping: MappingType, algorithm: str = "AFFINE"
) -> Quantized:
    """Quantize groups of `size`; an asymmetric zero point is counted as 8 bits, as it is kept."""
    model = nn.Sequential(linear(weight))
    config = IntxWeightOnlyConfig(
        weight_dtype=torch.int4,
        granularity=PerGroup(size),
        mapping_type=mapping,
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm[algorithm],
    )
    quantize_(model, config)
    stored = model[0].weight
    beside = [stored.scale] if mapping is SYMMETRIC else [stored.scale, stored.zero_point]
    return Quantized(stored.dequantize().float(), stored.qdata.numel() // 2 + nbytes_of(beside))


def mxfp4(weight: Tensor, rank: int) -> Quantized:
    """Quantize to E2M1 with E8M0 scales of 32."""
    stored = MXTensor.to_mx(weight.bfloat16(), torch.float4_e2m1fn_x2, block_size=32)
    return Quantized(stored.dequantize(torch.float32), nbytes_of([stored.qdata, stored.scale]))


run(
    Variant("int4 g64", partial(int4, size=64, mapping=SYMMETRIC), counted=PACKED),
    Variant("int4 g32", partial(int4, size=32, mapping=SYMMETRIC), counted=PACKED),
    Variant("int4 g64 asymmetric", partial(int4, size=64, mapping=ASYMMETRIC), counted=PACKED),
    Variant(
        "int4 g64 HQQ scales",
        partial(int4, size=64, mapping=SYMMETRIC, algorithm="HQQ_SCALE_ONLY"),
        counted=PACKED,
    ),
    Variant("MXFP4", mxfp4, "mxfp4"),
)
