"""`loraq.json`: how a folder's tensors are read, and how they came to be.

The format is described in docs/checkpoint-format.md.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from loraq.checkpoint.components import StoredFile, parse_components
from loraq.checkpoint.folder import file_sha256
from loraq.errors import CheckpointError, LoraqError
from loraq.json_files import read_json, write_json
from loraq.scheme import Branch, Scheme
from loraq.version import __version__

FILE_NAME = "loraq.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class StoredLayer:
    """One quantized layer of a folder."""

    #: (out, in).
    shape: tuple[int, int]
    scheme: Scheme
    #: What `quantize_` noted: errors, seconds, source hash, and the recipe's index in
    #: `Manifest.recipes`.
    record: dict[str, Any]


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
            "layers": {
                name: {"shape": list(layer.shape), "scheme": asdict(layer.scheme), **layer.record}
                for name, layer in self.layers.items()
            },
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
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"'{path}' has format version {version!r}; this loraq reads {FORMAT_VERSION}. "
                "Update loraq."
            )
        try:
            layers = {name: _parse_layer(dict(entry)) for name, entry in content["layers"].items()}
            components = parse_components(content.get("components", {}))
            manifest = cls(layers, list(content["recipes"]), dict(content["tied"]), components)
            files = {
                str(name): (int(entry["bytes"]), str(entry["sha256"]))
                for name, entry in content["files"].items()
            }
            manifest._check()
        except (
            KeyError,
            TypeError,
            ValueError,
            ArithmeticError,
            AttributeError,
            LoraqError,
        ) as error:
            raise CheckpointError(
                f"'{path}' is damaged: {error!r}. Quantize again, or restore the file."
            ) from error
        if foreign := sorted(
            path.name for path in folder.glob("*.safetensors") if path.name not in files
        ):
            raise CheckpointError(
                f"'{folder}' holds weights that '{FILE_NAME}' does not list: {', '.join(foreign)}."
            )
        for file, (size, sha256) in files.items():
            _check_file(folder, file, size, sha256 if verify else None)
        return manifest

    def record(self, layer: str) -> dict[str, Any]:
        """Return what `quantize_` noted of a layer, with the recipe itself instead of its index."""
        record = dict(self.layers[layer].record)
        if record.get("recipe") is not None:
            record["recipe"] = self.recipes[record["recipe"]]
        return record

    def _check(self) -> None:
        """Raise `ValueError` if a layer or a tied name points to nothing."""
        for name, layer in self.layers.items():
            scheme, branch = layer.scheme, layer.scheme.branch
            formats = (
                scheme.weight,
                scheme.activation,
                *((branch.weight, branch.activation) if branch else ()),
            )
            if not all(isinstance(fmt, str) for fmt in formats) or (
                branch and type(branch.rank) is not int
            ):
                raise ValueError(f"layer '{name}' has the scheme {scheme}")
            scheme.check(layer.shape)
            index = layer.record.get("recipe")
            if index is not None and index not in range(len(self.recipes)):
                raise ValueError(f"layer '{name}' has recipe {index!r} of {len(self.recipes)}")
        if not all(isinstance(name, str) for name in self.tied.values()):
            raise ValueError("'tied' does not map names to names")


def _parse_layer(entry: dict[str, Any]) -> StoredLayer:
    n_out, n_in = entry.pop("shape")
    scheme = dict(entry.pop("scheme"))
    branch = scheme.pop("branch")
    return StoredLayer(
        (int(n_out), int(n_in)),
        Scheme(**scheme, branch=Branch(**branch) if branch else None),
        entry,
    )


def _check_file(folder: Path, file: str, size: int, sha256: str | None) -> None:
    path = folder / file
    if Path(file).name != file:
        raise CheckpointError(
            f"'{folder / FILE_NAME}' names the file '{file}'. Only files beside it are read."
        )
    if not path.is_file():
        raise CheckpointError(f"'{path}' is missing. Copy the whole folder again.")
    if path.stat().st_size != size:
        raise CheckpointError(
            f"'{path}' has {path.stat().st_size} bytes, {size} are expected. Copy it again."
        )
    if sha256 is not None and file_sha256(path) != sha256:
        raise CheckpointError(
            f"'{path}' was changed after it was written: its hash differs. Copy it again."
        )
