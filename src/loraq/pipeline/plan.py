"""What a run would do, settled and checked before any long work starts."""

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from loraq.errors import LayerError
from loraq.layers import is_linear, matrix_shapes, other_weights
from loraq.recipe import Recipe
from loraq.scheme import Scheme

#: Weights that are in no linear layer are listed if they, with their like in the other blocks, are
#: more than this share of the model's parameters.
SIGNIFICANT = 0.01


_LOGGER = logging.getLogger("loraq")


@dataclass(frozen=True)
class LayerPlan:
    """What one linear layer gets."""

    #: Dotted name in the model.
    name: str
    #: (out, in).
    shape: tuple[int, int]
    #: The scheme with its rank settled, or `None` if the layer stays as it is.
    scheme: Scheme | None
    #: Why the layer stays as it is or gets something else than the recipe's scheme; empty if it
    #: gets just that.
    reason: str = ""
    #: Whether the budget settled the rank, and not the recipe itself.
    sized: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the weight after the run; a layer that stays is counted at 16 bits."""
        return self.scheme.nbytes(self.shape) if self.scheme else 2 * math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each element of the weight after the run."""
        return 8 * self.nbytes / math.prod(self.shape)


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


@dataclass(frozen=True)
class Plan:
    """What every linear layer of a model gets, in the order of the model."""

    layers: tuple[LayerPlan, ...]
    #: Weights of more than `SIGNIFICANT` of the model that cannot be quantized; empty if only
    #: shapes were known.
    others: tuple[OtherWeight, ...] = ()

    @classmethod
    def of(
        cls, shapes: Mapping[str, tuple[int, int]], recipe: Recipe, model_class: str = ""
    ) -> "Plan":
        """Settle the scheme of every layer.

        A rule of the recipe that matches none is warned of in the log, and branches larger than
        their main weight are.

        Args:
            shapes: (out, in) of every linear layer by dotted name.
            recipe: what is asked.
            model_class: class name of the model, which selects the rules of its families.

        Raises:
            SchemeError: a layer cannot be quantized as asked; the message carries its name.
        """
        layers = []
        for name, shape in shapes.items():
            scheme = recipe.scheme_for(name, shape, model_class)
            rule = recipe.rule_for(name, model_class)
            reason = (rule.reason or f"rule '{rule.match}'") if rule else ""
            asked = recipe.requested_scheme(name, model_class)
            sized = asked is not None and asked.branch is not None and asked.branch.rank == 0
            layers.append(LayerPlan(name, shape, scheme, reason, sized))
        for rule in recipe.rules:
            if not any(fnmatchcase(name, rule.match) for name in shapes):
                _LOGGER.warning(
                    "The recipe's rule '%s' matches no linear layer. Is its pattern right?",
                    rule.match,
                )
        planned = cls(tuple(layers))
        if large := [
            layer for layer in planned.quantized if layer.sized and _has_large_branch(layer)
        ]:
            _LOGGER.warning(
                "The budget of %s is large for narrow layers: in %d of %d the branch takes more "
                "bytes than the main weight, %.2f bits per weight in '%s'. A smaller budget, such "
                "as '5' bits per weight, stores less.",
                recipe.budget,
                len(large),
                len(planned.quantized),
                large[0].bits_per_weight,
                large[0].name,
            )
        return planned

    @classmethod
    def of_model(cls, model: nn.Module, recipe: Recipe) -> "Plan":
        """Settle the scheme of every layer of a module, and find the large weights that are in no linear layer.

        The module may be on the meta device. Raises `SchemeError` as `of`, and `LayerError` for a
        module that is itself a linear layer.
        """
        if is_linear(model):
            raise LayerError(
                f"The module is itself a linear layer ({type(model).__name__}), which cannot be "
                f"replaced in place. "
                "Wrap it, as in `torch.nn.Sequential(layer)`, or use "
                "`loraq.quantize_weight(layer.weight, recipe)`."
            )
        found = other_weights(model)
        sizes: Counter[str] = Counter()
        for name, (shape, _) in found.items():
            sizes[_family(name)] += math.prod(shape)
        least = SIGNIFICANT * sum(parameter.numel() for parameter in model.parameters())
        others = tuple(
            OtherWeight(name, shape, f"not a linear layer, but {kind}")
            for name, (shape, kind) in found.items()
            if sizes[_family(name)] > least
        )
        return replace(cls.of(matrix_shapes(model), recipe, type(model).__name__), others=others)

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        """The layers that are quantized."""
        return tuple(layer for layer in self.layers if layer.scheme is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all linear weights after the run."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def nbytes_bf16(self) -> int:
        """Bytes of all linear weights in bf16."""
        return sum(2 * math.prod(layer.shape) for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Mean stored bits for each weight of the quantized layers."""
        weights = sum(math.prod(layer.shape) for layer in self.quantized)
        return 8 * sum(layer.nbytes for layer in self.quantized) / weights if weights else 0.0


def _has_large_branch(layer: LayerPlan) -> bool:
    return layer.scheme is not None and layer.nbytes > 2 * layer.scheme.weight_format.nbytes(
        layer.shape
    )


def _family(name: str) -> str:
    """The name without the numbers of blocks."""
    return re.sub(r"\d+", "*", name)
