"""`loraq.json`: how a folder's tensors are read, and how they came to be.

The format is described in docs/checkpoint-format.md.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch

from loraq.appended import BranchStack
from loraq.checkpoint.components import StoredFile, parse_components
from loraq.checkpoint.folder import file_sha256
from loraq.errors import CheckpointError, FormatError, SchemeError, list_some
from loraq.experts import QuantizedExperts
from loraq.json_files import read_json, write_json
from loraq.nn import QuantizedLayer
from loraq.regular_file import is_plain_name
from loraq.safetensors.header import read_header
from loraq.safetensors.selection import is_model_weights, select_weights
from loraq.scheme import Branch, Scheme
from loraq.version import __version__

FILE_NAME = "loraq.json"
FORMAT_VERSION = 1
#: The most layers that are read, which takes a second; the largest models have 2000.
_MOST_LAYERS = 10_000

#: Types of what a layer's record may have.
_RECORD: dict[str, Any] = {
    "recipe": int | None,
    "relative_error": float | int,
    "output_error": float | int,
    "bits_per_weight": float | int,
    "nbytes": int,
    "source_sha256": str,
    "source_dtype": str,
    "stats_sha256": str,
    "device": str,
    "absorbed": dict,
    "kept": bool,
    "unsmoothed": bool,
}
#: Types of the fields of what a scheme is built of.
_HINTS: dict[Any, dict[str, Any]] = {kind: get_type_hints(kind) for kind in (Scheme, Branch)}


@dataclass(frozen=True)
class StoredLayer:
    """One quantized layer of a folder."""

    #: (out, in), or (experts, out, in).
    shape: tuple[int, ...]
    scheme: Scheme
    #: What `quantize_` noted: errors, seconds, source hash, and the recipe's index in
    #: `Manifest.recipes`.
    record: dict[str, Any]
    #: Whether the model has a stack of experts as (experts, in, out).
    transposed: bool = False

    @property
    def is_stack(self) -> bool:
        """Whether it is a stack of experts, which one parameter of the model holds."""
        return len(self.shape) == 3

    @property
    def is_kept(self) -> bool:
        """Whether the rules kept it out of the recipe's scheme, and it is stored in eight bits."""
        return bool(self.record.get("kept"))

    @property
    def stack(self) -> BranchStack:
        """What its branch is made of."""
        return BranchStack.of(self.record, self.scheme)


@dataclass(frozen=True)
class Manifest:
    """Everything that is in `loraq.json`."""

    layers: dict[str, StoredLayer]
    #: The recipes that made the layers, as plain data; usually one.
    recipes: list[dict[str, Any]]
    #: Names that share the tensor of another name.
    tied: dict[str, str]
    #: Other files of the pipeline that the folder is in, by their path from the folder above.
    components: dict[str, StoredFile] = field(default_factory=dict)

    @classmethod
    def of_layers(
        cls,
        layers: Mapping[str, QuantizedLayer],
        tied: dict[str, str],
        components: Mapping[str, StoredFile],
    ) -> "Manifest":
        """Return what stands in the manifest of a model with these layers."""
        recipes: list[dict[str, Any]] = []
        stored = {}
        for name, layer in layers.items():
            record = dict(layer.record)
            recipe = record.pop("recipe", None)
            if recipe is not None:
                if recipe not in recipes:
                    recipes.append(recipe)
                record["recipe"] = recipes.index(recipe)
            transposed = isinstance(layer, QuantizedExperts) and layer.transposed
            stored[name] = StoredLayer(layer.packed_shape, layer.scheme, record, transposed)
        return cls(stored, recipes, tied, dict(components))

    @property
    def recipe(self) -> dict[str, Any] | None:
        """The recipe that made most layers, as plain data; `None` if none was noted."""
        noted = (layer.record.get("recipe") for layer in self.layers.values())
        counted = Counter(index for index in noted if index is not None).most_common(1)
        return self.recipes[counted[0][0]] if counted else None

    def write(self, folder: Path, files: Mapping[str, str]) -> None:
        """Write `loraq.json`.

        Args:
            folder: where to.
            files: SHA-256 of what was written into each file beside it: of what was checked, not
                of what is found there now.
        """
        content: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "versions": {"loraq": __version__, "torch": torch.__version__},
            "recipes": self.recipes,
            "tied": self.tied,
            "layers": {name: _describe_layer(layer) for name, layer in self.layers.items()},
            "files": {
                file: {"bytes": (folder / file).stat().st_size, "sha256": sha256}
                for file, sha256 in files.items()
            },
        }
        if self.components:
            content["components"] = {
                name: stored.to_dict() for name, stored in self.components.items()
            }
        write_json(folder / FILE_NAME, content)

    @classmethod
    def read(cls, folder: Path, *, verify: bool = True) -> "Manifest":
        """Read `loraq.json` and check the files it lists.

        Args:
            folder: what `loraq.save` or `loraq quantize` wrote.
            verify: whether the files' hashes are compared too, not only their sizes.

        Raises:
            CheckpointError: not such a folder, a newer format, or files that are missing, truncated
                or changed.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            raise CheckpointError(
                f"'{folder}' is not a loraq checkpoint: it has no '{FILE_NAME}'. `loraq quantize "
                "SRC DST` makes one."
            )
        content = read_json(path)
        version = content.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise CheckpointError(
                f"'{path}' has format version {version!r}; this loraq reads {FORMAT_VERSION}. "
                "Update loraq."
            )
        try:
            manifest, files = _parse(content)
        except (ValueError, SchemeError, FormatError) as error:
            raise CheckpointError(
                f"'{path}' is damaged: {error} Quantize again, or restore the file."
            ) from error
        unlisted = {path.name for path in folder.glob("*.safetensors")} - files.keys()
        if foreign := sorted(filter(is_model_weights, unlisted)):
            raise _foreign(folder, foreign)
        for file, (size, _) in files.items():
            _check_size(folder / file, size)
        for file, (_, sha256) in files.items() if verify else ():
            _check_hash(folder / file, sha256)
        if foreign := sorted(unlisted.intersection(select_weights(folder).files)):
            raise _foreign(folder, foreign)
        return manifest

    def record(self, layer: str) -> dict[str, Any]:
        """Return what `quantize_` noted of a layer, with the recipe itself instead of its index."""
        record = dict(self.layers[layer].record)
        if record.get("recipe") is not None:
            record["recipe"] = self.recipes[record["recipe"]]
        return record


def list_files(folder: Path) -> dict[str, StoredFile]:
    """Return what `loraq.json` says of the files beside it.

    Raises:
        CheckpointError: it cannot be read.
    """
    listed = read_json(folder / FILE_NAME).get("files")
    try:
        files = {name: _parse_file(name, entry) for name, entry in dict(listed or {}).items()}
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"'{folder / FILE_NAME}' is damaged: {error} Copy it again."
        ) from error
    return {name: StoredFile(*stored) for name, stored in files.items()}


def _foreign(folder: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"'{folder}' holds weights that '{FILE_NAME}' does not list: {list_some(names)}. If a "
        f"float model was saved there, delete '{FILE_NAME}'; otherwise take these files away."
    )


def _parse(content: dict[str, Any]) -> tuple[Manifest, dict[str, tuple[int, str]]]:
    """Return the manifest in plain data, and size and hash of each file that it lists.

    Every type is checked, because what is read here decides shapes and how bytes are read. Keys
    that nobody knows are refused in a scheme, which says how bytes are read, and are kept in the
    rest, which is notes.
    """
    recipes = _take(content, "recipes", list, "the manifest")
    if not all(isinstance(recipe, dict) for recipe in recipes):
        raise ValueError("'recipes' is not a list of tables.")
    entries = _take(content, "layers", dict, "the manifest")
    if len(entries) > _MOST_LAYERS:
        raise ValueError(f"it has {len(entries)} layers, and at most {_MOST_LAYERS} are read.")
    layers = {name: _parse_layer(name, entry, len(recipes)) for name, entry in entries.items()}
    tied = _take(content, "tied", dict, "the manifest")
    if not all(isinstance(name, str) for name in tied.values()):
        raise ValueError("'tied' does not map names to names.")
    if chained := [name for name, source in tied.items() if source in tied]:
        raise ValueError(f"'tied' leads from a name to another tied name: {list_some(chained)}.")
    if unprintable := [name for name in (*layers, *tied) if not name.isprintable()]:
        raise ValueError(f"it has names that cannot be printed: {list_some(unprintable)}.")
    files = {
        name: _parse_file(name, entry)
        for name, entry in _take(content, "files", dict, "the manifest").items()
    }
    components = parse_components(content.get("components", {}))
    return Manifest(layers, recipes, tied, components), files


def _describe_layer(layer: StoredLayer) -> dict[str, Any]:
    entry = {"shape": list(layer.shape), "scheme": layer.scheme.to_dict(), **layer.record}
    return entry | {"transposed": layer.transposed} if layer.is_stack else entry


def _parse_layer(name: str, entry: Any, n_recipes: int) -> StoredLayer:
    of = f"layer '{name}'"
    if not isinstance(entry, dict):
        raise ValueError(f"{of} is {entry!r}, not a table.")
    shape = _take(entry, "shape", list, of)
    if len(shape) not in (2, 3) or not all(type(n) is int and 0 < n < 2**31 for n in shape):
        raise ValueError(f"{of} has the shape {shape}; (out, in) is required, or those of experts.")
    transposed = len(shape) == 3 and _take_flag(entry, "transposed", of)
    scheme = _take(entry, "scheme", dict, of)
    branch = _take(scheme, "branch", dict | None, f"the scheme of {of}")
    built = Scheme(
        **_take_fields(
            {"smoothing": False, **scheme}
            | {"branch": branch and Branch(**_take_fields(branch, Branch, of))},
            Scheme,
            of,
        )
    )
    own = {"shape", "scheme", *(["transposed"] if len(shape) == 3 else [])}
    record = {key: value for key, value in entry.items() if key not in own}
    _check_record(record, n_recipes, of)
    layer = StoredLayer(tuple(shape), built, record, transposed)
    try:
        layer.stack.check(built, (shape[-2], shape[-1]))
    except ValueError as error:
        raise ValueError(f"{of}: {error}") from error
    return layer


def _check_record(record: dict[str, Any], n_recipes: int, of: str) -> None:
    """Raise `ValueError` unless what was noted of a layer has the types that it is written with."""
    for key in record.keys() & _RECORD.keys():
        _take(record, key, _RECORD[key], of)
    index = record.get("recipe")
    if index is not None and index not in range(n_recipes):
        raise ValueError(f"{of} has recipe {index} of {n_recipes}.")
    if "absorbed" in record:
        _take(record["absorbed"], "sha256", str, f"what {of} absorbed")
        _take(record["absorbed"], "scale", float | int, f"what {of} absorbed")


def _parse_file(name: str, entry: Any) -> tuple[int, str]:
    if not is_plain_name(name):
        raise ValueError(f"it names the file '{list_some([name])}'. Only files beside it are read.")
    if not isinstance(entry, dict):
        raise ValueError(f"file '{name}' is {entry!r}, not a table.")
    size = _take(entry, "bytes", int, f"file '{name}'")
    return size, _take(entry, "sha256", str, f"file '{name}'")


def _take_fields(table: dict[str, Any], kind: type[Scheme | Branch], of: str) -> dict[str, Any]:
    """Return a table that has the fields of a dataclass, each of its type, and no other keys."""
    hints = _HINTS[kind]
    if unknown := [key for key in table if key not in hints]:
        raise ValueError(f"the scheme of {of} has the unknown keys {list_some(unknown)}.")
    return {key: _take(table, key, hint, f"the scheme of {of}") for key, hint in hints.items()}


def _take(table: dict[str, Any], key: str, kind: Any, of: str) -> Any:
    """Return the value of a key that must be there, of a type; a bool is no number."""
    if key not in table:
        raise ValueError(f"{of} has no '{key}'.")
    value = table[key]
    if isinstance(value, bool) is not (kind is bool) or not isinstance(value, kind):
        raise ValueError(f"'{key}' of {of} is {value!r}.")
    return value


def _take_flag(table: dict[str, Any], key: str, of: str) -> bool:
    """Return the value of a key that must be there, true or false."""
    if not isinstance(table.get(key), bool):
        raise ValueError(f"'{key}' of {of} is {table.get(key)!r}; true or false is required.")
    return bool(table[key])


def _check_size(path: Path, size: int) -> None:
    """Look at all that costs nothing, before gigabytes are hashed."""
    if not path.is_file():
        raise CheckpointError(f"'{path}' is missing. Copy the whole folder again.")
    if path.stat().st_size != size:
        raise CheckpointError(
            f"'{path}' has {path.stat().st_size} bytes, {size} are expected. Copy it again."
        )
    if path.suffix == ".safetensors":
        read_header(path)


def _check_hash(path: Path, sha256: str) -> None:
    if file_sha256(path) != sha256:
        raise CheckpointError(
            f"'{path}' was changed after it was written: its hash differs. Copy it again."
        )
