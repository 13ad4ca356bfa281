"""`QuantizedLinear`, `QuantizedConv1x1`: layers that hold packed bytes and run their scheme.

Each is what it takes the place of, an `nn.Linear` or an `nn.Conv2d`, for everyone who asks for its
class, reads its `weight` or its sizes.
"""

from collections.abc import Mapping
from typing import Any, Self, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loraq.autocast import cast_input, without_autocast
from loraq.dense import DenseWeight, refuse_writing
from loraq.errors import KernelError
from loraq.kernels import (
    DEFAULT_BACKEND,
    LayerSpec,
    Prepared,
    choose,
    prepare,
    reconstruct,
    resolve_backend,
)
from loraq.layer_input import require_input
from loraq.packed import PackedWeight
from loraq.precision import require_precision, schemes_at
from loraq.scheme import Scheme
from loraq.state import mark_packed
from loraq.transforms import rotate, smooth


class QuantizedLayer(nn.Module):
    """What all quantized layers are: `y = Qa(x) Qw(W - UD)ᵀ + Qp(Qb(x) Dᵀ) Uᵀ + b`.

    Every tensor but the bias is a raw `uint8` parameter, so casts, moves and loaders leave the
    numbers alone: `weight_packed`, `proj_up_scale` …: `Scheme.storage` lists them. They are
    parameters, not buffers, because FSDP2 shards only those.
    """

    #: Codes of the main weight; the other packed tensors stand beside it.
    weight_packed: nn.Parameter
    smooth_factor: nn.Parameter | None
    bias: nn.Parameter | None
    #: Dtype of `weight` where there is no bias.
    weight_dtype: torch.dtype
    #: What follows the layer's name in that of the float weight.
    weight_leaf = "weight"
    #: Axes of `weight` before (out, in): how many experts are stacked.
    _experts: tuple[int, ...] = ()
    #: Axes of `weight` after (out, in).
    _pixel: tuple[int, ...] = ()
    #: How the layer came to be, plain data for the manifest: errors, seconds, source hash, recipe.
    record: dict[str, Any]
    #: Precision of activations that is asked for; whether it is simulated where it gains nothing.
    activations: str
    simulate: bool
    #: What runs the layer now (`Prepared`), or `None` until the next call; never part of the state.
    _prepared: Any

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
            dtype: of the bias, and without one of `weight` too; `None` is fp32 for `weight`.

        Raises:
            SchemeError: the scheme does not fit the shape.
        """
        nn.Module.__init__(self)  # not that of the float layer, which would make a float weight
        scheme.check((out_features, in_features))
        self.in_features, self.out_features, self._scheme = in_features, out_features, scheme
        # The bias first: models ask `next(module.parameters()).dtype` what floats a part takes.
        empty = torch.empty(out_features, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(empty) if bias else None)
        self.register_parameter("smooth_factor", None)
        for name, stored in scheme.storage(self.packed_shape).items():
            empty = torch.empty(stored, dtype=torch.uint8, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.record = {}
        self.weight_dtype = dtype or torch.float32
        self.ask_activations("stored")
        self.ask_backend(DEFAULT_BACKEND, strict=False)

    @classmethod
    def from_packed(
        cls, packed: PackedWeight, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> Self:
        """Return the layer that stores a packed weight, on its device.

        The bias is taken over as it is. `dtype` is that of `weight` where there is no bias.
        """
        (n_out, n_in), main = packed.shape, Scheme(packed.scheme.weight)
        layer = cls(n_in, n_out, main, bias=False, device="meta", dtype=dtype)
        layer._scheme = packed.scheme  # LoRAs may have raised its rank beyond min(out, in)
        for name, tensor in packed.tensors.items():
            setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
        layer.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """(out, in); of stacked experts (experts, out, in)."""
        return *self._experts, self.out_features, self.in_features

    @property
    def scheme(self) -> Scheme:
        """Formats and rank; assign another scheme to read the same bytes in another way.

        Raises:
            FormatError: the stored bytes are not those of the assigned scheme.
            SchemeError: the assigned scheme does not fit the shape.
        """
        return self._scheme

    @scheme.setter
    def scheme(self, scheme: Scheme) -> None:
        scheme.check((self.out_features, self.in_features))
        self._read_packed(scheme, dict(self.named_parameters(recurse=False)))
        self._scheme, self._prepared = scheme, None

    @property
    def backend(self) -> str:
        """Name of the back end that runs the layer; assign another name, or "auto", to switch.

        Raises:
            KernelError: there is no such back end, or it refuses this layer.
        """
        if self._prepared is not None:
            return self._prepared.backend.name
        return choose(self._asked, self.spec, strict=self._strict).name

    @backend.setter
    def backend(self, name: str) -> None:
        choose(resolve_backend(name), self.spec, strict=name != DEFAULT_BACKEND)
        self.ask_backend(name, strict=name != DEFAULT_BACKEND)

    def ask_backend(self, name: str, *, strict: bool) -> None:
        """Switch to a back end by name.

        If it refuses the layer, a call raises (`strict`), or takes "auto".

        Raises:
            KernelError: there is no such back end.
        """
        self._asked, self._strict, self._prepared = resolve_backend(name), strict, None

    def ask_activations(self, precision: str, *, simulate: bool = False) -> None:
        """Run the stored bytes with activations of a precision; see `loraq.set_activations`.

        Raises:
            KernelError: there is no such precision.
        """
        require_precision(precision)
        self.activations, self.simulate, self._prepared = precision, simulate, None

    @property
    def spec(self) -> LayerSpec:
        """What a back end is chosen by: what is to be run, (out, in), device."""
        shape = self.out_features, self.in_features
        schemes = schemes_at(self._scheme, self.activations)
        return LayerSpec(schemes, shape, self.weight_packed.device, self.simulate)

    def prepare(self, dtype: torch.dtype) -> Prepared:
        """Make, keep and return the operands for inputs of `dtype`; else the first call does.

        Raises:
            KernelError: the back end that is asked for cannot run this layer.
        """
        # What is kept must also serve calls with gradients, and without autocast.
        with torch.inference_mode(False), without_autocast(self.weight_packed.device):
            prepared = prepare(self._asked, self.packed, dtype, self.spec, strict=self._strict)
        self._prepared = prepared
        return prepared

    def _prepare_untraced(self, dtype: torch.dtype) -> bool:
        """Prepare outside of the graph, while a compiler traces.

        What a back end does depends on values and on the CPU, into which no compiler looks.
        """
        if not self._suits(self._prepared, dtype):
            self.prepare(dtype)
        return True

    def _suits(self, prepared: Prepared | None, dtype: torch.dtype) -> TypeGuard[Prepared]:
        # Offloading hooks move parameters silently, so the device is compared at every call.
        wanted = dtype, self.weight_packed.device
        return prepared is not None and (prepared.dtype, prepared.device) == wanted

    # What `torch.compiler.assume_constant_result` does, which would load the whole compiler.
    _prepare_untraced._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def invalidate(self) -> None:
        """Drop what the back end keeps, because parameters changed; the next call prepares anew."""
        self._prepared = None

    @property
    def kept_nbytes(self) -> int:
        """Bytes that the back end keeps now beside the stored ones."""
        prepared = self._prepared
        return prepared.backend.kept_nbytes(prepared.operands, self.packed) if prepared else 0

    @property
    def packed(self) -> PackedWeight:
        """The weight as it is stored: a view of the layer's parameters."""
        names = self.scheme.storage(self.packed_shape)
        stored = {name: getattr(self, name).detach() for name in names}
        return self._read_packed(self.scheme, stored)

    def _read_packed(self, scheme: Scheme, tensors: Mapping[str, Tensor]) -> PackedWeight:
        return PackedWeight.from_tensors(tensors, scheme, (self.out_features, self.in_features))

    @property
    def nbytes(self) -> int:
        """Bytes stored for the weight; see `PackedWeight.nbytes`."""
        return self.packed.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each element of the weight."""
        return self.packed.bits_per_weight

    def reconstruct(self) -> Float[Tensor, "out in"]:
        """Return the effective dense weight in fp32."""
        return self.packed.reconstruct()

    @property
    def weight(self) -> Tensor:
        """The weight as a float layer shows it, read-only; decoded when its numbers are read.

        It has the shape and device of the float weight and the dtype of the bias; without a bias
        that of the float layer, which moves and casts of the model change as they would there. It
        is no parameter: optimizers, `parameters()` and `state_dict()` see the packed bytes.

        Raises:
            LayerError: it is assigned, or written to in place.
        """
        packed, shape = self.packed, (self.out_features, self.in_features, *self._pixel)
        dtype = self.weight_dtype if self.bias is None else self.bias.dtype

        def decode() -> Tensor:
            with torch.no_grad():
                return reconstruct(packed).to(dtype).view(shape)

        if torch.compiler.is_compiling():  # which traces operations; unread ones leave the graph
            return decode()
        return DenseWeight(decode, shape, dtype, packed.device)

    @weight.setter
    def weight(self, value: Any) -> None:
        refuse_writing()

    @torch.no_grad()
    def dequantize(self) -> nn.Linear | nn.Conv2d:
        """Return the float layer with this weight; the bias stays the same object."""
        sizes = self.in_features, self.out_features
        new: nn.Linear | nn.Conv2d
        if self._pixel:
            new = nn.Conv2d(*sizes, 1, bias=False, device="meta")
        else:
            new = nn.Linear(*sizes, bias=False, device="meta")
        new.weight, new.bias = nn.Parameter(self.weight.clone()), self.bias
        return new.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (…, out) for x (…, in), in the dtype of x.

        Under `torch.autocast` x is cast first, as `nn.Linear` casts it: to its dtype, unless fp64.

        Raises:
            KernelError: x is no float of 16, 32 or 64 bits, or its last axis is not `in_features`.
        """
        require_input(x, -1, self.in_features)
        x = cast_input(x)
        if torch.compiler.is_compiling():
            self._prepare_untraced(x.dtype)
        prepared = self._prepared
        if not self._suits(prepared, x.dtype):
            # Not read back from the layer: another thread may have put its own there, or none.
            prepared = self.prepare(x.dtype)
        backend, operands, scheme = prepared.backend, prepared.operands, prepared.scheme
        with without_autocast(x.device):  # inside, every product has the dtype it needs
            if not backend.keeps_operands:
                operands = backend.prepare(self.packed, scheme, x.dtype)
            x = rotate(smooth(x, self.smooth_factor if scheme.smoothing else None), scheme.rotation)
            return backend.linear(x, operands, scheme, self.bias)

    def extra_repr(self) -> str:
        """Formats, rank and bits per weight, for `repr`."""
        scheme, branch = self.scheme, self.scheme.branch
        text = f"in_features={self.in_features}, out_features={self.out_features}, "
        text += f"bias={self.bias is not None}, weight={scheme.weight}, "
        text += f"activation={scheme.activation}, " + ("smoothed, " if scheme.smoothing else "")
        if scheme.rotation:
            text += f"rotation={scheme.rotation}, "
        if branch is not None:
            text += f"branch=r{branch.rank} {branch.weight}/{branch.activation}, "
        try:
            backend = self.backend
        except KernelError:
            # The layer was moved to where its back end refuses it; showing it must not raise.
            backend = f"{self._asked} (refused)"
        return text + f"{self.bits_per_weight:.2f} bits per weight, backend={backend}"

    # The operands follow from the parameters: whatever may change those drops them.

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._prepared = None
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device="cpu")).dtype
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.bias is not None:  # last, as in the state of a float layer
            destination[f"{prefix}bias"] = destination.pop(f"{prefix}bias")
        mark_packed(destination, prefix[:-1], self.weight_leaf)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any, **kwargs: Any
    ) -> None:
        self._prepared = None
        # Copied into a parameter, or assigned as one, other numbers would pass for bytes.
        for name, parameter in self.named_parameters(recurse=False):
            found, raw = state_dict.get(prefix + name), torch.uint8
            if isinstance(found, Tensor) and parameter.dtype == raw and found.dtype != raw:
                raise KernelError(
                    f"Tensor '{prefix}{name}' of the state is of {found.dtype}. Raw bytes (uint8) "
                    "are required. Load what a quantized layer saved."
                )
        super()._load_from_state_dict(state_dict, prefix, {**local_metadata}, *args, **kwargs)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add or replace a parameter, as an assignment does.

        Raises:
            LayerError: it is the weight, which is no parameter here.
        """
        if name == "weight":
            refuse_writing()
        self._prepared = None
        super().register_parameter(name, param)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}


# Both float layers declare a bias that is always there, which it is not.


class QuantizedLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc]
    """Drop-in for `nn.Linear`."""


class QuantizedConv1x1(QuantizedLayer, nn.Conv2d):  # type: ignore[misc]
    """Drop-in for a 1×1 `nn.Conv2d`: the same linear layer, on channels (…, in, height, width).

    Its weight is stored as the matrix (out, in), under the same names as that of any linear layer.
    """

    _pixel = (1, 1)
    kernel_size = stride = dilation = (1, 1)
    padding = output_padding = (0, 0)
    groups, transposed, padding_mode = 1, False, "zeros"

    @property
    def in_channels(self) -> int:  # type: ignore[override]
        """The same as `in_features`, under a convolution's name."""
        return self.in_features

    @property
    def out_channels(self) -> int:  # type: ignore[override]
        """The same as `out_features`, under a convolution's name."""
        return self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Return y (…, out, height, width) in the dtype and memory layout of x (…, in, …).

        Raises:
            KernelError: as for `QuantizedLinear`, of the third axis from the end.
        """
        require_input(x, -3, self.in_features)
        # Free in SANA; and the sums do not depend on the layout.
        pixels = x.movedim(-3, -1).contiguous()
        y = super().forward(pixels).movedim(-1, -3)
        return y.contiguous() if x.is_contiguous() else y
