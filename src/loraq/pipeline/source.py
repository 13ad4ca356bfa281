"""What is quantized: float checkpoints, their tensors checked, their layers planned."""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loraq.checkpoint.configuration import (
    add_quantization_config,
    generation_config,
    model_config,
)
from loraq.checkpoint.fit import require_fit
from loraq.errors import CheckpointError, LoraqError, RecipeError, list_some
from loraq.formats.faults import find_fault, find_not_finite
from loraq.pipeline import kept_numbers
from loraq.pipeline.layer import hash_tensor, read_matrices
from loraq.pipeline.plan import Plan
from loraq.recipe import Recipe
from loraq.safetensors.fp8 import Fp8Reader, decode_fp8
from loraq.safetensors.header import FLOATS, TensorSpec
from loraq.safetensors.layout import tensor_bytes
from loraq.safetensors.reader import ShardReader, TensorReader

#: Names of embeddings: look-up tables, which look like the matrix of a linear layer.
_TABLE = re.compile(
    r"(?:^|\.)(?:shared|wte|wpe|embed_tokens|\w*embeddings?|relative_attention_bias)$"
)


@dataclass(frozen=True)
class Checkpoint:
    """Where the parts of a model's float checkpoint are; nothing of its weights is read yet."""

    #: A folder of shards, or one file.
    weights: Path
    #: Content of the configuration; empty for none.
    config: dict[str, Any]
    #: The model on the meta device, or `None` if the configuration names none.
    model: nn.Module | None = None
    #: Reads another layout under the names of the model.
    convert: Callable[[ShardReader | Fp8Reader], TensorReader] | None = None
    #: Which of several copies of the weights is read, as `select_weights`.
    variant: str | None = None


@dataclass(frozen=True)
class Source:
    """A float checkpoint of a model: its tensors, checked against its configuration."""

    #: The files as they are.
    files: ShardReader
    #: The tensors under the names of the model.
    reader: TensorReader
    #: Names of all tensors to write, in the order of the model.
    names: tuple[str, ...]
    #: Names that share the tensor of another name.
    tied: dict[str, str]
    #: What `config.json` of the target says; empty for none.
    config: dict[str, Any]
    #: What its linear layers get.
    plan: Plan
    #: What `generation_config.json` of the target says; empty for none.
    generation: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, checkpoint: Checkpoint, recipe: Recipe) -> "Source":
        """Check names, shapes and dtypes of all tensors against the configuration, and plan.

        Raises:
            CheckpointError: the files cannot be read, or do not fit the configuration.
            LayerError, SchemeError: a layer cannot be quantized as asked.
        """
        files, model = ShardReader(checkpoint.weights, checkpoint.variant), checkpoint.model
        decoded = decode_fp8(files)
        notes = [note for note in dict.fromkeys((files.note, decoded.note)) if note]
        if model is None:
            config = add_quantization_config(checkpoint.config) if checkpoint.config else {}
            _require_floats(decoded, checkpoint.weights)
            plan = plan_tensors(decoded, recipe)
            plan = _count(replace(plan, notes=tuple(notes)), decoded, decoded.names)
            return cls(files, decoded, tuple(decoded.names), {}, config, plan)
        config = model_config(model)
        reader = decoded if checkpoint.convert is None else checkpoint.convert(decoded)
        expected, tied = list_tensors(model, reader.names)
        is_whole = checkpoint.weights.is_file() and set(expected) <= set(reader.names)
        unused = _find_unused(model, reader) if is_whole else []
        if unused:
            notes.append(
                f"{len(unused)} tensors of the file belong to other models and are left out: "
                f"{list_some(unused, most=4)}."
            )
        require_fit(reader, expected, checkpoint.weights, unused)
        names = tuple(name for name in expected if name not in tied)
        plan = replace(Plan.of_model(model, recipe), notes=tuple(notes))
        plan = _count(plan, reader, names)
        return cls(files, reader, names, tied, config, plan, generation_config(model))

    def require_layers(self) -> None:
        """Raise `RecipeError` if no layer is quantized."""
        if not self.plan.has_work:
            raise RecipeError(
                f"Nothing to quantize: {len(self.plan.layers)} linear layers were found, and all "
                "are kept. `loraq plan` shows why; a rule with `skip = false` overrides."
            )

    def hash_weights(self) -> dict[str, str]:
        """Read every tensor once, and return the hash of each by its name.

        Raises:
            CheckpointError: a weight cannot be quantized (`find_fault`), or a tensor cannot be
                read.
        """
        layers = {job.weight_name: job for job in self.plan.quantized}
        hashes, odd = {}, {}
        for name in self.names:
            job, digest = layers.get(name), hashlib.sha256()
            is_stack = job is not None and job.is_stack
            parts = (
                read_matrices(self.reader, job) if job and is_stack else [self.reader.read(name)]
            )
            for index, part in enumerate(parts):
                if job is None:
                    if found := find_not_finite(part):
                        odd[name] = found
                elif fault := find_fault(part):
                    where = f", expert {index}," if is_stack else ""
                    raise CheckpointError(f"Tensor '{name}'{where} cannot be used: {fault}")
                digest.update(tensor_bytes(part))
            hashes[name] = digest.hexdigest()
        kept_numbers.tell(odd)
        return hashes

    def read_checked(self, name: str, sha256: str) -> Tensor:
        """Return a tensor that has not changed since `hash_weights` read it.

        Raises:
            CheckpointError: it has, or cannot be read.
        """
        tensor = self.reader.read(name)
        if hash_tensor(tensor) != sha256:
            raise CheckpointError(
                f"Tensor '{name}' changed while it was read. Do not modify the source during a run."
            )
        return tensor


@dataclass(frozen=True)
class Origin:
    """What a run reads: one model or several, and what goes along with them."""

    #: By component of a pipeline; of a model alone the name is "".
    sources: dict[str, Source]
    #: Files to copy, by their path in the target: the rest of a pipeline.
    others: dict[str, Path] = field(default_factory=dict)
    #: What of the pipeline is left as it is, or left out: sentences for the user.
    notes: tuple[str, ...] = ()

    @classmethod
    def open(
        cls,
        checkpoints: Mapping[str, Checkpoint],
        recipe: Recipe,
        others: Mapping[str, Path] | None = None,
        notes: tuple[str, ...] = (),
    ) -> "Origin":
        """Check and plan every model, as `Source.open` does; an error names the component."""
        sources = {}
        for component, checkpoint in checkpoints.items():
            with name_component(component, len(checkpoints)):
                sources[component] = Source.open(checkpoint, recipe)
        return cls(sources, dict(others or {}), notes)

    @property
    def plan(self) -> Plan:
        """What the linear layers of all models get."""
        return Plan.join({name: source.plan for name, source in self.sources.items()}, self.notes)

    def with_plans(self, plans: Mapping[str, Plan]) -> "Origin":
        """Return the same with another plan of each model."""
        planned = {name: replace(s, plan=plans[name]) for name, s in self.sources.items()}
        return replace(self, sources=planned)

    def require_layers(self) -> None:
        """Raise `RecipeError` if of some model no layer is quantized."""
        for component, source in self.sources.items():
            with name_component(component, len(self.sources)):
                source.require_layers()


@contextmanager
def name_component(component: str, of: int) -> Iterator[None]:
    """Let an error say which of several models it is about; `of` is how many there are."""
    try:
        yield
    except LoraqError as error:
        if of == 1:
            raise
        raise type(error)(f"Component '{component}': {error}") from error


def list_tensors(model: nn.Module, stored: list[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors a model wants stored, and the names that share one of them.

    A module may stand in two places, or two modules may hold one parameter: then the second names
    may be stored, or not.
    """
    first: dict[int, str] = {}
    expected, tied = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        source = first.setdefault(id(tensor), name)
        if source != name:
            tied[name] = source
        if source == name or name in stored:
            expected[name] = tensor
    return expected, tied


def _count(plan: Plan, reader: TensorReader, names: Sequence[str]) -> Plan:
    """Return the plan that knows the size of the whole model: of all tensors to write."""
    weights = {job.weight_name for job in plan.quantized}
    specs = [
        TensorSpec(reader.dtype(name), reader.shape(name)) for name in names if name not in weights
    ]
    numbers = sum(math.prod(spec.shape) for spec in specs)
    return plan.counting(numbers, sum(spec.nbytes for spec in specs))


def _find_unused(model: nn.Module, reader: TensorReader) -> list[str]:
    """Return the names in a file that holds several models that are of none of this one's modules.

    Names within its modules are its own: if it does not have them, the configuration is another's.
    """
    own = {name.partition(".")[0] for name in model.state_dict()}
    return sorted(name for name in reader.names if name.partition(".")[0] not in own)


def plan_tensors(files: TensorReader, recipe: Recipe) -> Plan:
    """Plan a model of which no module is built.

    Every matrix `….weight` is taken for a linear layer, unless its name is one that only tables
    have.

    Args:
        files: its tensors.
        recipe: what is asked.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name in files.names:
        layer, _, leaf = name.rpartition(".")
        shape = files.shape(name)
        is_matrix = len(shape) in (2, 4) and shape[2:] in ((), (1, 1)) and min(shape) > 0
        if layer and leaf == "weight" and is_matrix and not _TABLE.search(layer):
            shapes[layer] = (shape[0], shape[1])
    convs = {layer for layer in shapes if len(files.shape(f"{layer}.weight")) == 4}
    return Plan.of(shapes, recipe, convs=convs)


def _require_floats(files: TensorReader, weights: Path) -> None:
    for name in files.names:
        dtype = files.dtype(name)
        if dtype not in FLOATS and (
            dtype.startswith("F8") or name.endswith(("weight", "weight_packed"))
        ):
            raise CheckpointError(
                f"'{weights}': tensor '{name}' is {dtype}. Float weights of 16 bits or more "
                "are required."
            )
