"""AMD Quark: `ModelQuantizer` without data, INT4 in groups of 64 and MXFP4.

Each runs with its SVDQuant and without a branch.

Without data it skips smoothing. It simulates: bytes are counted with bf16 scales for INT4, E8M0
scales for MXFP4 and bf16 factors.
"""

from functools import partial

import torch
from contract import Quantized, Variant, linear, nbytes_of, run
from quark.torch import ModelQuantizer
from quark.torch.quantization.config.config import (
    Int4PerGroupSpec,
    OCP_MXFP4Spec,
    QConfig,
    QLayerConfig,
    QTensorConfig,
    SVDQuantConfig,
)
from torch import Tensor, nn

INT4 = Int4PerGroupSpec(ch_axis=-1, group_size=64, is_dynamic=False).to_quantization_spec()
MXFP4 = OCP_MXFP4Spec(ch_axis=-1, is_dynamic=False).to_quantization_spec()


def quantize(weight: Tensor, rank: int, spec: QTensorConfig, svd: bool) -> Quantized:
    """Quantize a model of one layer."""
    algorithms = (
        [SVDQuantConfig(svd_rank=rank, search_alpha=False, min_layer_size=1)] if svd else []
    )
    config = QConfig(global_quant_config=QLayerConfig(weight=spec), algo_config=algorithms)
    quantizer, model = ModelQuantizer(config), nn.Sequential(linear(weight))
    model.device = torch.device("cpu")  # as models of transformers and diffusers have it
    model = quantizer.freeze(quantizer.quantize_model(model))
    eye, layer = torch.eye(weight.shape[1], dtype=torch.bfloat16), model[0]
    nbytes = weight.numel() // 2 + weight.numel() // spec.group_size * (2 if spec is INT4 else 1)
    if not svd:
        return Quantized(layer(eye).T.float(), nbytes)
    factors = [layer.correction.l2.weight, layer.correction.l1.weight]
    return Quantized(
        layer.layer(eye).T.float(),
        nbytes + nbytes_of(factors),
        factors[0].float() @ factors[1].float(),
    )


run(
    *(
        Variant(
            f"{name}{' SVD' if svd else ''}",
            partial(quantize, spec=spec, svd=svd),
            family,
            "as packed",
        )
        for name, spec, family in (("INT4 g64", INT4, "int4"), ("MXFP4", MXFP4, "mxfp4"))
        for svd in (False, True)
    )
)
