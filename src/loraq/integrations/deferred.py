"""Tensors that are not read yet, for the converters of other libraries.

A converter renames tensors, and splits and joins some of them. Here it gets stand-ins that only
note what is done to them, and each result is computed when it is asked for. So a file of any size
is converted in the memory of one tensor.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from loraq.safetensors.header import DTYPE_NAMES, DTYPES
from loraq.safetensors.reader import TensorReader


class DeferredReader:
    """The tensors that a converter has made."""

    def __init__(self, results: Mapping[str, "Deferred"], origin: tuple[Any, ...]) -> None:
        """Note what the converter returned, and the arguments with which the class runs it."""
        self._results, self._origin = dict(results), origin

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process runs the converter again: it takes no time.
        return type(self), self._origin

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._results)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return tuple(self._results[name].meta.shape)

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor in safetensors' notation."""
        return DTYPE_NAMES[self._results[name].meta.dtype]

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU; raises `CheckpointError` if it cannot be read."""
        return _contiguous(self._results[name])

    def read_slice(self, name: str, index: int) -> Tensor:
        """Return one entry of a tensor's first axis; raises `CheckpointError` as `read`."""
        return _contiguous(_entry(self._results[name], index))


def _contiguous(deferred: "Deferred") -> Tensor:
    return deferred.compute().clone(memory_format=torch.contiguous_format)


class Deferred:
    """A tensor that is not computed yet: its shape and dtype, and how to get it.

    A converter may do anything to it that torch does to a tensor: `torch.cat([a, b])` arrives at
    `__torch_function__`, `a.chunk(2)` and `a.T` at `__getattr__`, `a[:n]` at `__getitem__`. Each
    is done at once to `meta`, a tensor of the meta device, so shapes are right and mistakes are
    found while the converter runs; and each notes a closure that does the same to the numbers.
    What the converter returns is the end of a chain of closures whose other end reads the file.
    Nothing is cached: a tensor that is split in three is read three times, and memory stays that
    of one. A converter that asks for a number (`if tensor.any()`) cannot be served, and is told.
    """

    #: What made it, if it is the only result: a function and its arguments.
    made: tuple[Callable[..., Any], Any, Any] | None
    #: How to read one entry of its first axis, if it stands for a tensor of a file.
    read_entry: Callable[[int], Tensor] | None

    def __init__(
        self,
        meta: Tensor,
        compute: Callable[[], Tensor],
        made: tuple[Callable[..., Any], Any, Any] | None = None,
        read_entry: Callable[[int], Tensor] | None = None,
    ) -> None:
        """Note how to compute a tensor that looks like `meta`."""
        self.meta, self.compute, self.made, self.read_entry = meta, compute, made, read_entry

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _note(function, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.meta, name)
        if callable(value):
            return lambda *args, **kwargs: _note(getattr(torch.Tensor, name), (self, *args), kwargs)
        return (
            _note(lambda tensor: getattr(tensor, name), (self,), {})
            if isinstance(value, Tensor)
            else value
        )

    def __getitem__(self, index: Any) -> Any:
        return _note(lambda tensor: tensor[index], (self,), {})

    def __bool__(self) -> bool:
        raise TypeError("the numbers are needed, and are not read yet")


def stand_in(files: TensorReader, name: str) -> Deferred:
    """Return what stands for a tensor of a file."""
    meta = torch.empty(files.shape(name), dtype=DTYPES[files.dtype(name)], device="meta")
    return Deferred(
        meta,
        lambda: files.read(name),
        read_entry=lambda index: files.read_slice(name, index),
    )


def _note(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Apply a function to the shapes now, and to the numbers when a result is computed."""
    meta = function(*_replace_stand_ins(args, lambda deferred: deferred.meta), **kwargs)

    def compute() -> Any:
        return function(*_replace_stand_ins(args, lambda deferred: deferred.compute()), **kwargs)

    if isinstance(meta, Tensor):
        return Deferred(meta, compute, (function, args, kwargs))
    if isinstance(meta, tuple | list) and all(isinstance(part, Tensor) for part in meta):
        # i=i, because a closure would see the last i.
        return [
            Deferred(part, lambda i=i: compute()[i])  # type: ignore[misc]
            for i, part in enumerate(meta)
        ]
    return meta


def _entry(deferred: Deferred, index: int) -> Deferred:
    """Return one entry of a tensor's first axis.

    Of experts that a file has stacked, or a converter, which may have joined them with others or
    turned them, the rest is not read.
    """
    if (read_entry := deferred.read_entry) is not None:
        return Deferred(deferred.meta[index], lambda: read_entry(index))
    if deferred.made is None:
        return deferred[index]
    function, (parts, *rest), kwargs = deferred.made
    axes = [*rest, *kwargs.values()]
    if function is torch.stack and axes in ([], [0]):
        return parts[index]
    if function is torch.cat and axes and axes[0] > 0:
        return _note(torch.cat, ([_entry(part, index) for part in parts], axes[0] - 1), {})
    if function is torch.Tensor.contiguous:
        return _entry(parts, index)  # whoever reads it makes it contiguous
    if function in (torch.transpose, torch.Tensor.transpose):
        axes = [axis % deferred.meta.dim() for axis in axes]
        if min(axes) > 0:
            return _note(torch.transpose, (_entry(parts, index), *(axis - 1 for axis in axes)), {})
    return deferred[index]


def _replace_stand_ins(values: Any, swap: Callable[[Deferred], Tensor]) -> Any:
    """Replace every stand-in in nested tuples and lists."""
    if isinstance(values, Deferred):
        return swap(values)
    if isinstance(values, tuple | list):
        return type(values)(_replace_stand_ins(value, swap) for value in values)
    return values
