"""The contract of all methods, their registry, and the steps that every one of them shares.

A method is a frozen dataclass: its fields are its settings, `solve` is its only job, and `_fit` the
part of it that differs. It sees one matrix, never a module, a file or a model's name. Name, help
text, need of a branch, use of statistics, levels of effort and the prediction for a budget live on
the class, so that a new method is one class: recipes, plans and the command line derive from the
registry.
"""

import hashlib
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from loraq.autocast import without_autocast
from loraq.errors import CalibrationError, FormatError, SchemeError, unknown
from loraq.formats import BlockFormat
from loraq.linalg import frobenius
from loraq.methods.fits import (
    Fit,
    Prepared,
    Stored,
    prepare_weight,
    round_plainly,
)
from loraq.methods.prediction import Prediction, tail_energies
from loraq.options import check_fields
from loraq.packed import LayerSolution, PackedWeight
from loraq.scheme import Branch, Scheme
from loraq.stats import ActivationStats

M = TypeVar("M", bound="type[Method]")

#: Every method by its name; `register` adds one.
METHODS: "dict[str, type[Method]]" = {}


def register(method: M) -> M:
    """Make a class known under its `name`, as a decorator.

    Raises:
        SchemeError: it has no name, another method has this name, or its levels of effort lack
            "default", which recipes take unless they say otherwise.
    """
    if not hasattr(method, "name"):
        raise SchemeError(f"Method class {method.__name__} has no `name`. Give it one.")
    if method.efforts and "default" not in method.efforts:
        raise SchemeError(
            f"Method '{method.name}' has the levels of effort {', '.join(method.efforts)}. One of "
            "them must be 'default'."
        )
    if METHODS.setdefault(method.name, method) is not method:
        raise SchemeError(f"There is a method '{method.name}' already. Choose another name.")
    return method


@dataclass(frozen=True)
class Method(ABC):
    """One weight in, one `LayerSolution` out, which is finite and never worse than plain rounding.

    For that a fit is compared with rounding to nearest (same scale rule, a branch of zeros), by the
    error of the weight, or by the output error with statistics; a fit that is final was compared by
    the method itself. A rotated scheme rounds the rotated weight.

    Fields are plain, as recipes write them: bool, int, float, str, a `Literal` of these, tuples of
    them, or one of these or `None`. Their ranges stand in the annotations, as in `Annotated[int,
    Range(1, 10)]`; a value outside of them is a `SchemeError` when the method is built.
    """

    #: What recipes and the command line call it.
    name: ClassVar[str]
    #: One line of help.
    summary: ClassVar[str]
    #: Whether it fits a branch. Without one, a method that requires it falls back to `rtn`.
    branch: ClassVar[Literal["required", "optional", "none"]] = "required"
    #: What becomes of statistics that are given.
    use_of_stats: ClassVar[Literal["required", "optional", "ignored"]] = "ignored"
    #: Its levels of effort, "default" among them; none if it has just one.
    efforts: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_fields(self, SchemeError, f"method '{self.name}'")

    @classmethod
    def at(cls, effort: str) -> "Method":
        """Return the settings of a level of effort; a method without levels has one for all.

        Raises:
            SchemeError: there is no such level.
        """
        if cls.efforts and effort not in cls.efforts:
            raise SchemeError(unknown("effort", effort, cls.efforts))
        return cls()

    @property
    def passes(self) -> int:
        """How often it goes over the weight, about: what its time is in proportion to."""
        return 1

    @property
    def needs_full_moment(self) -> bool:
        """Whether the method needs E[x xᵀ], not only E[x²]."""
        return False

    def solve(
        self,
        weight: Tensor | Prepared,
        scheme: Scheme,
        *,
        seed: int = 0,
        stats: ActivationStats | None = None,
    ) -> LayerSolution:
        """Return the quantized form of a weight.

        The same weight, scheme, seed, statistics and device give the same bytes.

        Args:
            weight: full-precision weight, rows are output channels; any float dtype. Or what
                `prepare` made of it, whose caller needs the weight itself no longer.
            scheme: formats and rank.
            seed: of everything random inside; see `layer_seed`.
            stats: of the layer's inputs as the float model sees them; see `use_of_stats`.

        Raises:
            CalibrationError: statistics are missing, say too little, or are not of this layer.
            FormatError: a weight is NaN or infinite, fp32 does not hold it, or the formats have no
                scales for it.
            SchemeError: the scheme does not fit the weight or the method.
        """
        begin = time.perf_counter()
        self.check(scheme)
        if not isinstance(weight, Prepared):
            weight = self.prepare(weight, scheme, stats)
        prepared, stats = weight, self._prepare_stats(stats, weight, scheme)
        with without_autocast(prepared.weight.device):
            fit = self._fit(prepared.weight, scheme, seed, stats)
            if (fit.branch is None) is not (scheme.branch is None):
                raise SchemeError(
                    f"Method '{self.name}' returned {'no' if fit.branch is None else 'a'} branch, "
                    f"and the scheme has {'none' if scheme.branch is None else 'one'}. Correct its "
                    "`_fit`."
                )
            best = self._choose(prepared, scheme, fit, stats)
        packed = PackedWeight(scheme, best.main, best.branch, prepared.smooth_factor)
        seconds = time.perf_counter() - begin
        return LayerSolution(packed, best.relative_error, seconds, dict(best.metrics))

    def prepare(
        self, weight: Tensor, scheme: Scheme, stats: ActivationStats | None = None
    ) -> Prepared:
        """Return a weight as `solve` takes it; see `loraq.methods.fits.prepare_weight`."""
        if stats is not None and self.use_of_stats == "ignored":  # but by smoothing
            stats = replace(stats, output_sensitivity=None)
        return prepare_weight(weight, scheme, stats)

    def _choose(
        self, prepared: Prepared, scheme: Scheme, fit: Fit, stats: ActivationStats | None
    ) -> Stored:
        """Return a fit as it is stored, or plain rounding and a branch of zeros if that is better.

        What is compared is the output error with statistics, and the weight's error without. A fit
        that is final stands, unless it cannot be stored.
        """
        try:
            fitted = Stored.of(fit, prepared, scheme, stats)
        except FormatError:
            fitted = None
        if fitted is not None and ((fit.is_final and fitted.is_exact) or fitted.cost == 0):
            return fitted.require_content(prepared, scheme)
        rule = getattr(self, "scale_rule", "search")
        nearest = round_plainly(prepared.weight, scheme, rule)._replace(metrics=fit.metrics)
        plain = Stored.of(nearest, prepared, scheme, stats)
        if fitted is not None and fitted.cost <= plain.cost:
            plain = fitted
        return plain.require_content(prepared, scheme)

    @abstractmethod
    def _fit(
        self,
        weight: Float[Tensor, "out in"],
        scheme: Scheme,
        seed: int,
        stats: ActivationStats | None,
    ) -> Fit:
        """Return main weight and branch for a weight that is checked, transformed and in fp32.

        Statistics are `None` unless the method uses them, and transformed as the weight is.
        """

    def predict(self, weight: Tensor | Prepared, scheme: Scheme, most: int) -> Prediction:
        """Return what branches of rank 0 to `most` are predicted to leave of a weight.

        Args:
            weight: as `solve` takes it.
            scheme: formats; the rank of its branch does not matter as long as it can be solved.
            most: largest rank, at most min(out, in).

        Raises:
            FormatError: a weight is NaN or infinite.
            SchemeError: the scheme does not fit the weight.
        """
        if not isinstance(weight, Prepared):
            weight = prepare_weight(weight, replace(scheme, smoothing=False))
        prepared, exponent = weight.weight, weight.exponent
        self._require_branch(scheme)
        size = frobenius(prepared).item()  # before there is an error as large as the weight
        with without_autocast(prepared.device):
            error = scheme.weight_format.round(prepared, "search")
            torch.sub(prepared, error, out=error)
            shares = self._predict_shares(prepared, error, scheme)[: most + 1]
        left: list[float] = (4.0**exponent * frobenius(error).item() ** 2 * shares).tolist()
        return Prediction(4.0**exponent * size**2, tuple(left))

    def _predict_shares(
        self, weight: Float[Tensor, "out in"], error: Float[Tensor, "out in"], scheme: Scheme
    ) -> Float[Tensor, " ranks"]:
        """Return the share of ‖error‖² that a branch of each rank leaves, from rank 0 on.

        By default the rounding error follows what the branch leaves to round: ‖W‖² outside of the
        leading singular directions.
        """
        return tail_energies(weight)

    def check(self, scheme: Scheme) -> None:
        """Raise unless the method can solve weights of a scheme, judged without any weight.

        Raises:
            FormatError: the method's scale rule is none of the formats'.
            SchemeError: the method has no branch and the scheme has one, or the other way round.
        """
        rule = getattr(self, "scale_rule", None)
        for fmt in (scheme.weight_format, scheme.branch and scheme.branch.weight_format):
            if isinstance(fmt, BlockFormat):
                fmt.scale_rule(rule)
        if self.branch == "required":
            self._require_branch(scheme)
        if self.branch == "none" and scheme.branch is not None:
            raise SchemeError(
                f"Method '{self.name}' has no branch, but the scheme asks for one. Remove the "
                "branch."
            )

    def _require_branch(self, scheme: Scheme) -> Branch:
        if scheme.branch is None:
            raise SchemeError(
                f"Method '{self.name}' fits a low-rank branch, but the scheme has none. Add a "
                "branch, or use 'rtn'."
            )
        return scheme.branch

    def _prepare_stats(
        self, stats: ActivationStats | None, prepared: Prepared, scheme: Scheme
    ) -> ActivationStats | None:
        """Return statistics as the prepared weight sees its inputs, on its device."""
        if stats is None and self.use_of_stats == "required":
            raise CalibrationError(
                f"Method '{self.name}' needs activation statistics. Collect them with "
                "`loraq.collect_stats` and give them as `stats` (`--stats`), or use a method "
                "without data, such as 'loraq'."
            )
        if stats is None or self.use_of_stats == "ignored":
            return None
        stats.require_width(prepared.weight.shape[1])
        if self.needs_full_moment and not stats.is_full:
            raise CalibrationError(
                f"Method '{self.name}' needs full second moments, and the statistics have mean "
                "squares only. Collect them with `second_moment=True` (`loraq stats` without "
                "`--mean-squares`)."
            )
        stats = stats.to(prepared.weight.device).smooth(prepared.smooth_factor)
        return stats.rotate(scheme.rotation)


def layer_seed(seed: int, name: str) -> int:
    """Return the seed of one layer, from the recipe's seed and the layer's name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
