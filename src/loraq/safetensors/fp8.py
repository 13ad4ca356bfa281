"""Checkpoints in FP8: each tensor as the floats that it stands for, decoded when it is read.

A plain FP8 tensor is its values, and each of them is a bf16 number. A scaled one lies beside a
scale that multiplies it, one for the tensor or one for each row:

    X.weight  X.weight_scale   diffusers, compressed-tensors, newer ComfyUI
    X.weight  X.scale_weight   ComfyUI, which also writes an empty tensor `scaled_fp8`

The product is taken in fp32, of which an 8-bit value times a bf16 scale needs a half: it is exact;
times an fp32 scale it is rounded once.
"""

from typing import Any

import torch
from torch import Tensor

from loraq.errors import CheckpointError, list_some
from loraq.safetensors.header import FLOATS
from loraq.safetensors.reader import ShardReader

_FP8 = frozenset({"F8_E4M3", "F8_E5M2"})
_SCALES = ("weight_scale", "scale_weight")
#: What else lies beside a scaled weight: scales of the inputs, a description.
_BESIDE = ("input_scale", "scale_input", "comfy_quant")
_MARKER = "scaled_fp8"


def decode_fp8(files: ShardReader) -> "ShardReader | Fp8Reader":
    """Return the tensors of files with every FP8 tensor decoded; the files if they have none.

    Raises:
        CheckpointError: a weight has no scale where others have, or one of another kind.
    """
    reader = Fp8Reader(files)
    return reader if reader.coded else files


def require_unscaled(files: ShardReader) -> None:
    """Raise `CheckpointError` for weights that a loader would take without their scales."""
    decoded = decode_fp8(files)
    if isinstance(decoded, Fp8Reader) and decoded.scales:
        raise CheckpointError(
            f"'{files.folder}' has FP8 weights with scales, which diffusers does not apply when it "
            "loads them. Start from the 16-bit weights; `loraq quantize` alone reads these."
        )


class Fp8Reader:
    """A `TensorReader` of files with FP8 tensors, which hides the scales."""

    def __init__(self, files: ShardReader) -> None:
        """Find the scale of every FP8 tensor.

        Raises:
            CheckpointError: a weight has no scale where others have, or one of another kind.
        """
        self.files, self.folder = files, files.folder
        stored = set(files.names)
        #: The FP8 tensors.
        self.coded = {
            name
            for name in files.names
            if files.dtype(name) in _FP8 and name.rpartition(".")[2] != _MARKER
        }
        #: Name of the scale of every scaled one.
        self.scales: dict[str, str] = {}
        hidden = {name for name in stored if name.rpartition(".")[2] == _MARKER}
        is_scaled = bool(hidden)
        for name in self.coded:
            layer, _, leaf = name.rpartition(".")
            beside = [f"{layer}.{part}" for part in _SCALES if leaf == "weight"]
            scales = [scale for scale in beside if scale in stored]
            if len(scales) > 1:
                raise self._error(f"'{name}' has the scales {list_some(scales)}. Keep one")
            if scales:
                self.scales[name] = scales[0]
            hidden |= {f"{layer}.{part}" for part in _BESIDE} | set(scales)
        is_scaled |= bool(self.scales)
        without = [n for n in self.coded if n.endswith(".weight") and n not in self.scales]
        if is_scaled and without:
            raise self._error(
                f"{len(without)} FP8 weights have no scale, and the file says that its weights are "
                f"scaled: {list_some(sorted(without), most=4)}. Download it again, or start from "
                "the 16-bit weights"
            )
        for name, scale in self.scales.items():
            self._require_scale(name, scale)
        self.names = [name for name in files.names if name not in hidden]

    @property
    def note(self) -> str:
        """What a user should know."""
        n, scaled = len(self.coded), len(self.scales)
        kinds = [f"{scaled} by their scales to fp32"] * bool(scaled)
        kinds += [f"{n - scaled} plain ones to bf16"] * bool(n - scaled)
        return (
            f"The source has {n} FP8 tensors, decoded as they are read: {' and '.join(kinds)}. "
            "They carry the rounding error of FP8; 16-bit weights are better where there are any."
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self.files.shape(name)

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor as it is read, in safetensors' notation."""
        if name not in self.coded:
            return self.files.dtype(name)
        return "F32" if name in self.scales else "BF16"

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU; raises `CheckpointError` if it cannot be read."""
        tensor = self.files.read(name)
        if name not in self.coded:
            return tensor
        if name not in self.scales:
            return tensor.bfloat16()
        scale = self.files.read(self.scales[name]).float()
        return tensor.float() * scale.reshape(-1, *[1] * (tensor.dim() - 1))

    def read_slice(self, name: str, index: int) -> Tensor:
        """Return one entry of a tensor's first axis; raises `CheckpointError` as `read`."""
        if name in self.scales:
            return self.read(name)[index]
        tensor = self.files.read_slice(name, index)
        return tensor.bfloat16() if name in self.coded else tensor

    def _require_scale(self, name: str, scale: str) -> None:
        shape, scale_shape = self.shape(name), self.files.shape(scale)
        rows = torch.Size(scale_shape).numel()
        is_column = rows in (1, *shape[:1]) and rows in (1, *scale_shape[:1])
        if not shape or not is_column or self.files.dtype(scale) not in FLOATS:
            raise self._error(
                f"'{scale}' is {self.files.dtype(scale)} of shape {scale_shape} for a weight of "
                f"shape {shape}. A float scale for the tensor, or one for each row, is read; start "
                "from the 16-bit weights"
            )

    def _error(self, reason: Any) -> CheckpointError:
        return CheckpointError(f"The FP8 weights in '{self.folder}' cannot be decoded: {reason}.")
