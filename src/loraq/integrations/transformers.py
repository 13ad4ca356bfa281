"""Folders of the transformers library: text encoders, vision encoders, language models."""

import copy
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraq.checkpoint.renaming import RenamedReader
from loraq.errors import CheckpointError, LoraqError, MissingLibraryError
from loraq.integrations.construction import (
    bound_parameters,
    bounded_construction,
    require_plausible,
)
from loraq.integrations.deferred import DeferredReader, stand_in
from loraq.json_files import read_json
from loraq.pipeline.source import list_tensors
from loraq.safetensors.fp8 import Fp8Reader
from loraq.safetensors.header import DTYPES, FLOATS
from loraq.safetensors.reader import ShardReader, TensorReader

#: The minors of transformers that this was tested with.
SUPPORTED = ("5.23",)

#: What transformers leaves out of old checkpoints, whatever the class.
_LEFT_OUT = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


def is_config_of_transformers(config: dict[str, Any]) -> bool:
    """Return whether a `config.json` describes a model of transformers."""
    names = config.get("architectures")
    return "model_type" in config and isinstance(names, list) and bool(names)


def transformers_model(config: dict[str, Any], config_file: Path, weights: Path) -> nn.Module:
    """Return the model of a configuration, with parameters on the meta device.

    Its parameters are of the dtype of most weights. What a constructor makes is bounded by what the
    weights have.

    Args:
        config: what was read.
        config_file: where from; how the model generates is read from the file beside it.
        weights: file or folder of the weights.

    Raises:
        CheckpointError: it names a class that is not there, or the class refuses it.
        MissingLibraryError: transformers is not installed.
    """
    name, config = str(config["architectures"][0]), dict(config)
    with _imported(config_file) as transformers:
        from accelerate import init_empty_weights
        from transformers.modeling_utils import local_torch_dtype

        kind = _find_class(transformers, name, str(config["model_type"]))
        if kind is None:
            raise CheckpointError(
                f"'{config_file}' names the class {name!r}, which transformers "
                f"{transformers.__version__} does not have. Check the file, or install the version "
                "that wrote it."
            )
        try:
            require_plausible(config)
            made = transformers.AutoConfig.for_model(str(config.pop("model_type")), **config)
            made.architectures = [name]
            with (
                torch.device("cpu"),  # whatever the process has set
                bounded_construction(bound_parameters(weights)),
                local_torch_dtype(_stored_dtype(weights), name),
                init_empty_weights(include_buffers=False),
            ):
                model: Any = kind(made)
            # Registering a parameter made another one of it.
            model.tie_weights()
            generation = config_file.parent / "generation_config.json"
            if model.can_generate() and generation.is_file():
                model.generation_config = transformers.GenerationConfig.from_dict(
                    read_json(generation)
                )
        except Exception as error:  # constructors raise what they like
            reason = error if isinstance(error, LoraqError) else f"{type(error).__name__}: {error}"
            raise CheckpointError(
                f"{name} refuses '{config_file}': {reason}. Check the file, or download it again."
            ) from error
    return model


@contextmanager
def _imported(config_file: Path) -> Iterator[Any]:
    try:
        import transformers

        yield transformers
    except ImportError as error:
        raise MissingLibraryError(
            f"'{config_file}' is of transformers, which cannot be imported ({error}). Run: pip "
            'install "loraq[diffusers]"'
        ) from error


def _find_class(transformers: Any, name: str, model_type: str) -> Any:
    """Return the model class of a name; some are only in the module that defines them."""
    kind = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES.get(model_type)
    config = getattr(transformers, str(kind), None)
    module = str(getattr(config, "__module__", "")).replace(".configuration_", ".modeling_")
    for place in (transformers, sys.modules.get(module) or _import(module)):
        found = getattr(place, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return None


def _import(module: str) -> Any:
    """Return a module of transformers, or `None` if it has no such one."""
    try:
        return import_module(module) if module.startswith("transformers.models.") else None
    except ImportError:
        return None


def _stored_dtype(weights: Path) -> torch.dtype:
    """Return the dtype of most floats of a file or folder; fp32 if nothing says so."""
    numbers: dict[str, int] = {}
    try:
        reader = ShardReader(weights)
    except CheckpointError:  # whoever reads the weights will say so
        return torch.float32
    for name in reader.names:
        if reader.dtype(name) in FLOATS:
            size = torch.Size(reader.shape(name)).numel()
            numbers[reader.dtype(name)] = numbers.get(reader.dtype(name), 0) + size
    return DTYPES[max(numbers, key=lambda dtype: numbers[dtype])] if numbers else torch.float32


def read_under_own_names(
    files: ShardReader | Fp8Reader,
    model: nn.Module,
    config: dict[str, Any],
    config_file: Path,
    weights: Path,
) -> TensorReader:
    """Return the tensors of a checkpoint under the names that they have in the model.

    Many checkpoints have the names of older classes, or the experts of a layer one by one;
    transformers renames and joins while it loads, and so is done here, on tensors not read yet.
    What it leaves out is left out.

    Args:
        files: the tensors.
        model: what `transformers_model` made of the other three.
        config: what was read.
        config_file: where from.
        weights: file or folder of the weights.

    Raises:
        CheckpointError: a conversion of transformers does not understand the tensors.
    """
    names, converters = _assign(files, model)
    if converters:
        return _ConvertedReader(files, config, config_file, weights)
    if set(names) == set(files.names) and all(new == old for new, old in names.items()):
        return files
    return RenamedReader(files, names)


class _ConvertedReader(DeferredReader):
    """The tensors of a file of which some are joined or split."""

    def __init__(
        self,
        files: ShardReader | Fp8Reader,
        config: dict[str, Any],
        config_file: Path,
        weights: Path,
    ) -> None:
        model = transformers_model(config, config_file, weights)
        names, converters = _assign(files, model)
        results = {new: stand_in(files, old) for new, old in names.items()}
        for first, converter in converters.items():
            try:
                made = converter.convert(first, model=model, config=model.config)
            except Exception as error:  # conversions raise what they like
                raise CheckpointError(
                    f"'{weights}': transformers cannot make tensor '{first}' of what is there "
                    f"({type(error).__name__}: {error}). Check that the configuration is of the "
                    "same model."
                ) from error
            for name, value in made.items():
                results[name] = value[0] if isinstance(value, list) else value
        super().__init__(results, (files, config, config_file, weights))


def _assign(files: TensorReader, model: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """Return which tensor of a file becomes which of a model, as transformers does it.

    Returns:
        The names in the file by those in the model; names that the model does not have are left
        for whoever checks that. And the conversions by the first name that they make, with
        stand-ins for what goes into them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    conversions, own = get_model_conversion_mapping(model), model.state_dict()
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix, left_out = model.base_model_prefix, _left_out(model)
    names, used = dict[str, str](), dict[str, Any]()
    for old in sorted(files.names, key=dot_natural_key):
        new, pattern = rename_source_key(old, renamings, converters, prefix, own)
        if new not in own and old in own:
            new, pattern = rename_source_key(old, [], [], prefix, own)
        if new in own and pattern is not None:
            converter = used.setdefault(new, copy.deepcopy(by_pattern[pattern]))
            converter.add_tensor(new, old, pattern, stand_in(files, old))
        elif new in own or not left_out.search(new):
            names[new] = old
    for second, first in list_tensors(model, [])[1].items():  # shared ones are stored once
        if second in names and first not in names:
            names[first] = names.pop(second)
    return names, used


def _left_out(model: Any) -> re.Pattern[str]:
    """Return what matches the names that transformers leaves out of checkpoints of a model."""
    patterns = (*_LEFT_OUT, *(model._keys_to_ignore_on_load_unexpected or ()))
    return re.compile("|".join(f"({pattern})" for pattern in patterns))


def name_in(model: Any) -> Callable[[str], str | None]:
    """Return how a tensor of a folder is called in a model of another class than the folder's.

    A model without a head is loaded from the folder of one with a head, and the other way round:
    transformers renames, and leaves out what the model does not have.
    """
    modules, prefix = {name for name, _ in model.named_modules()}, model.base_model_prefix
    modules |= {name for name, _ in model.named_parameters()}  # stacks of experts take their places
    renamings = renamings_of(model)

    def rename(name: str) -> str | None:
        for known in dict.fromkeys((_rename(name, renamings), name)):
            for tried in (known, known.removeprefix(f"{prefix}."), f"{prefix}.{known}"):
                owner, _, leaf = tried.rpartition(".")
                if owner in modules and (owner or hasattr(model, leaf)):
                    return tried
        return None

    return rename


def renamings_of(model: Any) -> list[Any]:
    """Return how transformers renames the tensors of checkpoints of a model, whole names only."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    return [
        each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)
    ]


def _rename(name: str, renamings: list[Any]) -> str:
    from transformers.core_model_loading import apply_renamings

    return str(apply_renamings(name, renamings))
