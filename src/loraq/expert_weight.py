"""`ExpertWeight`: the weights of stacked experts for their owner, who multiplies with them.

An owner moves axes, chooses experts, and takes products. The first two change a description only,
and a product is one call of the layer for each expert: nothing is decoded but what is looked at.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from loraq.dense import DenseWeight


class StackedLayer(Protocol):
    """What is asked of the layer that holds the weights."""

    #: Whether its parameter is (experts, in, out).
    transposed: bool
    in_features: int
    out_features: int

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        ...

    #: Returns y (…, out) for x (…, in) and the number of an expert.
    __call__: Callable[..., Any]

    def decode(self, experts: Sequence[int]) -> Tensor:
        """Return the dense weights of some experts, as the parameter holds them."""
        ...


class ExpertWeight(DenseWeight):
    """The weights of some experts for those who read them, or multiply with them.

    As long as only axes are moved or experts chosen, it stays a description, of which a matrix
    product asks the layer. Any other reader gets numbers.
    """

    _layer: StackedLayer
    #: Which experts the first axis has; one that was chosen has no axis.
    _experts: tuple[int, ...] | int
    #: The axis of the parameter that each axis is; `None` for an axis of size 1 that was put in.
    _axes: tuple[int | None, ...]

    @classmethod
    def show(
        cls,
        layer: StackedLayer,
        experts: tuple[int, ...] | int,
        axes: tuple[int | None, ...],
        dtype: torch.dtype,
    ) -> "ExpertWeight":
        """Describe the weights of some experts."""

        def arrange(dense: Tensor) -> Tensor:
            order = [axis for axis in axes if axis is not None]
            moved = (dense[0] if isinstance(experts, int) else dense).permute(
                [sorted(order).index(axis) for axis in order]
            )
            for place, axis in enumerate(axes):
                moved = moved.unsqueeze(place) if axis is None else moved
            return moved

        chosen = (experts,) if isinstance(experts, int) else experts
        matrix = (layer.out_features, layer.in_features)
        shape = (len(chosen), *(matrix[::-1] if layer.transposed else matrix))
        like = arrange(torch.empty(shape, device="meta"))
        self = cls(
            lambda: arrange(layer.decode(chosen)).to(dtype),
            like.shape,
            dtype,
            layer.device,
            like.stride(),
        )
        assert isinstance(self, ExpertWeight)
        self._layer, self._experts, self._axes = layer, experts, axes
        return self

    def _moved(self, axes: Sequence[int | None]) -> "ExpertWeight":
        return self.show(self._layer, self._experts, tuple(axes), self.dtype)

    @property
    def _takes_in(self) -> int:
        """The axis of the parameter that a product sums over."""
        return 1 if self._layer.transposed else 2

    def _is_right(self) -> bool:
        """Whether the last two axes are (in, out), as on the right of a product."""
        return self._axes[-2:] == (self._takes_in, 3 - self._takes_in)

    def _is_left(self) -> bool:
        """Whether the last two axes are (out, in), as on the left of a product."""
        return self._axes[-2:] == (3 - self._takes_in, self._takes_in)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        answer = _ANSWERS.get(func._schema.name)
        if answer is not None:
            answered = answer(*args, **kwargs)
            if answered is not None:
                out = kwargs.get("out")
                return answered if out is None else out.copy_(answered)
        else:  # in inference mode even `linear` comes as it is
            answered = func.decompose(*args, **kwargs)
            if answered is not NotImplemented:
                return answered
        return super().__torch_dispatch__(func, types, args, kwargs)


# What an operation answers without numbers; `None` if it needs them.


def _permute(weight: ExpertWeight, dims: Sequence[int]) -> Tensor:
    return weight._moved([weight._axes[dim] for dim in dims])


def _transpose(weight: ExpertWeight, a: int, b: int) -> Tensor:
    axes = list(weight._axes)
    axes[a], axes[b] = axes[b], axes[a]
    return weight._moved(axes)


def _unsqueeze(weight: ExpertWeight, dim: int) -> Tensor:
    axes = list(weight._axes)
    axes.insert(dim % (len(axes) + 1), None)
    return weight._moved(axes)


def _view(weight: ExpertWeight, size: Sequence[int], **_: Any) -> Tensor | None:
    """Answer what only puts in or takes out axes of size 1."""
    wanted = torch.empty(weight.shape, device="meta").view(size).shape
    if wanted == weight.shape:
        return weight._moved(weight._axes)
    named = [axis for axis in weight._axes if axis is not None]
    sizes = [n for axis, n in zip(weight._axes, weight.shape, strict=True) if axis is not None]
    if 1 in sizes or sizes != [n for n in wanted if n != 1]:
        return None
    return weight._moved([None if n == 1 else named.pop(0) for n in wanted])


def _squeeze(weight: ExpertWeight, dim: int | Sequence[int] | None = None) -> Tensor:
    given = range(weight.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {place % weight.dim() for place in given}
    axes = [a for place, a in enumerate(weight._axes) if a is not None or place not in gone]
    return weight._moved(axes)


def _expand(weight: ExpertWeight, size: Sequence[int], **_: Any) -> Tensor | None:
    same = all(n in (-1, m) for n, m in zip(size, weight.shape, strict=False))
    return weight._moved(weight._axes) if same and len(size) == weight.dim() else None


def _cast(weight: ExpertWeight, *, dtype: torch.dtype | None = None, **how: Any) -> Tensor | None:
    device = how.get("device")
    if dtype is None or not dtype.is_floating_point or device not in (None, weight.device):
        return None
    return weight.show(weight._layer, weight._experts, weight._axes, dtype)


def _choose(weight: ExpertWeight, experts: tuple[int, ...] | int) -> Tensor:
    axes = weight._axes[1:] if isinstance(experts, int) else weight._axes
    return weight.show(weight._layer, experts, axes, weight.dtype)


def _select(weight: ExpertWeight, dim: int, index: int) -> Tensor | None:
    if weight._axes[dim] != 0 or dim % weight.dim() or isinstance(weight._experts, int):
        return None
    return _choose(weight, weight._experts[index])


def _index(weight: ExpertWeight, indices: Sequence[Tensor | None]) -> Tensor | None:
    chosen, *others = indices
    is_list = chosen is not None and chosen.dim() == 1 and not chosen.is_floating_point()
    if not is_list or any(other is not None for other in others) or weight._axes[0] != 0:
        return None
    assert chosen is not None
    assert not isinstance(weight._experts, int)
    numbers = chosen.nonzero().flatten() if chosen.dtype == torch.bool else chosen
    return _choose(weight, tuple(weight._experts[index] for index in numbers.tolist()))


def _index_select(weight: ExpertWeight, dim: int, index: Tensor) -> Tensor | None:
    return _index(weight, [index]) if dim % weight.dim() == 0 else None


def _slice(
    weight: ExpertWeight,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Tensor | None:
    size = weight.shape[dim]
    if range(size)[start:end:step] == range(size):
        return weight._moved(weight._axes)
    if weight._axes[dim] != 0 or dim % weight.dim() or isinstance(weight._experts, int):
        return None
    return _choose(weight, weight._experts[start:end:step])


def _unbind(weight: ExpertWeight, dim: int = 0) -> list[Tensor] | None:
    if weight._axes[dim] != 0 or dim % weight.dim() or isinstance(weight._experts, int):
        return None
    return [_choose(weight, index) for index in weight._experts]


def _mm(a: Tensor, b: Tensor, **_: Any) -> Tensor | None:
    if isinstance(b, ExpertWeight) and not isinstance(a, ExpertWeight) and b._is_right():
        return _run(b, a)
    if isinstance(a, ExpertWeight) and not isinstance(b, ExpertWeight) and a._is_left():
        return _run(a, b.t()).t()
    return None


def _mv(a: Tensor, b: Tensor, **_: Any) -> Tensor | None:
    return _run(a, b) if isinstance(a, ExpertWeight) and a._is_left() else None


def _bmm(a: Tensor, b: Tensor, **_: Any) -> Tensor | None:
    if isinstance(b, ExpertWeight) and not isinstance(a, ExpertWeight) and b._is_right():
        return _run_each(b, a)
    if isinstance(a, ExpertWeight) and not isinstance(b, ExpertWeight) and a._is_left():
        return _run_each(a, b.mT).mT
    return None


def _grouped_mm(
    x: Tensor,
    weight: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | None:
    """Answer one product a group of rows, of which `offs` says where each ends."""
    if not isinstance(weight, ExpertWeight) or weight._axes[0] != 0 or not weight._is_right():
        return None
    if offs is None:
        y = _run_each(weight, x)
    else:
        assert not isinstance(weight._experts, int)
        y, start = x.new_zeros((len(x), weight._layer.out_features)), 0
        for expert, end in zip(weight._experts, offs.tolist(), strict=True):
            if end > start:
                y[start:end] = weight._layer(x[start:end], expert)
            start = end
    y = y if bias is None else y + bias
    return y if out_dtype is None else y.to(out_dtype)


def _add_to(product: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """Return the product that adds something, as `addmm` does."""

    def add(
        added: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, **_: Any
    ) -> Tensor | None:
        y = product(a, b)
        return None if y is None else torch.add(y * alpha if alpha != 1 else y, added, alpha=beta)

    return add


def _run(weight: ExpertWeight, x: Tensor) -> Tensor:
    assert isinstance(weight._experts, int), "a matrix has no axis of experts"
    y: Tensor = weight._layer(x, weight._experts)
    return y


def _run_each(weight: ExpertWeight, x: Tensor) -> Tensor:
    """Return (experts, n, out) for x (experts, n, in), all rows of one expert at once."""
    layer, experts = weight._layer, weight._experts
    if isinstance(experts, int):  # its axis of size 1 was put in
        y: Tensor = layer(x, experts)
        return y
    y = x.new_empty((*x.shape[:2], layer.out_features))
    for expert in dict.fromkeys(experts):
        places = [place for place, each in enumerate(experts) if each == expert]
        y[places] = layer(x[places], expert)
    return y


_ANSWERS: dict[str, Callable[..., Any]] = {
    "aten::detach": lambda weight: weight._moved(weight._axes),
    "aten::alias": lambda weight: weight._moved(weight._axes),
    "aten::t": lambda weight: _transpose(weight, 0, 1),
    "aten::transpose": _transpose,
    "aten::permute": _permute,
    "aten::unsqueeze": _unsqueeze,
    "aten::squeeze": _squeeze,
    "aten::view": _view,
    "aten::_unsafe_view": _view,
    "aten::expand": _expand,
    "aten::_to_copy": _cast,
    "aten::select": _select,
    "aten::index": _index,
    "aten::index_select": _index_select,
    "aten::slice": _slice,
    "aten::unbind": _unbind,
    "aten::mm": _mm,
    "aten::mv": _mv,
    "aten::bmm": _bmm,
    "aten::addmm": _add_to(_mm),
    "aten::baddbmm": _add_to(_bmm),
    "aten::_grouped_mm": _grouped_mm,
    "transformers::grouped_mm_fallback": _grouped_mm,
}
