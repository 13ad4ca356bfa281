"""What a page says of a quantized model: read from its folder, planned again, and compared."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import nn

from loraq.checkpoint.inspect import find_packed
from loraq.checkpoint.model_index import is_pipeline
from loraq.checkpoint.summary import Summary, describe, nbytes_of
from loraq.integrations.diffusers import model_folder, model_of
from loraq.pipeline.jobs import KeptLayer, LayerJob
from loraq.pipeline.plan import Plan
from loraq.recipe import Recipe


class Kind(NamedTuple):
    """The layers of one name in all blocks of a model."""

    #: Their name, with `*` for the number of the block.
    name: str
    #: By the number of the block, in order; of a layer that is in no block the number is 0.
    layers: Mapping[int, str]


class Kept(NamedTuple):
    """Layers that did not get the recipe's scheme, for one reason."""

    reason: str
    #: "8 bits" or "16 bits".
    stored: str
    kinds: tuple[Kind, ...]
    nbytes: int

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return sum(len(kind.layers) for kind in self.kinds)


class Difference(NamedTuple):
    """A layer that is stored otherwise than the recipe alone plans it."""

    name: str
    planned: str
    stored: str


@dataclass(frozen=True)
class Model(Summary):
    """One quantized model."""

    #: Of its component in a pipeline; "" for a model that stands alone.
    component: str
    #: What its recipe plans for its class; `None` without a configuration that names one.
    plan: Plan | None

    @classmethod
    def read(cls, folder: Path, component: str = "") -> "Model":
        """Read a model's folder; of the weights only headers.

        Raises:
            CheckpointError: it is not a quantized model's folder, or its configuration is refused.
            LoraqError: the library of the model is not installed.
            RecipeError, SchemeError: its recipe is not valid.
        """
        read = Summary.read(folder)
        plan, recipe = None, read.manifest.recipe
        if read.class_name and recipe is not None:
            model: nn.Module = model_of(read.config, folder / "config.json")
            plan = Plan.of_model(model, Recipe.from_dict(recipe))
        return cls(**vars(read), component=component, plan=plan)

    def worst(self, count: int) -> list[str]:
        """Return the names of the layers with the largest errors among `made`, largest first."""
        known = (name for name in self.made if name in self.errors)
        return sorted(known, key=lambda name: -self.errors[name])[:count]

    def split_bytes(self) -> list[tuple[str, int]]:
        """Return what takes the bytes of the whole model: four parts that sum up to it."""
        main = branches = in_8_bits = 0
        for layer in self.manifest.layers.values():
            if layer.is_kept:
                in_8_bits += nbytes_of(layer)
                continue
            *experts, n_out, n_in = layer.shape
            weight = math.prod(experts) * layer.scheme.weight_format.nbytes((n_out, n_in))
            main, branches = main + weight, branches + nbytes_of(layer) - weight
        rest = max(0, self.nbytes - main - branches - in_8_bits)  # a shared weight counts once
        return [
            ("packed weights", main),
            ("low-rank branches", branches),
            ("layers kept in 8 bits", in_8_bits),
            ("not quantized", rest),
        ]

    def kept(self) -> list[Kept]:
        """Return what did not get the recipe's scheme and why, the most bytes first."""
        if self.plan is None:
            names = [name for name, each in self.manifest.layers.items() if each.is_kept]
            nbytes = sum(nbytes_of(self.manifest.layers[name]) for name in names)
            reason = "rules of the class"
            return [Kept(reason, "8 bits", tuple(group_kinds(names)), nbytes)] if names else []
        groups: dict[tuple[str, str], list[LayerJob | KeptLayer]] = {}
        for layer in self.plan.layers:
            if isinstance(layer, KeptLayer):
                groups.setdefault((layer.reason, "16 bits"), []).append(layer)
            elif layer.is_kept:
                groups.setdefault((layer.reason, "8 bits"), []).append(layer)
        found = [
            Kept(
                reason,
                stored,
                tuple(group_kinds([layer.name for layer in layers])),
                sum(layer.nbytes for layer in layers),
            )
            for (reason, stored), layers in groups.items()
        ]
        for other in self.plan.others:
            kinds = tuple(group_kinds([other.name]))
            found.append(Kept(other.reason, "16 bits", kinds, other.nbytes))
        return sorted(found, key=lambda each: -each.nbytes)

    def differences(self) -> list[Difference]:
        """Return the layers that are not stored as the recipe alone plans them.

        An allocation moves ranks, a LoRA that was appended adds some.
        """
        if self.plan is None:
            return []
        planned = {job.name: describe(job.scheme) for job in self.plan.quantized}
        stored = {name: describe(each.scheme) for name, each in self.manifest.layers.items()}
        return [
            Difference(name, planned.get(name, "not quantized"), stored.get(name, "not quantized"))
            for name in dict.fromkeys([*planned, *stored])
            if planned.get(name) != stored.get(name)
        ]


def read_models(path: Path) -> list[Model]:
    """Read the quantized models of a folder: of a pipeline all, else the one that is there.

    Raises:
        CheckpointError, LoraqError, RecipeError, SchemeError: as `Model.read`.
    """
    if is_pipeline(path):
        return [Model.read(folder, name) for name, folder in find_packed(path).items()]
    return [Model.read(model_folder(path))]


def group_kinds(names: list[str]) -> list[Kind]:
    """Return the layers by what their names are without the number of the block."""
    kinds: dict[str, dict[int, str]] = {}
    for name in names:
        kind, depth = split_depth(name)
        kinds.setdefault(kind, {})[depth] = name
    return [Kind(kind, dict(sorted(layers.items()))) for kind, layers in kinds.items()]


def split_depth(name: str) -> tuple[str, int]:
    """Return a layer's name with `*` for the number of its block, and that number."""
    found = re.search(r"(?<=\.)[0-9]{1,6}(?=\.)", name)
    if found is None:
        return name, 0
    return f"{name[: found.start()]}*{name[found.end() :]}", int(found[0])
