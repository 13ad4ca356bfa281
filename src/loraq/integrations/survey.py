"""How large the components of a pipeline are, and which of them are worth quantizing too."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from loraq.checkpoint.model_index import Component
from loraq.errors import CheckpointError, LoraqError
from loraq.pipeline.counting import ComponentSize
from loraq.pipeline.plan import Plan
from loraq.safetensors.header import FLOATS
from loraq.safetensors.reader import ShardReader
from loraq.safetensors.selection import WEIGHT_FILES

#: A text encoder is recommended if it has this share of the bytes of what is quantized.
LARGE = 0.5


def survey(
    components: Mapping[str, Component],
    plans: Mapping[str, Plan],
    plan_left: Callable[[Component], Plan],
    variant: str | None = None,
) -> tuple[tuple[ComponentSize, ...], list[str]]:
    """Measure the models of a pipeline, in the order of its index.

    Args:
        components: those that it names.
        plans: of those that are quantized.
        plan_left: plans one that is not, if that can be done.
        variant: which of several copies of the weights counts.

    Returns:
        Their sizes, and advice for the user: sentences.
    """
    sizes, reasons = [], {}
    for name, part in components.items():
        if not part.is_model:
            continue
        before, after, if_quantized = _measure(part.folder, variant), None, None
        if name in plans:
            before, after = _apply(plans[name], before)
        elif part.is_text_encoder and not part.is_quantized:
            try:
                before, if_quantized = _apply(plan_left(part), before)
            except LoraqError as error:
                reasons[name] = str(error)
        sizes.append(ComponentSize(name, part.class_name, before, after, if_quantized))
    quantized = [size for size in sizes if size.nbytes is not None]
    total = sum(size.nbytes_bf16 for size in quantized)
    advice = []
    for size in sizes:
        part = components[size.name]
        is_left = size.nbytes is None and part.is_text_encoder and not part.is_quantized
        if is_left and total and size.nbytes_bf16 >= LARGE * total:
            names = ",".join([*(each.name for each in quantized), size.name])
            than = quantized[0].name if len(quantized) == 1 else "all that is quantized"
            then = (
                f"`--components {names}` would make it {_gigabytes(size.if_quantized)}."
                if size.if_quantized is not None
                else f"It cannot be quantized as it is: {reasons[size.name]}"
            )
            advice.append(
                f"{part}: {_gigabytes(size.nbytes_bf16)} in bf16, {size.nbytes_bf16 / total:.1f} "
                f"times {than}. {then}"
            )
    return tuple(sizes), advice


def _apply(plan: Plan, nbytes: int) -> tuple[int, int]:
    """Return the bytes of a model in bf16 and after a plan, from those of its files.

    Of a configuration without weights these are 0, and the plan counts.
    """
    before = nbytes or 2 * plan.parameters
    return before, before + plan.nbytes - plan.nbytes_bf16


def _measure(folder: Path, variant: str | None) -> int:
    """Return the bytes of a model's tensors in bf16; of its files where these cannot be read."""
    for asked in (variant, None):
        try:
            files = ShardReader(folder, asked).files
        except CheckpointError:
            continue
        return sum(
            2 * math.prod(spec.shape) if spec.dtype in FLOATS else spec.nbytes
            for header in files.values()
            for spec in header.specs.values()
        )
    found = {path for pattern in WEIGHT_FILES for path in folder.glob(pattern)}
    return sum(path.stat().st_size for path in found if path.is_file())


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.3g} MB"
