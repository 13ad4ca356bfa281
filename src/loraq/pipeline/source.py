"""What is quantized: a float checkpoint, its tensors checked, its layers planned."""

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loraq.checkpoint.fit import require_fit
from loraq.checkpoint.links import find_files
from loraq.checkpoint.model import add_quantization_config, model_config
from loraq.errors import CheckpointError, RecipeError, list_some
from loraq.formats.faults import find_fault
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


#: What the name or the class of a component contains that denoises: it is worth quantizing.
DENOISERS = ("transformer", "unet")


@dataclass(frozen=True)
class Checkpoint:
    """Where the parts of a float checkpoint are; nothing of its weights is read yet."""

    #: What goes along as a whole: a pipeline's folder, or the transformer itself.
    root: Path
    #: A folder of shards, or one file.
    weights: Path
    #: Content of the configuration; empty for none.
    config: dict[str, Any]
    #: The model on the meta device, or `None` if the configuration names none.
    model: nn.Module | None = None
    #: Reads an original layout under the names of the model.
    convert: Callable[[ShardReader | Fp8Reader], TensorReader] | None = None
    #: Which of several copies of the weights is read, as `select_weights`.
    variant: str | None = None
    #: Names of its linear layers, where the configuration names another library's class.
    linear: frozenset[str] | None = None

    @property
    def component(self) -> str:
        """Name of the transformer's folder in a pipeline, or ""."""
        return self.weights.name if (self.root / "model_index.json").is_file() else ""

    def find_others(self) -> dict[str, Path]:
        """Return the files of a pipeline's other components by their path in it.

        Raises:
            CheckpointError: something there is not a file of the pipeline's own.
        """
        return find_files(self.root, without=self.component) if self.component else {}


@dataclass(frozen=True)
class Source:
    """A float checkpoint: its tensors, checked against its configuration, and what goes along."""

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
    #: Files to copy, by their path in the target: the other components of a pipeline.
    others: dict[str, Path] = field(default_factory=dict)
    #: Where the transformer goes in the target: a folder's name, or "" for the target itself.
    component: str = ""

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
            plan = plan_tensors(decoded, recipe, checkpoint.linear)
            plan = _count(replace(plan, notes=tuple(notes)), decoded, decoded.names)
            return cls(files, decoded, tuple(decoded.names), {}, config, plan)
        config = model_config(model)
        reader: TensorReader = decoded
        expected, tied = list_tensors(model, decoded.names)
        is_file = checkpoint.weights.is_file()
        if is_file and checkpoint.convert is not None and not set(expected) <= set(decoded.names):
            reader = checkpoint.convert(decoded)
            expected, tied = list_tensors(model, reader.names)
        is_whole = is_file and set(expected) <= set(reader.names)
        unused = _find_unused(model, reader) if is_whole else []
        if unused:
            notes.append(
                f"{len(unused)} tensors of the file belong to other models and are left out: "
                f"{list_some(unused, most=4)}."
            )
        require_fit(reader, expected, checkpoint.weights, unused)
        names = tuple(name for name in expected if name not in tied)
        others, plan = checkpoint.find_others(), Plan.of_model(model, recipe)
        if left := _find_denoisers(others):
            notes.append(
                f"Only '{checkpoint.component}' is quantized; {list_some(left)} of the pipeline "
                "stay as they are. Give their folders to quantize each by itself."
            )
        plan = _count(replace(plan, notes=tuple(notes)), reader, names)
        return cls(files, reader, names, tied, config, plan, others, checkpoint.component)

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
            CheckpointError: a weight cannot be used (`find_fault`), or a tensor cannot be read.
        """
        layers = {job.weight_name: job for job in self.plan.quantized}
        hashes = {}
        for name in self.names:
            job, digest = layers.get(name), hashlib.sha256()
            is_stack = job is not None and job.is_stack
            parts = (
                read_matrices(self.reader, job) if job and is_stack else [self.reader.read(name)]
            )
            for index, part in enumerate(parts):
                if fault := find_fault(part, is_kept=job is None):
                    where = f", expert {index}," if is_stack else ""
                    raise CheckpointError(f"Tensor '{name}'{where} cannot be used: {fault}")
                digest.update(tensor_bytes(part))
            hashes[name] = digest.hexdigest()
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


def list_tensors(model: nn.Module, stored: list[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors a model wants stored, and the names that share one of them.

    A module may stand in two places: then its second names may be stored, or not.
    """
    owners = dict(model.named_modules(remove_duplicate=False))
    first: dict[tuple[int, str], str] = {}
    expected, tied = {}, {}
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        source = first.setdefault((id(owners[owner]), leaf), name)
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


def _find_denoisers(others: dict[str, Path]) -> list[str]:
    """Return the components among a pipeline's other files that could be quantized as well."""
    folders = {name.partition("/")[0] for name in others if name.endswith("/config.json")}
    return sorted(name for name in folders if any(word in name for word in DENOISERS))


def _find_unused(model: nn.Module, reader: TensorReader) -> list[str]:
    """Return the names in a file that holds several models that are of none of this one's modules.

    Names within its modules are its own: if it does not have them, the configuration is another's.
    """
    own = {name.partition(".")[0] for name in model.state_dict()}
    return sorted(name for name in reader.names if name.partition(".")[0] not in own)


def plan_tensors(files: TensorReader, recipe: Recipe, linear: frozenset[str] | None = None) -> Plan:
    """Plan a model of which no module is built.

    Args:
        files: its tensors.
        recipe: what is asked.
        linear: names of its linear layers; where nobody knows them, every matrix `….weight` is
            taken for one, unless its name is one that only tables have.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name in files.names:
        layer, _, leaf = name.rpartition(".")
        shape = files.shape(name)
        is_matrix = len(shape) in (2, 4) and shape[2:] in ((), (1, 1)) and min(shape) > 0
        is_known = layer in linear if linear is not None else not _TABLE.search(layer)
        if layer and leaf == "weight" and is_matrix and is_known:
            shapes[layer] = (shape[0], shape[1])
    return Plan.of(shapes, recipe)


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
