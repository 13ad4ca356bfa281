"""`QuantizedLinear` and `QuantizedConv1x1`: layers that hold packed bytes and run their scheme; no solver code."""

from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loraq.errors import KernelError
from loraq.formats import QTensor
from loraq.kernels import DEFAULT_BACKEND, asked_backend, choose, prepare
from loraq.kernels.base import Backend
from loraq.kernels.dispatch import Place
from loraq.scheme import LayerSolution, LowRankBranch, Scheme
from loraq.transforms import rotate, unrotate


class QuantizedLinear(nn.Module):
    """Drop-in for `nn.Linear`: `y = Qa(x) Qw(W - UD)ᵀ + Qp(Qb(x) Dᵀ) Uᵀ + b`.

    Every tensor but the bias is a raw `uint8` parameter, so casts, moves and loaders leave the
    numbers alone: `weight_packed`, `weight_scale`, `proj_down_packed`, `proj_down_scale`,
    `proj_up_packed`, `proj_up_scale`, and a `…_global_scale` for each NVFP4 tensor. They are
    parameters, not buffers, because FSDP2 shards only those.
    """

    #: Codes of the main weight; the other packed tensors stand beside it.
    weight_packed: nn.Parameter
    #: How the layer came to be, plain data for the manifest: errors, seconds, source hash, recipe.
    record: dict[str, Any]
    #: Back end that runs the layer, what it keeps, for inputs of which dtype and where; never part
    #: of the state.
    _prepared: tuple[Backend, Any, torch.dtype, torch.device] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make an empty layer to load into.

        Args:
            in_features: size of the contraction axis.
            out_features: number of output channels.
            scheme: formats and rank.
            bias: whether there is a bias, the only tensor of `dtype`.
            device: of all parameters.
            dtype: of the bias.

        Raises:
            SchemeError: the scheme does not fit the shape.
        """
        super().__init__()
        scheme.check((out_features, in_features))
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        for name, stored in scheme.storage((out_features, in_features)).items():
            empty = torch.empty(stored, dtype=torch.uint8, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.bias = (
            nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.record = {}
        self.ask_backend(DEFAULT_BACKEND, strict=False)

    @classmethod
    def from_solution(cls, solution: LayerSolution, bias: Tensor | None = None) -> Self:
        """Return the layer that stores a solution, on the solution's device.

        The bias is taken over as it is, a `Parameter` stays the same object.
        """
        n_out, n_in = solution.residual.shape
        layer = cls(n_in, n_out, solution.scheme, bias=False, device="meta")
        for name, tensor in solution.tensors.items():
            setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
        layer.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    @property
    def backend(self) -> str:
        """Name of the back end that runs the layer; assign another name, or "auto", to switch.

        Raises:
            KernelError: there is no such back end, or it refuses this layer.
        """
        return (
            self._prepared[0].name
            if self._prepared
            else choose(self._asked, *self.place, strict=self._strict).name
        )

    @backend.setter
    def backend(self, name: str) -> None:
        choose(asked_backend(name), *self.place, strict=name != DEFAULT_BACKEND)
        self.ask_backend(name, strict=name != DEFAULT_BACKEND)

    def ask_backend(self, name: str, *, strict: bool) -> None:
        """Switch to a back end by name; if it refuses the layer, a call raises (`strict`), or takes "auto".

        Raises:
            KernelError: there is no such back end.
        """
        self._asked, self._strict, self._prepared = asked_backend(name), strict, None

    @property
    def place(self) -> Place:
        """What a back end is chosen by: scheme, (out, in), device."""
        return self.scheme, (self.out_features, self.in_features), self.weight_packed.device

    def prepare(self, dtype: torch.dtype) -> None:
        """Make the operands for inputs of `dtype` now; else the first call makes them.

        Raises:
            KernelError: the back end that is asked for cannot run this layer.
        """
        with torch.inference_mode(
            False
        ):  # what is kept must also serve a later call that tracks gradients
            stored = self.stored_weight, self.branch, self.scheme
            backend, operands = prepare(self._asked, *stored, dtype, strict=self._strict)
        self._prepared = (
            backend,
            operands if backend.keeps_operands else None,
            dtype,
            self.weight_packed.device,
        )

    def prepared_no_more(self) -> None:
        """Drop what the back end keeps, because parameters were replaced; the next call prepares anew."""
        self._prepared = None

    @property
    def kept_nbytes(self) -> int:
        """Bytes that the back end keeps now beside the stored ones."""
        stored = {p.untyped_storage().data_ptr() for p in self.parameters(recurse=False)}
        return sum(
            size
            for place, size in _storages(self._prepared[1] if self._prepared else None)
            if place not in stored
        )

    @property
    def stored_weight(self) -> QTensor:
        """The main weight as it is stored."""
        return self._qtensor("weight")

    @property
    def branch(self) -> LowRankBranch | None:
        """The low-rank branch as it is stored, or `None`."""
        if self.scheme.branch is None:
            return None
        return LowRankBranch(proj_up=self._qtensor("proj_up"), proj_down=self._qtensor("proj_down"))

    @property
    def nbytes(self) -> int:
        """Bytes stored for the weight: codes, scales and both factors; bias not counted."""
        return sum(p.numel() for name, p in self.named_parameters(recurse=False) if name != "bias")

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each element of the weight."""
        return 8 * self.nbytes / (self.in_features * self.out_features)

    def reconstruct(self) -> Float[Tensor, "out in"]:
        """Return the effective dense weight in fp32."""
        dense = self.stored_weight.dequantize()
        branch = self.branch
        return unrotate(
            dense if branch is None else dense + branch.reconstruct(), self.scheme.rotation
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return y (…, out) in the dtype of x (…, in)."""
        place = self.weight_packed.device  # offloading hooks move parameters without a word
        if self._prepared is None or self._prepared[2:] != (x.dtype, place):
            self.prepare(x.dtype)
        assert self._prepared is not None
        backend, operands, *_ = self._prepared
        if not backend.keeps_operands:
            operands = backend.prepare(self.stored_weight, self.branch, self.scheme, x.dtype)
        return backend.linear(rotate(x, self.scheme.rotation), operands, self.scheme, self.bias)

    def extra_repr(self) -> str:
        """Formats, rank and bits per weight, for `repr`."""
        scheme, branch = self.scheme, self.scheme.branch
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
        text += f"weight={scheme.weight}, activation={scheme.activation}, "
        if scheme.rotation:
            text += f"rotation={scheme.rotation}, "
        if branch is not None:
            text += f"branch=r{branch.rank} {branch.weight}/{branch.activation}, "
        try:
            backend = self.backend
        except (
            KernelError
        ):  # the layer was moved to where its back end refuses it; showing it must not raise
            backend = f"{self._asked} (refused)"
        return text + f"{self.bits_per_weight:.2f} bits per weight, backend={backend}"

    def _qtensor(self, part: str) -> QTensor:
        fmt, shape = self.scheme.parts((self.out_features, self.in_features))[part]
        stored = (
            getattr(self, f"{part}_{name}", None) for name in ("packed", "scale", "global_scale")
        )
        packed, scale, global_scale = (
            None if tensor is None else tensor.detach() for tensor in stored
        )
        assert packed is not None
        return QTensor(packed, scale, global_scale, shape, fmt)

    # The operands follow from the parameters: whatever may change those drops them.

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._prepared = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._prepared = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}


class QuantizedConv1x1(QuantizedLinear):
    """Drop-in for a 1×1 `nn.Conv2d`: the same linear layer, applied to the channels (…, in, height, width).

    Its weight is stored as the matrix (out, in), under the same names as that of any linear layer.
    """

    @property
    def in_channels(self) -> int:
        """The same as `in_features`, under a convolution's name."""
        return self.in_features

    @property
    def out_channels(self) -> int:
        """The same as `out_features`, under a convolution's name."""
        return self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Return y (…, out, height, width) in the dtype of x (…, in, height, width), laid out in memory as x is."""
        pixels = x.movedim(
            -3, -1
        ).contiguous()  # free in SANA; and the sums do not depend on the layout
        y = super().forward(pixels).movedim(-1, -3)
        return y.contiguous() if x.is_contiguous() else y


def _storages(operands: Any) -> set[tuple[int, int]]:
    """Place and bytes of every piece of memory in the tuples and lists of tensors that a back end keeps."""
    if isinstance(operands, Tensor):
        if operands.is_mkldnn:  # opaque: it has no storage to look at
            return {(id(operands), operands.numel() * operands.itemsize)}
        storage = operands.untyped_storage()
        return {(storage.data_ptr(), storage.nbytes())}
    return set().union(*map(_storages, operands)) if isinstance(operands, tuple | list) else set()
