"""What a layer gets: work to do, or that it stays as it is."""

import math
from dataclasses import dataclass, replace

from loraq.errors import LoraqError, SchemeError
from loraq.methods import RTN, Method, layer_seed
from loraq.recipe import Recipe
from loraq.scheme import Scheme


@dataclass(frozen=True)
class LayerJob:
    """A layer that is quantized, or a stack of experts: all that is needed but the weight."""

    #: Dotted name in the model.
    name: str
    #: (out, in), or (experts, out, in).
    shape: tuple[int, ...]
    #: The scheme with its rank settled.
    scheme: Scheme
    #: What solves it.
    method: Method
    #: From which, with the name, the seed of everything random in it follows.
    recipe_seed: int
    #: Why it gets something else than the recipe's scheme; empty if it gets just that.
    reason: str = ""
    #: Whether the budget settled the rank, and not the recipe itself.
    sized: bool = False
    #: Whether the rules keep it out of the recipe's scheme, and it is stored in eight bits.
    is_kept: bool = False
    #: Whether the model has a stack of experts as (experts, in, out).
    transposed: bool = False

    @classmethod
    def of(  # noqa: PLR0913 (options are keyword-only)
        cls,
        name: str,
        shape: tuple[int, ...],
        scheme: Scheme,
        recipe: Recipe,
        *,
        reason: str = "",
        sized: bool = False,
        is_kept: bool = False,
    ) -> "LayerJob":
        """Return the job of a layer whose scheme is settled, with the recipe's method and seed.

        A layer that is kept is rounded to nearest, whatever the method.

        Raises:
            SchemeError: the method cannot solve this scheme; the message carries the layer's name.
        """
        method = RTN() if is_kept else recipe.solver(scheme)
        try:
            method.check(scheme)
        except LoraqError as error:
            raise SchemeError(f"Layer '{name}': {error}") from error
        return cls(name, shape, scheme, method, recipe.seed, reason, sized, is_kept)

    @property
    def is_stack(self) -> bool:
        """Whether it is a stack of experts, which one parameter holds."""
        return len(self.shape) == 3

    @property
    def uses_stats(self) -> bool:
        """Whether statistics of its inputs change what it becomes, where there are any."""
        return self.needs_stats or self.method.use_of_stats == "optional"

    @property
    def needs_stats(self) -> bool:
        """Whether it cannot be solved without statistics of its inputs."""
        return self.scheme.smoothing or self.method.use_of_stats == "required"

    @property
    def matrix(self) -> tuple[int, int]:
        """(out, in) of the layer, or of each expert."""
        return self.shape[-2], self.shape[-1]

    @property
    def weight_name(self) -> str:
        """Name of the float tensor."""
        return self.name if self.is_stack else f"{self.name}.weight"

    def of_expert(self, index: int) -> "LayerJob":
        """Return the job of one expert of a stack: that of a linear layer with its number."""
        return replace(self, name=f"{self.name}.{index}", shape=self.matrix, transposed=False)

    @property
    def seed(self) -> int:
        """Of everything random in it."""
        return layer_seed(self.recipe_seed, self.name)

    @property
    def cost(self) -> int:
        """What its time is about in proportion to, whatever the method."""
        return math.prod(self.shape) * self.method.passes

    @property
    def nbytes(self) -> int:
        """Bytes of the weight after the run."""
        return self.scheme.nbytes(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each element of the weight after the run."""
        return 8 * self.nbytes / math.prod(self.shape)


@dataclass(frozen=True)
class KeptLayer:
    """A linear layer, or a stack of experts, that stays as it is."""

    #: Dotted name in the model.
    name: str
    #: (out, in), or (experts, out, in).
    shape: tuple[int, ...]
    #: Why.
    reason: str

    @property
    def nbytes(self) -> int:
        """Bytes of the weight in 16 bits."""
        return 2 * math.prod(self.shape)


@dataclass(frozen=True)
class OtherWeight:
    """A large weight that stays as it is because no linear layer holds it."""

    #: Dotted name of the parameter.
    name: str
    shape: tuple[int, ...]
    #: What it is instead.
    reason: str

    @property
    def nbytes(self) -> int:
        """Bytes of the weight in 16 bits."""
        return 2 * math.prod(self.shape)
