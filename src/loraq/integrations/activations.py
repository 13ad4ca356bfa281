"""How precisely activations run, for a whole model, and step by step of a pipeline."""

from typing import Annotated, Any

from torch import nn

from loraq.errors import LoraqError
from loraq.families import family_rules, known_class
from loraq.layers import bare_model, quantized_layers
from loraq.options import Range, checked
from loraq.precision import require_precision


@checked
def set_activations(model: nn.Module, precision: str, *, simulate: bool = False) -> None:
    """Choose how precisely the activations of every quantized layer of a model run.

    The same stored bytes serve all precisions. Where the device, or the back end that is asked for,
    has no product of so few bits, rounding activations would cost time and precision and gain
    nothing: the layer runs in 16 bits there. Layers that the recipe made weight-only for what they
    are, such as modulations, and those that their class keeps always do.

    Args:
        model: with quantized layers.
        precision: "stored", which is what the recipe said, and what every new layer does; or "a16",
            "a8", "a4".
        simulate: whether activations are rounded nevertheless, as a device with such a product
            would round them: to measure what it costs.

    Raises:
        KernelError: there is no such precision; no layer is switched then.
        LoraqError: the model has no quantized layer.
    """
    layers = quantized_layers(model)
    if not layers:
        raise LoraqError(
            f"{type(model).__name__} has no quantized layer, whose activations could be rounded. "
            "Quantize it first: `loraq.quantize_`."
        )
    require_precision(precision)  # before the first layer is switched
    names = [kind.__name__ for kind in type(bare_model(model)).__mro__]
    rules = [rule for rule in family_rules(known_class(names)) if rule.weight_only]
    is_mixed = any(not layer.scheme.is_weight_only for layer in layers.values())
    for name, layer in layers.items():
        is_kept = layer.record.get("kept", False)
        is_special = is_mixed or is_kept or any(rule.matches(name) for rule in rules)
        stays = layer.scheme.is_weight_only and is_special
        layer.ask_activations("a16" if stays else precision, simulate=simulate)


class ActivationSchedule:
    """Runs the first and the last steps of a pipeline more precisely than those between.

    A callback for `callback_on_step_end` of diffusers' pipelines. The first steps decide what the
    image shows and the last ones its details; between them errors are forgiven.

    Example:
        `pipe(prompt, callback_on_step_end=loraq.ActivationSchedule(pipe, "a8", first=2, last=2))`
    """

    @checked
    def __init__(
        self,
        pipeline: Any,
        inner: str = "a8",
        *,
        outer: str = "a16",
        first: Annotated[int, Range(0)] = 1,
        last: Annotated[int, Range(0)] = 1,
        simulate: bool = False,
    ) -> None:
        """Set the model to the precision of the first step.

        Args:
            pipeline: of diffusers; every quantized model in it is switched.
            inner: precision of the steps between, as for `set_activations`.
            outer: precision of the first and the last steps.
            first: steps at the beginning that run in `outer`.
            last: steps at the end that run in `outer`.
            simulate: as for `set_activations`.

        Raises:
            KernelError: there is no such precision.
            LoraqError: the pipeline has no quantized model.
        """
        components = getattr(pipeline, "components", {})
        self._models = [
            part
            for part in components.values()
            if isinstance(part, nn.Module) and quantized_layers(part)
        ]
        if not self._models:
            raise LoraqError(
                f"{type(pipeline).__name__} holds no quantized model. Give a pipeline with one, "
                "and quantize it first: `loraq.quantize_(pipeline)`."
            )
        self.inner, self.outer, self.simulate = inner, outer, simulate
        self.first, self.last = first, last
        self._run_at(inner)  # an unknown one is refused now
        self._run_at(self._precision(0, first + last + 1))

    def __call__(
        self, pipeline: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Switch to the precision of the next step; after the last one, to that of the first."""
        n_steps = pipeline.num_timesteps
        following = step + 1 if step + 1 < n_steps else 0
        self._run_at(self._precision(following, n_steps))
        return callback_kwargs

    def _precision(self, step: int, n_steps: int) -> str:
        is_outer = step < self.first or step >= n_steps - self.last
        return self.outer if is_outer else self.inner

    def _run_at(self, precision: str) -> None:
        for model in self._models:
            set_activations(model, precision, simulate=self.simulate)
