"""`DenseWeight`: the weight of a quantized layer for those who read it, decoded on demand."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from loraq.errors import LayerError


class DenseWeight(Tensor):
    """A read-only tensor whose numbers are made when an operation reads them.

    Dtype, shape and device cost nothing. What an operation returns is an ordinary tensor, but a
    view (`.data`, `.detach()`, `.t()`, a slice) is again read-only: what is written to a decoded
    copy would be lost without a word. So every way to write raises `LayerError`.
    """

    #: Makes the numbers.
    _decode: Callable[[], Tensor]
    #: For the initialisation of transformers: these numbers are not to be drawn at random.
    _is_hf_initialized = True

    @staticmethod
    def __new__(
        cls,
        decode: Callable[[], Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        strides: Sequence[int] | None = None,
    ) -> "DenseWeight":
        """Describe a weight.

        Args:
            cls: the class.
            decode: makes it; called once for each operation that reads numbers.
            shape: of what `decode` returns.
            dtype: of what `decode` returns.
            device: of what `decode` returns.
            strides: of what `decode` returns, unless it is contiguous.
        """
        with torch.inference_mode(False):  # as the parameters are, of which it is a view
            self: DenseWeight = Tensor._make_wrapper_subclass(
                cls, tuple(shape), strides, dtype=dtype, device=device
            )
        self._decode = decode
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        named = dict(zip([a.name for a in schema.arguments], args, strict=False)) | kwargs
        for argument in schema.arguments:
            alias = argument.alias_info
            if alias is not None and alias.is_write and _holds_one(named.get(argument.name)):
                refuse_writing()
        if func is torch.ops.aten.detach.default:
            return _like(args[0], args[0]._decode)
        storages = set()

        def read(weight: DenseWeight) -> Tensor:
            numbers = weight._decode()
            storages.add(_storage_of(numbers))
            return numbers

        args, kwargs = pytree.tree_map_only(cls, read, (args, kwargs))
        return pytree.tree_map_only(
            Tensor,
            lambda new: _freeze(new) if _storage_of(new) in storages else new,
            func(*args, **kwargs),
        )

    # What torch does without an operation, or in several of them.

    @property
    def data(self) -> Tensor:
        """The same weight, as read-only as it was."""
        return self.detach()

    @data.setter
    def data(self, value: Any) -> NoReturn:
        refuse_writing()

    @property
    def requires_grad(self) -> bool:
        """Never: packed weights have no gradient."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> "DenseWeight":
        """Refuse gradients, which nothing could use.

        Raises:
            LayerError: they are asked for; `nn.Parameter` does.
        """
        return refuse_writing() if requires_grad else self

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        refuse_writing()

    def share_memory_(self) -> NoReturn:
        """Refuse: there is no memory.

        Raises:
            LayerError: always.
        """
        refuse_writing()

    def numpy(self, **kwargs: Any) -> Any:
        """Return the numbers as an array of their own."""
        return self.clone().numpy(**kwargs)

    def tolist(self) -> Any:
        """Return the numbers as lists."""
        return self.clone().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.clone()!r})"


def _like(weight: Tensor, decode: Callable[[], Tensor]) -> DenseWeight:
    return DenseWeight(decode, weight.shape, weight.dtype, weight.device, weight.stride())


def _freeze(view: Tensor) -> DenseWeight:
    return _like(view, lambda: view)


def _storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _holds_one(value: Any) -> bool:
    return any(isinstance(leaf, DenseWeight) for leaf in pytree.tree_leaves(value))


def refuse_writing() -> NoReturn:
    """Say that a weight is read-only.

    Raises:
        LayerError: always.
    """
    raise LayerError(
        "The weight of a quantized layer is read-only: what is written to it would not reach the "
        "packed bytes. Initialisations of adapters that change it (PiSSA, OLoRA, CorDA, LoftQ) "
        "need another one, such as 'gaussian' or 'orthogonal'. To change numbers, work on a "
        "`.clone()`, on the float layer of `layer.dequantize()`, or on the model before it is "
        "quantized."
    )
