"""What a run would do, settled and checked before any long work starts."""

import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from loraq.errors import LayerError
from loraq.families import known_class
from loraq.layers import (
    bare_model,
    find_stacks,
    is_linear,
    linear_layers,
    matrix_shapes,
    other_weights,
    require_bare,
    tied_layers,
)
from loraq.pipeline.counting import ComponentSize, count_beside
from loraq.pipeline.fitting import TargetFit, fit_to_target, require_class, warn_of_cost
from loraq.pipeline.jobs import KeptLayer, LayerJob, OtherWeight
from loraq.recipe import Recipe

#: Weights outside of linear layers are listed if they, together with the same weight of the other
#: transformer blocks, are more than this share of the model's parameters.
SIGNIFICANT = 0.01

_LOGGER = logging.getLogger("loraq")


@dataclass(frozen=True)
class Plan:
    """What every linear layer of a model gets, in the order of the model."""

    layers: tuple[LayerJob | KeptLayer, ...]
    #: Weights of more than `SIGNIFICANT` of the model that cannot be quantized; empty if only
    #: shapes were known.
    others: tuple[OtherWeight, ...] = ()
    #: Numbers that the whole model stores, in linear layers and elsewhere; 0 if only the shapes of
    #: the linear layers were known.
    parameters: int = 0
    #: Bytes of all that is stored beside the weights of the quantized layers: layers that stay
    #: floats, embeddings, norms, biases.
    other_nbytes: int = 0
    #: What of the source was chosen, decoded or left out: sentences for the user.
    notes: tuple[str, ...] = ()
    #: Of a pipeline of which several models are quantized: the plan of each, by component.
    components: Mapping[str, "Plan"] = field(default_factory=dict)
    #: What the target of the recipe costs; `None` without one, and of several models.
    target: TargetFit | None = None
    #: Of a pipeline that is planned and not quantized: all its models.
    sizes: tuple[ComponentSize, ...] = field(default=(), compare=False)

    @classmethod
    def join(cls, plans: Mapping[str, "Plan"], notes: tuple[str, ...] = ()) -> "Plan":
        """Return the plan of several models: a layer's name begins with `component/` then.

        Args:
            plans: by component; that of a single model is returned as it is, with the notes.
            notes: what is to be said of all of them.
        """
        if len(plans) == 1:
            (plan,) = plans.values()
            return replace(plan, notes=(*plan.notes, *notes))
        layers, others, of_parts = [], [], []
        for component, plan in plans.items():
            layers += [replace(each, name=f"{component}/{each.name}") for each in plan.layers]
            others += [replace(each, name=f"{component}/{each.name}") for each in plan.others]
            of_parts += [f"{component}: {note}" for note in plan.notes]
        return cls(
            tuple(layers),
            tuple(others),
            sum(plan.parameters for plan in plans.values()),
            sum(plan.other_nbytes for plan in plans.values()),
            (*of_parts, *notes),
            dict(plans),
        )

    @classmethod
    def of(
        cls,
        shapes: Mapping[str, tuple[int, ...]],
        recipe: Recipe,
        model_class: str = "",
        inner_models: Mapping[str, str] | None = None,
        tied: Mapping[str, str] | None = None,
        convs: Collection[str] = (),
    ) -> "Plan":
        """Settle the scheme of every layer.

        A rule of the recipe that matches none is warned of in the log, and branches larger than
        their main weight are.

        Args:
            shapes: (out, in) of every linear layer by dotted name, (experts, out, in) of stacks.
            recipe: what is asked.
            model_class: class name of the model, which selects the rules of its families.
            inner_models: class names of models that the model holds, by their dotted names; their
                layers get what they get in a model that stands alone.
            tied: layers that share their weight, and with what; they stay whatever a rule says.
            convs: names of the layers that are 1×1 convolutions.

        Raises:
            SchemeError: a layer cannot be quantized as asked; the message carries its name. Or the
                recipe's target holds none of the layers.
        """
        models, tied = {"": model_class, **(inner_models or {})}, tied or {}
        layers = _settle(shapes, recipe, models, tied)
        fit = None
        if recipe.target:
            alone = _settle(shapes, replace(recipe, target=""), models, tied)
            layers, fit = fit_to_target(layers, alone, recipe, convs)
            warn_of_cost(fit)
        for rule in recipe.rules:
            if not any(map(rule.matches, shapes)):
                _LOGGER.warning(
                    "The recipe's rule '%s' matches no linear layer of %s. Is its pattern right?",
                    rule.match,
                    model_class or "the model",
                )
        planned = cls(tuple(layers), target=fit)
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
        """Settle the scheme of every layer of a module, and find large weights outside of them.

        The module may be on the meta device, or wrapped as a whole (`bare_model`); the rules of its
        class are those of the class that it is derived from. Raises `SchemeError` as `of`, and
        `LayerError` for a module that is itself a linear layer, or is not bare; `RecipeError` for a
        class that the recipe's target does not take.
        """
        model = bare_model(model)
        if is_linear(model):
            raise LayerError(
                f"The module is itself a linear layer ({type(model).__name__}), which cannot be "
                "replaced in place. Wrap it, as in `torch.nn.Sequential(layer)`, or use "
                "`loraq.quantize_weight(layer.weight, recipe)`."
            )
        require_bare(model)
        require_class(recipe, type(model))
        found = other_weights(model)
        sizes: Counter[str] = Counter()
        for name, (shape, _) in found.items():
            sizes[_without_numbers(name)] += math.prod(shape)
        least = SIGNIFICANT * sum(parameter.numel() for parameter in model.parameters())
        others = tuple(
            OtherWeight(name, shape, f"not a linear layer, but {kind}")
            for name, (shape, kind) in found.items()
            if sizes[_without_numbers(name)] > least
        )
        model_class, *inner = _find_models(model).items()
        shapes, tied = matrix_shapes(model), tied_layers(model)
        convs = {n for n, each in linear_layers(model).items() if isinstance(each, nn.Conv2d)}
        planned = cls.of(shapes, recipe, model_class[1], dict(inner), tied, convs)
        transposed = {name for name, stack in find_stacks(model).items() if stack.transposed}
        layers = tuple(
            replace(layer, transposed=True)
            if isinstance(layer, LayerJob) and layer.name in transposed
            else layer
            for layer in planned.layers
        )
        planned = replace(planned, layers=layers, others=others)
        return planned.counting(
            *count_beside(model, [job.weight_name for job in planned.quantized])
        )

    def counting(self, numbers: int, nbytes: int) -> "Plan":
        """Return the plan that knows what is stored beside the weights of the quantized layers.

        Args:
            numbers: how many.
            nbytes: that they take.
        """
        packed = sum(math.prod(job.shape) for job in self.quantized)
        return replace(self, parameters=numbers + packed, other_nbytes=nbytes)

    @property
    def quantized(self) -> tuple[LayerJob, ...]:
        """The layers that are stored in packed form, those that are kept in eight bits too."""
        return tuple(layer for layer in self.layers if isinstance(layer, LayerJob))

    @property
    def kept(self) -> tuple[KeptLayer, ...]:
        """The layers that stay floats."""
        return tuple(layer for layer in self.layers if isinstance(layer, KeptLayer))

    @property
    def kept_in_8_bits(self) -> tuple[LayerJob, ...]:
        """The layers that the rules keep out of the scheme, stored in eight bits."""
        return tuple(job for job in self.quantized if job.is_kept)

    @property
    def has_work(self) -> bool:
        """Whether any layer gets the recipe's scheme."""
        return len(self.quantized) > len(self.kept_in_8_bits)

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
        """Mean stored bits for each weight of the layers that have the recipe's scheme."""
        jobs = [job for job in self.quantized if not job.is_kept]
        weights = sum(math.prod(job.shape) for job in jobs)
        return 8 * sum(job.nbytes for job in jobs) / weights if weights else 0.0

    @property
    def model_nbytes(self) -> int:
        """Bytes of all that the model stores after the run."""
        return self.other_nbytes + sum(job.nbytes for job in self.quantized)

    @property
    def effective_bits(self) -> float:
        """Stored bits for each parameter of the whole model; 0 if its parameters are not known."""
        return 8 * self.model_nbytes / self.parameters if self.parameters else 0.0


def _find_models(model: nn.Module) -> dict[str, str]:
    """Return the class of a module, and of the models that it holds, by their dotted names.

    A model is what a family names, or what can be saved alone; the outermost one counts.
    """
    found = {"": _model_class(model) or type(model).__name__}
    if not _model_class(model):
        for name, module in model.named_modules():
            is_inside = any(name.startswith(f"{outer}.") for outer in found if outer)
            if name and not is_inside and (kind := _model_class(module)):
                found[name] = kind
    return found


def _model_class(module: nn.Module) -> str:
    """Return the class of a model by which its rules are found, or "" for a part of one."""
    bases = [base.__name__ for base in type(module).__mro__]
    return known_class(bases) or (bases[0] if hasattr(module, "save_pretrained") else "")


def _settle(
    shapes: Mapping[str, tuple[int, ...]],
    recipe: Recipe,
    models: Mapping[str, str],
    tied: Mapping[str, str],
) -> list[LayerJob | KeptLayer]:
    """Settle the scheme of every layer by itself; `models` has the model's own class under ""."""
    layers: list[LayerJob | KeptLayer] = []
    for name, shape in shapes.items():
        if name in tied:
            layers.append(KeptLayer(name, shape, f"shares its weight with '{tied[name]}'"))
            continue
        place = next((place for place in models if place and name.startswith(f"{place}.")), "")
        within = f"{place}." if place else ""
        layers.append(_plan_layer(name, shape, recipe, models[place], within))
    return layers


def _plan_layer(
    name: str, shape: tuple[int, ...], recipe: Recipe, model_class: str, within: str
) -> LayerJob | KeptLayer:
    rule = recipe.rule_for(name, model_class, within)
    reason = (rule.reason or f"rule '{rule.match}'") if rule else ""
    scheme = recipe.scheme_for(name, (shape[-2], shape[-1]), model_class, within)
    requested = recipe.requested_scheme(name, model_class, within)
    if scheme is None or requested is None:
        why = "" if requested is None else "; eight bits would store no less"
        return KeptLayer(name, shape, reason + why)
    if len(shape) > 2:  # nobody counts the inputs of stacked experts
        scheme = replace(scheme, smoothing=False)
    sized = requested.branch is not None and requested.branch.rank == 0
    is_kept = recipe.keeps(name, model_class, within)
    return LayerJob.of(name, shape, scheme, recipe, reason=reason, sized=sized, is_kept=is_kept)


def _has_large_branch(job: LayerJob) -> bool:
    main = job.scheme.weight_format.nbytes(job.matrix)
    return job.scheme.nbytes(job.matrix) > 2 * main


def _without_numbers(name: str) -> str:
    """Return the name of a layer in all transformer blocks: digits replaced."""
    return re.sub(r"\d+", "*", name)
