"""What became of a layer, and of a model: plain data for the caller and for the manifest."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from loraq.pipeline.plan import Plan
from loraq.recipe import Recipe
from loraq.scheme import Scheme


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer; plain data, stored in the manifest."""

    name: str
    #: (out, in), or (experts, out, in).
    shape: tuple[int, ...]
    scheme: Scheme
    #: ‖W − Ŵ‖_F / ‖W‖_F; of a stack the root of the mean square of its experts'.
    relative_error: float
    sqnr_db: float
    bits_per_weight: float
    #: Bytes stored for the weight.
    nbytes: int
    #: Wall time of the solver.
    seconds: float
    #: SHA-256 of the float weight's bytes, in its own dtype.
    source_sha256: str
    #: That dtype, as safetensors calls it.
    source_dtype: str
    #: SHA-256 of the statistics that were used; empty for none.
    stats_sha256: str = ""
    #: The same ratio of the layer's outputs, activations not rounded, by the statistics; `None`
    #: without any.
    output_error: float | None = None
    #: What else the method measured; not stored.
    metrics: Mapping[str, float] = field(default_factory=dict)
    #: Whether the rules keep it out of the recipe's scheme.
    kept: bool = False
    #: Whether it is not smoothed although its scheme says so: all factors are 1.
    unsmoothed: bool = False
    #: Kind of the device that solved it, such as "cpu": another gives other bytes.
    device: str = "cpu"

    def record(self) -> dict[str, float | int | str]:
        """Return what a checkpoint keeps besides shape and scheme, equal in every run."""
        names = (
            "relative_error",
            "output_error",
            "bits_per_weight",
            "nbytes",
            "source_sha256",
            "source_dtype",
            "stats_sha256",
            "device",
        )
        found = {name: value for name in names if (value := getattr(self, name)) not in ("", None)}
        return found | {name: True for name in ("kept", "unsmoothed") if getattr(self, name)}


@dataclass(frozen=True)
class Report:
    """What became of a model, or of several models of a pipeline."""

    recipe: Recipe
    plan: Plan
    layers: tuple[LayerReport, ...]
    #: How many of them an interrupted run had finished before.
    kept: int = 0
    #: Whether the target was whole before, made by the same settings from the same numbers.
    already_complete: bool = False
    #: Of a pipeline of which several models were quantized: the report of each, by component.
    components: Mapping[str, "Report"] = field(default_factory=dict)

    @classmethod
    def join(cls, reports: Mapping[str, "Report"], notes: tuple[str, ...] = ()) -> "Report":
        """Return the report of several models, as `Plan.join` joins their plans."""
        plan = Plan.join({name: report.plan for name, report in reports.items()}, notes)
        first, *others = reports.values()
        if not others:
            return replace(first, plan=plan)
        layers = tuple(
            replace(layer, name=f"{component}/{layer.name}")
            for component, report in reports.items()
            for layer in report.layers
        )
        kept = sum(report.kept for report in reports.values())
        is_complete = all(report.already_complete for report in reports.values())
        return cls(first.recipe, plan, layers, kept, is_complete, dict(reports))

    @property
    def n_unsmoothed(self) -> int:
        """How many layers are not smoothed although their scheme says so."""
        return sum(layer.unsmoothed for layer in self.layers)

    @property
    def mean_relative_error(self) -> float:
        """Mean of the relative errors of the layers that have the recipe's scheme."""
        errors = [layer.relative_error for layer in self.layers if not layer.kept]
        return sum(errors) / max(1, len(errors))

    @property
    def mean_output_error(self) -> float | None:
        """Mean of the output errors of the layers that had statistics; `None` if none had."""
        known = [layer.output_error for layer in self.layers if layer.output_error is not None]
        return sum(known) / len(known) if known else None
