"""Checkpoints in a model's original layout: diffusers' converters, on tensors not read yet.

A converter renames tensors, and splits and joins some of them. Here it gets stand-ins that only
note what is done to them, and each result is computed when it is asked for. So a file of any size
is converted in the memory of one tensor.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loraq.errors import CheckpointError
from loraq.integrations.diffusers import _quiet_diffusers
from loraq.safetensors.fp8 import Fp8Reader
from loraq.safetensors.header import DTYPE_NAMES, DTYPES
from loraq.safetensors.reader import ShardReader, TensorReader


def is_single_file_class(name: str) -> bool:
    """Return whether diffusers loads a class, by its name, from a single file."""
    with _quiet_diffusers():
        from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

        return name in SINGLE_FILE_LOADABLE_CLASSES


class ConvertedReader:
    """The tensors of an original checkpoint under the names of the diffusers class."""

    def __init__(
        self, files: ShardReader | Fp8Reader, class_name: str, config: dict[str, Any]
    ) -> None:
        """Run the converter of a class.

        Raises:
            CheckpointError: diffusers has no converter for the class, or it does not understand the
                file.
        """
        self._origin = (files, class_name, config)
        with _quiet_diffusers():
            from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

            known: dict[str, Any] = SINGLE_FILE_LOADABLE_CLASSES
            convert = known.get(class_name, {}).get("checkpoint_mapping_fn")
            if convert is None:
                raise CheckpointError(
                    f"The tensors in '{files.folder}' do not have the names of {class_name}, and "
                    "diffusers has no converter for this class. Give a folder that "
                    "`save_pretrained` wrote."
                )
            try:
                results = convert(
                    checkpoint={name: _stand_in(files, name) for name in files.names}, config=config
                )
            except Exception as error:  # converters raise what they like on files they do not know
                raise CheckpointError(
                    f"diffusers' converter for {class_name} does not understand the tensors in "
                    f"'{files.folder}' ({type(error).__name__}: {error}). Check that `--config` is "
                    "of the same model."
                ) from error
        self._results = {
            name: result for name, result in results.items() if isinstance(result, Deferred)
        }

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process runs the converter again: it takes no time.
        return ConvertedReader, self._origin

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
        return self._results[name].compute().clone(memory_format=torch.contiguous_format)


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

    def __init__(self, meta: Tensor, compute: Callable[[], Tensor]) -> None:
        """Note how to compute a tensor that looks like `meta`."""
        self.meta, self.compute = meta, compute

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


def _stand_in(files: TensorReader, name: str) -> Deferred:
    meta = torch.empty(files.shape(name), dtype=DTYPES[files.dtype(name)], device="meta")
    return Deferred(meta, lambda: files.read(name))


def _note(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Apply a function to the shapes now, and to the numbers when a result is computed."""
    meta = function(*_replace_stand_ins(args, lambda deferred: deferred.meta), **kwargs)

    def compute() -> Any:
        return function(*_replace_stand_ins(args, lambda deferred: deferred.compute()), **kwargs)

    if isinstance(meta, Tensor):
        return Deferred(meta, compute)
    if isinstance(meta, tuple | list) and all(isinstance(part, Tensor) for part in meta):
        # i=i, because a closure would see the last i.
        return [
            Deferred(part, lambda i=i: compute()[i])  # type: ignore[misc]
            for i, part in enumerate(meta)
        ]
    return meta


def _replace_stand_ins(values: Any, swap: Callable[[Deferred], Tensor]) -> Any:
    """Replace every stand-in in nested tuples and lists."""
    if isinstance(values, Deferred):
        return swap(values)
    if isinstance(values, tuple | list):
        return type(values)(_replace_stand_ins(value, swap) for value in values)
    return values
