"""Whether the kernel of `decode` takes a weight, and the dense matrices that it makes of one.

A kernel that was compiled on a machine nobody has seen is not trusted: each variant decodes a small
matrix first, and is used if it is the reference's. Where it does not compile (it needs a C
compiler), the layers run without it, and a warning says so.
"""

import logging
from functools import lru_cache

import torch
from torch import Tensor

from loraq.formats import BlockFormat, QTensor, get_format
from loraq.kernels.base import Operands, decode_one
from loraq.kernels.triton.presence import absence
from loraq.linalg import relative_error
from loraq.packed import PackedWeight
from loraq.transforms import block_side, unrotate

#: What sums in another order change, relative to the matrix.
_ORDER_OF_SUMS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}

_LOGGER = logging.getLogger("loraq.kernels")


def takes(packed: PackedWeight, dtype: torch.dtype) -> bool:
    """Return whether the kernel decodes a weight on its device, and does it right."""
    main, device = packed.main, packed.device
    if device.type not in ("cuda", "cpu") or absence(device) is not None:
        return False
    from loraq.kernels.triton.decode import BLOCK_K, SMALLEST_SIDE

    side = block_side(main.shape[-1], packed.scheme.rotation)
    if not isinstance(main.format, BlockFormat) or not (
        packed.scheme.rotation == 0 or SMALLEST_SIDE <= side <= BLOCK_K
    ):
        return False
    rotation = side if packed.scheme.rotation else 0
    trials = [(main.format.name, rotation, False)]
    if packed.branch is not None:
        factors = packed.branch.proj_up.format.name
        trials += [(main.format.name, rotation, True), (factors, 0, False)]
        trials += [(factors, rotation, False)] if rotation else []
    return all(_is_right(*trial, dtype, device) for trial in trials)


def decode(packed: PackedWeight, dtype: torch.dtype, *, merged: bool) -> Operands:
    """Return the dense matrices of `dtype`, rotated back.

    Args:
        packed: a weight that `takes` takes.
        dtype: bf16 or fp32.
        merged: whether the branch is added to the main matrix, which then stands alone.
    """
    from loraq.kernels.triton.decode import decode as launch

    main, branch, rotation = packed.main, packed.branch, packed.scheme.rotation
    if branch is None:
        return Operands(launch(main, dtype, None, rotation), None, None)
    up = _decode_factor(branch.proj_up, dtype)
    if merged:
        down = _decode_factor(branch.proj_down, dtype)
        return Operands(launch(main, dtype, (up, down), rotation), None, None)
    down = _decode_factor(branch.proj_down, dtype, rotation)
    return Operands(launch(main, dtype, None, rotation), up, down)


def _decode_factor(q: QTensor, dtype: torch.dtype, rotation: int = 0) -> Tensor:
    from loraq.kernels.triton.decode import decode as launch

    if isinstance(q.format, BlockFormat):
        return launch(q, dtype, None, rotation)
    return decode_one(q, dtype)  # a cast


@lru_cache(maxsize=256)
def _is_right(
    name: str, rotation: int, with_branch: bool, dtype: torch.dtype, device: torch.device
) -> bool:
    """Return whether a matrix of small and large rows becomes what the reference makes of it.

    Equal bits, unless there are sums, in whose order both differ.
    """
    fmt = get_format(name)
    if not isinstance(fmt, BlockFormat):
        return True
    from loraq.kernels.triton.decode import decode as launch

    ramp = torch.linspace(-1, 1, 8 * 384, device="cpu").view(8, 384)
    q = fmt.quantize(ramp * torch.logspace(-3, 3, 8, device="cpu")[:, None])
    up, down = ramp[:, :32].to(dtype), ramp.repeat(4, 1).to(dtype)
    expected = q.dequantize()
    if with_branch:
        expected += up.float() @ down.float()
    expected = unrotate(expected, rotation).to(dtype)
    moved = {part: tensor.to(device) for part, tensor in q.tensors.items()}
    there = QTensor(moved["packed"], moved["scale"], moved.get("global_scale"), q.shape, fmt)
    branch = (up.to(device), down.to(device)) if with_branch else None
    try:
        values = launch(there, dtype, branch, rotation).to("cpu")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, of its compilers, of the C compiler
        reason = f"it does not run here ({type(error).__name__}: {error})"
    else:
        has_sums = with_branch or rotation > 0
        distance = relative_error(expected.double(), values.double())
        if torch.equal(values, expected) or (has_sums and distance <= _ORDER_OF_SUMS[dtype]):
            return True
        reason = "its values are not those of the reference"
    _LOGGER.warning(
        "Weights in '%s' are decoded on %s by torch's operators, which takes longer: Triton's "
        "kernel is not used, as %s.",
        name,
        device,
        reason,
    )
    return False
