"""What share of a transformer becomes 4-bit under the default rules, and how many bits has a parameter in the file?

Full-size models on the meta device, planned with one recipe: the published configurations of
`published.toml`, then every transformer class that diffusers exports, in the published size or else
in that of its default configuration. Read the last column: it counts everything in the file, kept
layers, biases and norms at 16 bits each. `docs/architectures.md` is made from the same functions.

    python benchmarks/coverage.py [--save]
"""

import math
import tomllib
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import options, report
from loraq.integrations.diffusers import transformer_classes
from loraq.pipeline.plan import Plan
from loraq.recipe import Recipe
from loraq.rules import Rule

#: Parts of other models, which have no size of their own.
PARTS = ("DreamLiteTransformer2DModel", "Transformer2DModel", "TransformerTemporalModel")


@dataclass(frozen=True)
class Coverage:
    """Shares of all parameters of one model."""

    #: Number of parameters.
    parameters: int
    #: Number of linear layers, and of those that are quantized.
    layers: int
    layers_quantized: int
    #: Share in layers that are quantized, weight-only ones included.
    quantized: float
    #: Share in layers that are quantized weight-only.
    weight_only: float
    #: Share in linear layers that are kept.
    kept: float
    #: Bits of the whole file for each parameter.
    bits_per_parameter: float

    @classmethod
    def of(cls, model: nn.Module, recipe: Recipe) -> "Coverage":
        """Plan a model, which may be on the meta device, and count."""
        plan = Plan.of_model(model, recipe)
        total = sum(parameter.numel() for parameter in model.parameters())
        weights = {layer.name: math.prod(layer.shape) for layer in plan.layers}
        quantized = sum(weights[layer.name] for layer in plan.quantized)
        weight_only = [
            layer for layer in plan.quantized if layer.scheme and layer.scheme.activation == "bf16"
        ]
        nbytes = plan.nbytes + 2 * (total - sum(weights.values()))
        return cls(
            parameters=total,
            layers=len(plan.layers),
            layers_quantized=len(plan.quantized),
            quantized=quantized / total,
            weight_only=sum(weights[layer.name] for layer in weight_only) / total,
            kept=(sum(weights.values()) - quantized) / total,
            bits_per_parameter=8 * nbytes / total,
        )


def published() -> dict[str, dict[str, Any]]:
    """Return class and configuration of the published models by their names."""
    return tomllib.loads((Path(__file__).parent / "published.toml").read_text(encoding="utf-8"))


def of_published(recipe: Recipe) -> dict[str, Coverage]:
    """Return the coverage of the published models."""
    classes, covered = transformer_classes(), {}
    for name, entry in published().items():
        rules = tuple(Rule(**rule) for rule in entry.get("rules", ()))
        model = _on_meta(classes[entry["class"]], entry["config"])
        covered[name] = Coverage.of(model, replace(recipe, rules=rules))
    return covered


def of_all_classes(recipe: Recipe) -> dict[str, Coverage]:
    """Return the coverage of every class but `PARTS`, in the size of its first published model or of its default."""
    configs = {entry["class"]: entry["config"] for entry in reversed(published().values())}
    return {
        name: Coverage.of(_on_meta(kind, configs.get(name, {})), recipe)
        for name, kind in transformer_classes().items()
        if name not in PARTS
    }


def _on_meta(kind: type[nn.Module], config: dict[str, Any]) -> nn.Module:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers deprecates parts of its own models
        return kind(**config)


def main() -> None:
    """Print both tables and the JSON line."""
    args = options(__doc__)
    recipe = Recipe.named("default")
    rows: list[dict[str, object]] = []
    for table, covered in (
        ("published", of_published(recipe)),
        ("classes", of_all_classes(recipe)),
    ):
        print(
            f"\n{table:42}{'params':>10}{'layers':>8}{'4-bit':>8}{'wt-only':>9}{'kept':>8}{'bits/param':>12}"
        )
        for name, row in covered.items():
            shares = f"{row.quantized:8.1%}{row.weight_only:9.1%}{row.kept:8.1%}{row.bits_per_parameter:12.3f}"
            print(f"{name:42}{row.parameters / 1e9:9.3f}B{row.layers_quantized:8}{shares}")
            rows.append({"table": table, "model": name, **asdict(row)})
    report(rows, save=args.save)


if __name__ == "__main__":
    main()
