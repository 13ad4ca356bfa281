"""What a quantized model's folder amounts to: its size, its errors, its memory when it runs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraq.checkpoint.inspect import count_stored, scratch_nbytes
from loraq.checkpoint.manifest import Manifest, StoredLayer
from loraq.json_files import read_json
from loraq.scheme import Scheme

#: What a file may say of a relative error; anything else is no error that a layer can have.
_MOST_ERROR = 1e6


@dataclass(frozen=True)
class Summary:
    """One quantized model, as its manifest and the headers of its weights describe it."""

    #: `config.json`; empty where a folder has none.
    config: dict[str, Any]
    manifest: Manifest
    #: Numbers that it stores, and bytes of all its tensors.
    parameters: int
    nbytes: int
    #: Errors of the layers of which one was noted.
    errors: Mapping[str, float]

    @classmethod
    def read(cls, folder: Path) -> "Summary":
        """Read a model's folder; of the weights only headers.

        Raises:
            CheckpointError: it is not a quantized model's folder, or a file cannot be read.
        """
        manifest = Manifest.read(folder, verify=False)
        parameters, nbytes = count_stored(folder, manifest)
        errors = {
            name: float(error)
            for name, layer in manifest.layers.items()
            if 0 <= (error := layer.record.get("relative_error", -1)) < _MOST_ERROR
        }
        file = folder / "config.json"
        config = read_json(file) if file.is_file() else {}
        return cls(config, manifest, parameters, nbytes, errors)

    @property
    def class_name(self) -> str:
        """As the configuration says; "" where it says none."""
        named = self.config.get("_class_name") or (self.config.get("architectures") or [""])[0]
        return str(named)

    @property
    def made(self) -> dict[str, StoredLayer]:
        """The layers that have the recipe's scheme."""
        return {name: each for name, each in self.manifest.layers.items() if not each.is_kept}

    @property
    def made_errors(self) -> list[float]:
        """The errors of `made`, as far as they were noted."""
        return [self.errors[name] for name in self.made if name in self.errors]

    @property
    def mean_error(self) -> float | None:
        """Mean of the errors of `made`; `None` if none was noted."""
        known = self.made_errors
        return sum(known) / len(known) if known else None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight of `made`."""
        weights = sum(math.prod(layer.shape) for layer in self.made.values())
        return 8 * sum(map(nbytes_of, self.made.values())) / max(1, weights)

    @property
    def effective_bits(self) -> float:
        """Stored bits for each parameter of the whole model."""
        return 8 * self.nbytes / max(1, self.parameters)

    @property
    def scratch(self) -> int:
        """The most bytes that it takes beside its own when it runs, as one layer is decoded."""
        return scratch_nbytes(layer.shape for layer in self.manifest.layers.values())


def nbytes_of(layer: StoredLayer) -> int:
    """Return the bytes that the weight of a layer takes."""
    return layer.scheme.nbytes(layer.shape)


def describe(scheme: Scheme) -> str:
    """Return the formats and the rank of a layer in a few words."""
    branch = scheme.branch
    beside = f" + rank {branch.rank} in {branch.weight}" if branch else ""
    activation = "" if scheme.activation == "bf16" else f", activations {scheme.activation}"
    if branch and branch.activation != scheme.activation:
        activation += f", of the branch {branch.activation}"
    return f"{scheme.weight}{beside}{activation}"
