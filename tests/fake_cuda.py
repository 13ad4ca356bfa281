"""A CUDA device that is not there: shapes, dtypes and devices of all tensors, and no numbers.

Inside of `fake_cuda` every operator checks that its tensors are on one device, as a GPU would, and
every number that the host reads of a tensor is made up and counted. A tensor that was made on the
CPU by accident raises there.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from loraq import transforms
from loraq.formats import element, scales

CUDA = torch.device("cuda", 0)
#: Operators whose result the host has to wait for.
_READS = {"_local_scalar_dense", "_linalg_check_errors", "nonzero", "equal", "is_nonzero"}


class Reads(TorchDispatchMode):
    """Counts what the host reads of a device, and makes up an answer.

    Floats grow, so that what is left of a weight is less than the weight; whole numbers are 0; of
    truths `all` holds and the others do not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._floats = itertools.count(1)
        self._true = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if "out" in (kwargs or {}):  # the fake of these asks for a guard, too
            others = {key: value for key, value in kwargs.items() if key != "out"}
            return _GUARDED[Tensor.copy_](kwargs["out"], function.overloadpacket(*args, **others))
        if name not in _READS:
            result = function(*args, **(kwargs or {}))
            if name == "all":
                self._true[result] = True
            return result
        self.count += 1
        if name == "_linalg_check_errors":
            return None
        if name != "_local_scalar_dense":
            raise AssertionError(f"'{name}' reads a whole tensor")
        (value,) = args
        if value.dtype == torch.bool:
            return value in self._true
        return float(next(self._floats)) if value.is_floating_point() else 0


#: Methods that ask for a guard of their own, and the operators that they are.
_GUARDED: dict[Any, Any] = {
    Tensor.copy_: torch.ops.aten.copy_.default,
    Tensor.contiguous: torch.ops.aten.contiguous.default,
}


class _Unguarded(TorchFunctionMode):
    """Indexing, and some methods, without the guard that a torch built for CPUs does not have."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.__getitem__ and args[0].is_cuda:
            return _select(*args)
        if function is Tensor.__setitem__ and args[0].is_cuda:
            target, index, value = args
            part = _select(target, index)
            copy_ = _GUARDED[Tensor.copy_]
            return copy_(part, value) if isinstance(value, Tensor) else part.fill_(value)
        if function in _GUARDED and args[0].is_cuda:
            function = _GUARDED[function]
        return function(*args, **(kwargs or {}))


def _select(x: Tensor, index: Any) -> Tensor:
    index = index if isinstance(index, tuple) else (index,)
    if Ellipsis in [each for each in index if not isinstance(each, Tensor)]:
        at = next(i for i, each in enumerate(index) if each is Ellipsis)
        used = sum(each is not None for each in index) - 1
        index = (*index[:at], *[slice(None)] * (x.dim() - used), *index[at + 1 :])
    tensors: list[Tensor | None] = []
    dim = 0
    for each in index:
        if each is None:
            x = x.unsqueeze(dim)
        elif isinstance(each, slice):
            start, stop, step = each.start, each.stop, each.step or 1
            x = torch.ops.aten.slice.Tensor(x, dim, start, stop, step)
        elif isinstance(each, Tensor):
            tensors += [None] * (dim - len(tensors)) + [each]
        else:
            x = x.select(dim, each)
            continue
        dim += 1
    return torch.ops.aten.index.Tensor(x, tensors) if tensors else x


@contextmanager
def fake_cuda() -> Iterator[Reads]:
    """Let `CUDA` be a device, and no tensor be a real one."""
    caches = element._decode_table, scales._powers_of_two, transforms.signed_hadamard
    for cache in caches:
        cache.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=False), Reads() as reads, _Unguarded():
            yield reads
    finally:  # no fake tensor may stay in one
        for cache in caches:
            cache.cache_clear()
