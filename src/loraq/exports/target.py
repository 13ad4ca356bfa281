"""What a target is: what it says of itself, what it holds, and how it writes and reads a layer."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from loraq.checkpoint.configuration import weights_stem
from loraq.exports.factors import explain_rounding
from loraq.exports.layer import Decoded, Head, Layer, Specs, Tensors
from loraq.exports.source import ExportSource
from loraq.safetensors.header import DTYPE_NAMES, DTYPES, TensorSpec
from loraq.safetensors.layout import ShardLayout
from loraq.targets import Limits, limits_of, recipes_of

#: Python that loads a folder of diffusers.
LOAD_FOLDER = (
    "import diffusers\nimport torch\n\n"
    'model = diffusers.{model_class}.from_pretrained("{folder}", torch_dtype=torch.{dtype})'
)
#: What is the same number where a branch is floats of 16 bits.
EXACT_IN_16_BITS = "codes and scales; branches of bf16, MX formats and NVFP4"


@dataclass(frozen=True)
class BranchFile:
    """A file with the branches of all layers, which is loaded as a LoRA."""

    #: Its name.
    name: str
    #: What the loader calls the model, in front of each layer's name.
    prefix: str
    #: The lines that load it, behind those that load the model.
    load: str
    #: What goes wrong with it without an error.
    traps: tuple[str, ...]


@dataclass(frozen=True)
class About:
    """A row of the table of targets."""

    #: As `--to` takes it.
    name: str
    #: Programs that load it.
    loaded_by: str
    #: Formats and layers that it holds.
    holds: str
    #: What of them is bit for bit the same, and what is rounded.
    exact: str
    #: Activations that run there.
    activations: str
    #: How the files are checked, by whose code.
    verified: str
    #: What nobody has run.
    unverified: str
    #: Python that loads it; `{folder}`, `{model_class}` and `{dtype}` are filled in.
    load: str
    #: What goes wrong there without an error.
    traps: tuple[str, ...] = ()
    #: The file that the branch has of its own, for most models; `None` if it has none.
    branch_file: BranchFile | None = None

    @property
    def recipes(self) -> tuple[str, ...]:
        """Names of the recipes that are solved for it, the one to try first at the top."""
        return tuple(recipe.name for recipe in recipes_of(self.name))


@dataclass(frozen=True)
class Job:
    """One export: the model, as far as it is known without its bytes, and the options."""

    #: Every quantized matrix, one that shares bytes under each of its names; no stacked experts.
    heads: tuple[Head, ...]
    #: The model on the meta device, its quantized layers empty.
    model: nn.Module
    #: Content of `config.json`, without its `quantization_config`.
    config: Mapping[str, Any]
    #: Kind of each module that has a float weight of two or more axes, by its name.
    floats: Mapping[str, str]
    #: Reads the block scales of a main weight, in fp32, without a global scale.
    read_scale: Callable[[Head], Tensor]
    #: Dtype of all floats; `None` leaves those of the source as they are.
    dtype: torch.dtype | None = None
    #: Whether branches are filled up with zeros where a target needs one rank.
    pads_rank: bool = False

    @property
    def model_class(self) -> str:
        """Class of the model."""
        return str(self.config.get("_class_name", ""))

    @property
    def new_dtype(self) -> torch.dtype:
        """Dtype of what is written as floats anew: factors and dense weights."""
        return self.dtype or torch.bfloat16


class Layout(Protocol):
    """Where every byte of a set of files will stand; `ShardLayout` is one."""

    @property
    def files(self) -> list[str]:
        """Names of all files."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        ...

    def allocate(self, folder: Path) -> None:
        """Make the files at their final size."""
        ...

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors at their places."""
        ...


class Target:
    """Base of the targets: a folder of diffusers in which some layers are packed another way.

    An instance is settled for one job: format and rank that hold for the whole file are known.
    """

    about: ClassVar[About]
    #: Dtypes that it may hold floats in. A single one is that of every float there.
    dtypes: ClassVar[tuple[str, ...]] = ("bfloat16", "float16", "float32")
    #: Name of the one weight file; "" for shards in diffusers' names.
    one_file: ClassVar[str] = ""
    #: Whether it holds layers whose inputs are rotated or smoothed first.
    takes_transforms: ClassVar[bool] = False
    #: Whether every layer becomes dense on purpose.
    is_dense: ClassVar[bool] = False

    def __init__(self, job: Job) -> None:
        """Settle what holds for the whole file.

        Args:
            job: the model and the options.

        Raises:
            ExportError: the target needs what the layers do not have; the message names the option
                or the recipe that helps.
        """
        self.job = job

    @property
    def limits(self) -> Limits:
        """What it asks of layers, whatever their format."""
        return limits_of(self.about.name)

    @property
    def branch_file(self) -> BranchFile | None:
        """The file that the branch of this model has of its own, if it has one."""
        return None

    @cached_property
    def held(self) -> tuple[Head, ...]:
        """The layers that are not dense."""
        return tuple(head for head in self.job.heads if not self.why_dense(head))

    @property
    def within(self) -> list[Head]:
        """The layers that are within its limits."""
        return [head for head in self.job.heads if not head.explain_misfit(self.limits)]

    @classmethod
    def see(cls, source: ExportSource) -> ExportSource:
        """Return a source as the target sees it: under other names, some layers put together.

        Args:
            source: a model of a class within the limits.
        """
        return source

    def refuses(self, head: Head) -> str:
        """Return why a layer within the limits must be dense; "" if the target holds it."""
        raise NotImplementedError

    def why_dense(self, head: Head) -> str:
        """Return why a layer or a stack of experts is dense; "" if the target holds it."""
        if not self.is_dense:
            if head.main is not None and head.main.of_columns:
                return f"{self.about.name} has no scale of each column"
            if why := head.explain_misfit(self.limits):
                return why
        return self.refuses(head)

    def explain_rounding(self, head: Head) -> str:
        """Return what of a layer is rounded, as far as formats say; "" for nothing."""
        return explain_rounding(head, self.job.new_dtype)

    def specs(self, head: Head) -> Specs:
        """Return the tensors of a layer in the weight file."""
        raise NotImplementedError

    def branch_specs(self, head: Head) -> Specs:
        """Return the tensors of a layer in the LoRA file."""
        return {}

    def all_specs(self, head: Head) -> Specs:
        """Return the tensors of a layer in both files."""
        return self.specs(head) | self.branch_specs(head)

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        """Return the tensors of `specs` and `branch_specs`."""
        raise NotImplementedError

    def decode(self, tensors: Tensors, head: Head) -> Decoded:
        """Return what the target computes with, by its own formulas, from what was written."""
        raise NotImplementedError

    def notes(self) -> list[str]:
        """Return what a user should know of this model in this target."""
        return []

    def lay_bias(self, head: Head, bias: Tensor) -> Tensor:
        """Return the bias of a layer that the target holds as it is stored there."""
        return bias

    def kept_dtype(self, name: str, dtype: str, shape: tuple[int, ...]) -> str:
        """Return the dtype, in safetensors' notation, of a tensor that stays as it is."""
        is_cast = self.job.dtype is not None and DTYPES[dtype].is_floating_point
        return DTYPE_NAMES[self.job.new_dtype] if is_cast else dtype

    def dense_spec(self, head: Head) -> TensorSpec:
        """Return dtype and shape of the weight of a layer that the target does not hold."""
        return TensorSpec(DTYPE_NAMES[self.job.new_dtype], head.dense_shape)

    def config(self) -> dict[str, Any]:
        """Return `config.json`."""
        return dict(self.job.config)

    def metadata(self, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
        """Return text for the header of the weight file."""
        return {}

    def texts(self, folder: str) -> dict[str, str]:
        """Return further files beside the weights; `folder` is the name of theirs."""
        return {}

    def layout(self, specs: Specs, shard_bytes: int) -> Layout:
        """Lay out the weight file or files."""
        stem = self.one_file.removesuffix(".safetensors") or weights_stem(dict(self.job.config))
        largest = float("inf") if self.one_file else shard_bytes
        return ShardLayout.of(specs, stem, largest, self.metadata(specs))


def most_common(heads: Sequence[Head], key: Callable[[Head], Any]) -> Any:
    """Return the value that most weights of some layers have; `None` for no layers."""
    counted = Counter[Any]()
    for head in heads:
        counted[key(head)] += head.numel
    return counted.most_common(1)[0][0] if counted else None
