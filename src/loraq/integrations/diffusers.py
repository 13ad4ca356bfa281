"""Folders of the diffusers library: a transformer's, or a pipeline's with a transformer in it."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from loraq.checkpoint import load_into, save
from loraq.checkpoint.manifest import FILE_NAME
from loraq.checkpoint.pretrained import attach_save_pretrained
from loraq.checkpoint.reader import ShardReader, read_json
from loraq.checkpoint.writer import atomic_folder, require_free
from loraq.errors import CheckpointError, LoraqError
from loraq.kernels import DEFAULT_BACKEND
from loraq.layers import linear_layers
from loraq.pipeline.plan import Plan
from loraq.pipeline.progress import ProgressCallback
from loraq.pipeline.quantize import Report, quantize_
from loraq.recipe import Recipe

#: Component of a pipeline that is quantized, the first that is there.
_COMPONENTS = ("transformer", "unet")


def transformer_folder(source: Path) -> Path:
    """Return the folder with the transformer: `source` itself, or that component of a pipeline.

    Raises:
        CheckpointError: `source` is neither.
    """
    if not source.is_dir():
        raise CheckpointError(f"'{source}' is not a folder. Give a transformer's folder (config.json) or a pipeline's.")
    if (source / "model_index.json").is_file():
        for component in _COMPONENTS:
            if (source / component / "config.json").is_file():
                return source / component
        raise CheckpointError(
            f"The pipeline '{source}' has no folder 'transformer'. Give the folder to quantize itself."
        )
    if not (source / "config.json").is_file() and not (source / FILE_NAME).is_file():
        raise CheckpointError(
            f"'{source}' has neither 'config.json' nor 'model_index.json': it is no diffusers folder."
        )
    return source


def empty_model(folder: Path) -> nn.Module:
    """Return the model that a transformer folder's `config.json` describes, with its parameters on the meta device.

    Raises:
        CheckpointError: the configuration names no known class, or the class refuses it.
        LoraqError: diffusers is not installed.
    """
    config = read_json(folder / "config.json")
    config.pop("quantization_config", None)
    with _quiet_diffusers() as diffusers:
        from accelerate import init_empty_weights

        name = config.get("_class_name")
        kind = getattr(diffusers, str(name), None)
        if not isinstance(kind, type) or not issubclass(kind, nn.Module):
            raise CheckpointError(
                f"'{folder / 'config.json'}' names the class {name!r}, which diffusers {diffusers.__version__} does "
                "not have. Check the file, or install the diffusers version that wrote it."
            )
        try:
            with init_empty_weights(include_buffers=False):
                return kind.from_config(config)  # type: ignore[attr-defined]
        except Exception as error:  # constructors of diffusers raise what they like
            raise CheckpointError(f"{name} refuses '{folder / 'config.json'}': {error}") from error


def plan_folder(source: str | Path, recipe: Recipe) -> Plan:
    """Return what `quantize_folder` would do, from the configuration alone.

    Raises:
        CheckpointError, SchemeError: the folder or the recipe cannot be used.
    """
    model = empty_model(float_folder(Path(source)))
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in linear_layers(model).items()}
    return Plan.of(shapes, recipe, type(model).__name__)


def quantize_folder(
    source: str | Path,
    target: str | Path,
    recipe: Recipe,
    *,
    workers: int = 1,
    overwrite: bool = False,
    progress: ProgressCallback | bool = True,
) -> Report:
    """Quantize a transformer folder, or the transformer of a pipeline folder, into a new folder.

    The other components of a pipeline are copied as they are. The float model is in memory while it works.

    Raises:
        CheckpointError: the source cannot be read, or the target cannot be written. Checked before long work.
        LayerError, RecipeError, SchemeError: as `quantize_`.
    """
    source, target = Path(source), Path(target)
    folder = float_folder(source)
    _require_apart(source, target)
    require_free(target, overwrite=overwrite)
    plan = plan_folder(source, recipe)
    _require_space(target, source, plan)
    model = load_float(folder)
    report = quantize_(model, recipe, workers=workers, progress=progress)
    save_like(model, source, folder, target, overwrite=overwrite)
    return report


def save_like(model: nn.Module, source: Path, folder: Path, target: Path, *, overwrite: bool) -> None:
    """Save a model that came from `folder`; if that is a component of the pipeline `source`, copy the others too.

    Raises:
        CheckpointError: the target cannot be written.
    """
    if folder == source:
        save(model, target, overwrite=overwrite)
        return
    with atomic_folder(target, overwrite=overwrite) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True, ignore=_only_not(source, folder.name))
        save(model, partial / folder.name, overwrite=True)


def load(folder: str | Path, *, backend: str = DEFAULT_BACKEND, verify: bool = True) -> nn.Module:
    """Build the model of a folder written by `loraq.save` or `loraq quantize`, and load it on the CPU.

    Args:
        folder: a quantized transformer folder, or a pipeline folder with one in it.
        backend: back end of the quantized layers.
        verify: whether the files' hashes are checked.

    Returns:
        The diffusers model in evaluation mode, with `QuantizedLinear` layers.

    Raises:
        CheckpointError: truncated, foreign, changed or mismatched files.
        LoraqError: diffusers is not installed. `loraq.load_into` works without it.
    """
    place = transformer_folder(Path(folder))
    if not (place / FILE_NAME).is_file():
        raise CheckpointError(
            f"'{place}' is not a loraq checkpoint: it has no '{FILE_NAME}'. `loraq quantize` makes one."
        )
    if not (place / "config.json").is_file():
        raise CheckpointError(
            f"'{place}' has no 'config.json' that says what to build. Build the model, and use `loraq.load_into`."
        )
    model = empty_model(place)
    load_into(model, place, backend=backend, verify=verify)
    _cast_unsaved(model)
    attach_save_pretrained(model)
    return model.eval()


def _cast_unsaved(model: nn.Module) -> None:
    """Give buffers that no file holds, such as position tables, the dtype of the weights, as diffusers does.

    Without this the output after a round trip would not be that of the model that was saved.
    """
    dtypes = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    if len(dtypes) != 1:
        return
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(*dtypes)


def float_folder(source: Path) -> Path:
    """Return the folder with the transformer, as `transformer_folder`, if its weights are floats.

    Raises:
        CheckpointError: it is quantized already, or is no such folder.
    """
    folder = transformer_folder(source)
    if (folder / FILE_NAME).is_file() or "quantization_config" in read_json(folder / "config.json"):
        raise CheckpointError(f"'{folder}' is quantized already. Start from the float weights.")
    return folder


def load_float(folder: Path) -> nn.Module:
    """Return the model of a float transformer folder on the CPU, in evaluation mode, in the dtype of its weights.

    Raises:
        CheckpointError: the weights are missing, truncated, not float, or do not fit the configuration.
        LoraqError: diffusers is not installed.
    """
    reader = ShardReader(folder)
    model = empty_model(folder)
    expected = model.state_dict()
    missing, unexpected = sorted(set(expected) - set(reader.names)), sorted(set(reader.names) - set(expected))
    if missing or unexpected:
        raise CheckpointError(
            f"The weights in '{folder}' do not fit its config.json. Missing keys: {', '.join(missing) or 'none'}. "
            f"Unexpected keys: {', '.join(unexpected) or 'none'}."
        )
    for name, tensor in expected.items():
        if reader.shape(name) != tuple(tensor.shape):
            raise CheckpointError(
                f"'{folder}': tensor '{name}' has shape {reader.shape(name)}, config.json wants {tuple(tensor.shape)}."
            )
        if reader.dtype(name) not in ("F64", "F32", "F16", "BF16"):
            raise CheckpointError(
                f"'{folder}': tensor '{name}' is {reader.dtype(name)}. Float weights of 16 bits or more are required."
            )
    model.load_state_dict({name: reader.read(name) for name in expected}, assign=True)
    return model.eval()


def _require_apart(source: Path, target: Path) -> None:
    """Raise `CheckpointError` if writing the target could touch the source."""
    a, b = source.resolve(), target.resolve()
    if a == b:
        raise CheckpointError(f"Source and target are both '{source}'. Choose another target.")
    if a in b.parents or b in a.parents:
        inner, outer = (target, source) if a in b.parents else (source, target)
        raise CheckpointError(
            f"'{inner}' lies inside '{outer}'. Source and target must be apart: choose another target."
        )


def _require_space(target: Path, source: Path, plan: Plan) -> None:
    """Raise `CheckpointError` if the disk of the target cannot hold what will be written."""
    float_bytes = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    needed = max(0, float_bytes - plan.nbytes_bf16) + plan.nbytes
    place = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise CheckpointError(
            f"'{place}' has {free / 1e9:.2f} GB free and about {needed / 1e9:.2f} GB are needed. Free space, or choose "
            "another target."
        )


def _only_not(source: Path, component: str) -> Any:
    """An `ignore` for `copytree` that leaves out one folder of the top level."""
    return lambda place, names: [component] if Path(place) == source and component in names else []


@contextmanager
def _quiet_diffusers() -> Iterator[Any]:
    """Import diffusers without its import-time chatter."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import diffusers

        yield diffusers
    except ImportError as error:
        raise LoraqError(f'diffusers cannot be imported ({error}). Run: pip install "loraq[diffusers]"') from error
    finally:
        logging.disable(before)
