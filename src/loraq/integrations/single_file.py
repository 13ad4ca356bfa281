"""Checkpoints in a model's original layout: diffusers' converters, on tensors not read yet."""

from typing import Any

from torch import nn

from loraq.errors import CheckpointError
from loraq.integrations.deferred import Deferred, DeferredReader, stand_in
from loraq.integrations.diffusers import _quiet_diffusers
from loraq.pipeline.source import list_tensors
from loraq.safetensors.fp8 import Fp8Reader
from loraq.safetensors.reader import ShardReader, TensorReader


def is_single_file_class(name: str) -> bool:
    """Return whether diffusers loads a class, by its name, from a single file."""
    with _quiet_diffusers():
        from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

        return name in SINGLE_FILE_LOADABLE_CLASSES


class ConvertedReader(DeferredReader):
    """The tensors of an original checkpoint under the names of the diffusers class."""

    def __init__(
        self, files: ShardReader | Fp8Reader, class_name: str, config: dict[str, Any]
    ) -> None:
        """Run the converter of a class.

        Raises:
            CheckpointError: diffusers has no converter for the class, or it does not understand the
                file.
        """
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
                    checkpoint={name: stand_in(files, name) for name in files.names}, config=config
                )
            except Exception as error:  # converters raise what they like on files they do not know
                raise CheckpointError(
                    f"diffusers' converter for {class_name} does not understand the tensors in "
                    f"'{files.folder}' ({type(error).__name__}: {error}). Check that `--config` is "
                    "of the same model."
                ) from error
        tensors = {name: made for name, made in results.items() if isinstance(made, Deferred)}
        super().__init__(tensors, (files, class_name, config))


def read_own_layout(
    files: ShardReader | Fp8Reader, model: nn.Module, config: dict[str, Any]
) -> TensorReader:
    """Return the tensors of a file under the names of a model of diffusers.

    Raises:
        CheckpointError: as `ConvertedReader`, if the names are others.
    """
    expected, _ = list_tensors(model, files.names)
    if set(expected) <= set(files.names):
        return files
    return ConvertedReader(files, config["_class_name"], config)
