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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from loraq.errors import CalibrationError, FormatError, SchemeError, unknown
from loraq.formats import QTensor
from loraq.formats.block import require_finite
from loraq.linalg import frobenius
from loraq.methods.prediction import Prediction, tail_energies
from loraq.packed import LayerSolution, LowRankBranch, PackedWeight
from loraq.scheme import Branch, Scheme
from loraq.stats import ActivationStats
from loraq.transforms import rotate

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


class Fit(NamedTuple):
    """What a method makes of a prepared weight."""

    #: The main weight, (out, in).
    main: QTensor
    branch: LowRankBranch | None = None
    #: What else was measured, by name.
    metrics: Mapping[str, float] = {}


@dataclass(frozen=True)
class Method(ABC):
    """One weight in, one `LayerSolution` out.

    Fields are plain, as recipes write them: bool, int, float or str, or one of these or `None`.
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
    def needs_full_moment(self) -> bool:
        """Whether the method needs E[x xᵀ], not only E[x²]."""
        return False

    def solve(
        self,
        weight: Tensor,
        scheme: Scheme,
        *,
        seed: int = 0,
        stats: ActivationStats | None = None,
    ) -> LayerSolution:
        """Return the quantized form of a weight.

        The same weight, scheme, seed, statistics and device give the same bytes.

        Args:
            weight: full-precision weight, rows are output channels; any float dtype.
            scheme: formats and rank.
            seed: of everything random inside; see `layer_seed`.
            stats: of the layer's inputs as the float model sees them; see `use_of_stats`.

        Raises:
            CalibrationError: statistics are missing, say too little, or are not of this layer.
            FormatError: a weight is NaN or infinite.
            SchemeError: the scheme does not fit the weight or the method.
        """
        begin = time.perf_counter()
        self._check_branch(scheme)
        weight = prepare_weight(weight, scheme)
        stats = self._prepare_stats(stats, weight, scheme)
        main, branch, metrics = self._fit(weight, scheme, seed, stats)
        if (branch is None) is not (scheme.branch is None):
            raise SchemeError(
                f"Method '{self.name}' returned {'no' if branch is None else 'a'} branch, and the "
                f"scheme has {'none' if scheme.branch is None else 'one'}. Correct its `_fit`."
            )
        # As the prepared weight is rotated, so is what is compared with it.
        error = _error_of(weight, main, branch)
        relative_error = frobenius(error).item() / (frobenius(weight).item() or 1.0)
        packed, seconds = PackedWeight(scheme, main, branch), time.perf_counter() - begin
        return LayerSolution(packed, relative_error, seconds, dict(metrics))

    @abstractmethod
    def _fit(
        self,
        weight: Float[Tensor, "out in"],
        scheme: Scheme,
        seed: int,
        stats: ActivationStats | None,
    ) -> Fit:
        """Return main weight and branch for a weight that is checked, rotated and in fp32.

        Statistics are `None` unless the method uses them, and rotated as the weight is.
        """

    def predict(self, weight: Float[Tensor, "out in"], scheme: Scheme, most: int) -> Prediction:
        """Return what branches of rank 0 to `most` are predicted to leave of a weight.

        Args:
            weight: full-precision weight, rows are output channels; any float dtype.
            scheme: formats; the rank of its branch does not matter as long as it can be solved.
            most: largest rank, at most min(out, in).

        Raises:
            FormatError: a weight is NaN or infinite.
            SchemeError: the scheme does not fit the weight.
        """
        weight = prepare_weight(weight, scheme)
        self._require_branch(scheme)
        error = weight - scheme.weight_format.round(weight, "search")
        shares = self._predict_shares(weight, error, scheme)[: most + 1]
        left: list[float] = (frobenius(error).item() ** 2 * shares).tolist()
        return Prediction(frobenius(weight).item() ** 2, tuple(left))

    def _predict_shares(
        self, weight: Float[Tensor, "out in"], error: Float[Tensor, "out in"], scheme: Scheme
    ) -> Float[Tensor, " ranks"]:
        """Return the share of ‖error‖² that a branch of each rank leaves, from rank 0 on.

        By default the rounding error follows what the branch leaves to round: ‖W‖² outside of the
        leading singular directions.
        """
        return tail_energies(weight)

    def _check_branch(self, scheme: Scheme) -> None:
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
        self, stats: ActivationStats | None, weight: Tensor, scheme: Scheme
    ) -> ActivationStats | None:
        """Return statistics as the prepared weight sees its inputs: rotated, on its device."""
        if stats is None and self.use_of_stats == "required":
            raise CalibrationError(
                f"Method '{self.name}' needs activation statistics. Collect them with "
                "`loraq.collect_stats` and give them as `stats` (`--stats`), or use a method "
                "without data, such as 'loraq'."
            )
        if stats is None or self.use_of_stats == "ignored":
            return None
        if stats.width != weight.shape[1]:
            raise CalibrationError(
                f"The statistics are of {stats.width} input channels, the weight has "
                f"{weight.shape[1]}. Those of the same layer are required."
            )
        if self.needs_full_moment and not stats.is_full:
            raise CalibrationError(
                f"Method '{self.name}' needs full second moments, and the statistics have mean "
                "squares only. Collect them with `second_moment=True` (`loraq stats` without "
                "`--mean-squares`)."
            )
        return stats.to(weight.device).rotate(scheme.rotation)


def layer_seed(seed: int, name: str) -> int:
    """Return the seed of one layer, from the recipe's seed and the layer's name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def prepare_weight(weight: Tensor, scheme: Scheme) -> Tensor:
    """Return a weight as contiguous fp32, rotated as the scheme says.

    Raises:
        FormatError: it is not a float weight of 16 bits or more, is not loaded, or not finite.
        SchemeError: the scheme does not fit its shape.
    """
    scheme.check(tuple(weight.shape))
    if weight.is_meta or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        kind = "on the meta device" if weight.is_meta else f"of {weight.dtype}"
        raise FormatError(
            f"Cannot quantize to '{scheme.weight}': the weight is {kind}. Loaded float weights of "
            "16 bits or more are required."
        )
    require_finite(weight, scheme.weight)
    return rotate(weight.detach().float(), scheme.rotation).contiguous()


def quantize_branch(up: Tensor, down: Tensor, branch: Branch, rule: str | None) -> LowRankBranch:
    """Return both factors in the branch's format."""
    fmt = branch.weight_format
    return LowRankBranch(proj_up=fmt.quantize(up, rule), proj_down=fmt.quantize(down, rule))


def output_error(
    weight: Float[Tensor, "out in"],
    main: QTensor,
    branch: LowRankBranch | None,
    stats: ActivationStats,
) -> float:
    """Return √(E‖x (W − Ŵ)ᵀ‖² / E‖x Wᵀ‖²) of what is stored, inputs not rounded.

    With mean squares alone it is that of uncorrelated channels.
    """
    error, double = _error_of(weight, main, branch), torch.float64
    return (
        stats.output_energy(error, double) / (stats.output_energy(weight, double) or 1.0)
    ) ** 0.5


def _error_of(weight: Tensor, main: QTensor, branch: LowRankBranch | None) -> Tensor:
    """Return what main weight and branch leave of a prepared weight, (out, in)."""
    error = weight - main.dequantize()
    return error if branch is None else error.sub_(branch.reconstruct())
