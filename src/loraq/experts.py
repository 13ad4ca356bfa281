"""`QuantizedExperts`: a stack of experts' weights, each run by a back end as a linear layer.

The module that owns the stack is another library's, and multiplies with it as it likes: expert by
expert (`linear(x, stack[e])`, `x @ stack[e]`), or with all of them (`grouped_mm`, `bmm`). So what
stands in the parameter's place reads as that parameter does, and knows its products.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from loraq.dense import refuse_writing
from loraq.expert_weight import ExpertWeight
from loraq.kernels import choose, reconstruct
from loraq.nn import QuantizedLayer, QuantizedLinear
from loraq.packed import PackedStack
from loraq.scheme import Scheme


class _Views(NamedTuple):
    """Linear layers on the bytes of single experts."""

    #: Where those bytes are.
    addresses: tuple[int, ...]
    #: By expert, those that ran.
    layers: dict[int, QuantizedLinear]


class QuantizedExperts(QuantizedLayer):
    """Drop-in for a parameter of three axes, (experts, out, in) or transposed.

    Every tensor is that of a `QuantizedLinear` with the experts' axis in front. Calls take an input
    and the number of an expert. For those who look for the parameter, what a tensor has (`shape`,
    `dtype`, an index, `transpose`) is that of `weight`.
    """

    weight_leaf = ""
    #: For the initialisation of transformers, as the `weight`'s.
    _is_hf_initialized = True

    def __init__(  # noqa: PLR0913 - those of a linear layer, and two
        self,
        n_experts: int,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make an empty stack to load into.

        Args:
            n_experts: how many.
            in_features: size of each expert's contraction axis.
            out_features: number of each expert's output channels.
            scheme: formats and rank.
            transposed: whether `weight` is (experts, in, out).
            device: of all parameters.
            dtype: of `weight`; `None` is fp32.

        Raises:
            SchemeError: the scheme does not fit the shape.
        """
        self._experts, self.transposed = (n_experts,), transposed
        super().__init__(in_features, out_features, scheme, bias=False, device=device, dtype=dtype)

    @classmethod
    def from_stack(
        cls, packed: PackedStack, *, transposed: bool, dtype: torch.dtype
    ) -> "QuantizedExperts":
        """Return the layer that stores packed weights, on their device."""
        n_experts, n_out, n_in = packed.shape
        layer = cls(
            n_experts,
            n_in,
            n_out,
            packed.scheme,
            transposed=transposed,
            device="meta",
            dtype=dtype,
        )
        for name, tensor in packed.tensors.items():
            setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
        return layer

    @property
    def n_experts(self) -> int:
        """How many experts are stacked."""
        return self._experts[0]

    @property
    def packed(self) -> PackedStack:  # type: ignore[override]
        """The weights as they are stored: a view of the layer's parameters."""
        return super().packed  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self.weight_packed.device

    def _read_packed(  # type: ignore[override]
        self, scheme: Scheme, tensors: Mapping[str, Tensor]
    ) -> PackedStack:
        shape = self.n_experts, self.out_features, self.in_features
        return PackedStack.from_tensors(tensors, scheme, shape)

    def expert(self, index: int) -> QuantizedLinear:
        """Return the layer of one expert, a view of its bytes that is kept while they stay there.

        Raises:
            IndexError: there is no such expert.
        """
        if not -self.n_experts <= index < self.n_experts:
            raise IndexError(f"Expert {index} of {self.n_experts} was asked for.")
        index %= self.n_experts
        addresses = tuple(parameter.data_ptr() for parameter in self._parameters_here())
        views: _Views | None = self._prepared
        if views is None or views.addresses != addresses:
            # Another thread may put its own there; each of them is right.
            self._prepared = views = _Views(addresses, {})
        if index not in views.layers:
            layer = QuantizedLinear.from_packed(self.packed[index], dtype=self.weight_dtype)
            layer.ask_activations(self.activations, simulate=self.simulate)
            layer.ask_backend(self._asked, strict=self._strict)
            views.layers[index] = layer
        return views.layers[index]

    def _parameters_here(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self._parameters.values() if parameter is not None)

    def forward(self, x: Tensor, expert: int) -> Tensor:  # type: ignore[override]
        """Return y (…, out) of one expert for x (…, in), in the dtype of x.

        Raises:
            IndexError: there is no such expert.
            KernelError: as for `QuantizedLinear`.
        """
        y: Tensor = self.expert(expert)(x)
        return y

    @property
    def backend(self) -> str:
        """Name of the back end that runs the experts, of the first that ran if they differ."""
        for layer in self._prepared.layers.values() if self._prepared is not None else ():
            return layer.backend
        return choose(self._asked, self.spec, strict=self._strict).name

    @backend.setter
    def backend(self, name: str) -> None:
        QuantizedLayer.backend.fset(self, name)  # type: ignore[attr-defined]

    def prepare(self, dtype: torch.dtype) -> None:  # type: ignore[override]
        """Make and keep the operands of all experts for inputs of `dtype`; else calls do.

        Raises:
            KernelError: the back end that is asked for cannot run an expert.
        """
        for index in range(self.n_experts):
            self.expert(index).prepare(dtype)

    @property
    def kept_nbytes(self) -> int:
        """Bytes that the back end keeps now beside the stored ones."""
        views: _Views | None = self._prepared
        return sum(layer.kept_nbytes for layer in views.layers.values()) if views else 0

    @property
    def weight(self) -> Tensor:
        """The parameter that the stack stands for, read-only; decoded when its numbers are read.

        Products with it, or with an expert of it, are those of the back end.

        Raises:
            LayerError: it is assigned, or written to in place.
        """
        return ExpertWeight.show(self, tuple(range(self.n_experts)), (0, 1, 2), self.weight_dtype)

    @weight.setter
    def weight(self, value: Any) -> None:
        refuse_writing()

    @torch.no_grad()
    def decode(self, experts: Sequence[int]) -> Tensor:
        """Return the dense weights of some experts, as the parameter holds them."""
        packed, dense = self.packed, []
        for index in experts:
            matrix = reconstruct(packed[index]).to(self.weight_dtype)
            dense.append(matrix.t() if self.transposed else matrix)
        return torch.stack(dense)

    @torch.no_grad()
    def dequantize(self) -> nn.Parameter:  # type: ignore[override]
        """Return the float parameter with these weights."""
        return nn.Parameter(self.decode(range(self.n_experts)))

    def extra_repr(self) -> str:
        """Number of experts, then as every quantized layer."""
        return f"experts={self.n_experts}, transposed={self.transposed}, {super().extra_repr()}"

    # What makes it read as the parameter.

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
        return getattr(self.weight, name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.weight[index]

    # What `torch.compiler.disable` does, which would load the whole compiler: which expert sees
    # which token is known only as it runs, so there is no graph to be had of it.
    __getitem__._torchdynamo_disable = True  # type: ignore[attr-defined]
    __getattr__._torchdynamo_disable = True  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return self.n_experts

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.weight.unbind())

    def __matmul__(self, other: Any) -> Tensor:
        return self.weight @ other

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(cls, lambda stack: stack.weight, (args, kwargs or {}))
        return func(*args, **kwargs)
