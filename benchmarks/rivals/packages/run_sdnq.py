"""SDNQ (GPL-3.0), as a black box: `sdnq_post_load_quant` on a layer.

The weight is the layer's output for the identity.

Its scales are fp32 unless the configuration says otherwise; both are measured. A Hadamard rotation
happens inside the layer. One randomized SVD: the seed is set, but other versions may draw
otherwise.
"""

import torch
from contract import Quantized, Variant, linear, nbytes_of, run
from sdnq import SDNQConfig, sdnq_post_load_quant
from torch import Tensor, nn

BF16_SCALES = {"scale_dtype": "bfloat16", "zero_point_dtype": "bfloat16"}


def variant(label: str, family: str = "int4", **settings: object) -> Variant:
    """Return a variant of these fields of `SDNQConfig`."""

    def quantize(weight: Tensor, rank: int) -> Quantized:
        config = SDNQConfig(
            svd_rank=rank, quantization_device="cpu", return_device="cpu", **settings
        )
        found = sdnq_post_load_quant(
            nn.Sequential(linear(weight)), torch_dtype=torch.bfloat16, quantization_config=config
        )
        model = found[0] if isinstance(found, tuple) else found
        stored = model.state_dict()
        main = model(torch.eye(weight.shape[1], dtype=torch.bfloat16)).T.float()
        branch = None
        if "0.svd_up" in stored and not config.use_hadamard:
            branch = stored["0.svd_up"].float() @ stored["0.svd_down"].float()
            main = main - branch
        return Quantized(main, nbytes_of(stored.values()), branch, splits=not config.use_hadamard)

    return Variant(label, quantize, family)


run(
    variant("int4", weights_dtype="int4"),
    variant("uint4", weights_dtype="uint4"),
    variant("uint4, bf16 scales", weights_dtype="uint4", **BF16_SCALES),
    variant("uint4 g128", weights_dtype="uint4", group_size=128),
    variant("uint4 Hadamard", weights_dtype="uint4", use_hadamard=True),
    variant("int4 SVD", weights_dtype="int4", use_svd=True),
    variant("uint4 SVD", weights_dtype="uint4", use_svd=True),
    variant("uint4 SVD, bf16 scales", weights_dtype="uint4", use_svd=True, **BF16_SCALES),
    variant(
        "uint4 g64 SVD, bf16 scales",
        weights_dtype="uint4",
        group_size=64,
        use_svd=True,
        **BF16_SCALES,
    ),
    variant(
        "uint4 SVD Hadamard, bf16 scales",
        weights_dtype="uint4",
        use_svd=True,
        use_hadamard=True,
        **BF16_SCALES,
    ),
    variant(
        "fp4 SVD, bf16 scales", "mxfp4", weights_dtype="float4_e2m1fn", use_svd=True, **BF16_SCALES
    ),
)
