"""Does a LoRA do on a quantized model what it does on the float one: on top, appended or absorbed?

    python -m benchmarks.quality.lora --save     # 5 minutes on one core; needs "loraq[lora,demo]"

The trained digits transformer, and a LoRA of rank 8 on its attention and feed-forward layers that
is trained here, on digits in negative (`--steps` of it). The reference is the float model with the
LoRA's product added to its weights. `change error` is ‖Δ_quantized − Δ_float‖ / ‖Δ_float‖, Δ being
what the LoRA does to the velocity; `output error` is that of the quantized model without any LoRA,
which the change error has to be read against. `product` is the mean over the layers of ‖ΔW − U D‖ /
‖ΔW‖, where the LoRA is stored by itself. `forward` is one pass of 256 images, against that of the
quantized model without the LoRA, and `bytes` what the model takes more than without it: a layer
that is kept in fp32 here, and holds bf16 numbers, shrinks when a LoRA is appended to it.
"""

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loraq
from benchmarks.record import options, report
from loraq.evaluation import digits, flow
from loraq.integrations.adapters import register_adapters
from loraq.integrations.lora import Lora
from loraq.layers import quantized_layers
from loraq.recipe import Recipe

#: Every precision of the branch, one recipe without a branch, and INT8 rows.
RECIPES = (
    "mxfp4-a8+bf16",
    "mxfp4-a8+w8a8",
    "mxfp4-a8+w6a8",
    "mxfp4-a8+w4a8",
    "int4-a8+int8",
    "mxfp4-a16+w8a8",
    "mxfp4-a8",
)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def adapt(model: nn.Module) -> nn.Module:
    """Put an untrained LoRA on a model, quantized or not."""
    register_adapters()
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS)
    peft.inject_adapter_in_model(config, model)  # type: ignore[arg-type]
    return model


def train(file: Path, steps: int) -> None:
    """Train a LoRA of the float model on digits in negative, and write it."""
    torch.manual_seed(0)
    model = adapt(digits.load_transformer(torch.float32))
    images, labels = digits.real_digits()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, 2e-3)
    for _ in range(steps):
        chosen, times = torch.randint(len(images), (32,)), torch.rand(32)
        noise, wanted = torch.randn(32, 1, 8, 8), -images[chosen]
        noised = flow.interpolate(wanted, noise, times)
        velocity = digits.predict_velocity(model, noised, times, labels[chosen])
        loss = (velocity - (wanted - noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = peft.get_peft_model_state_dict(model)  # type: ignore[arg-type]
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)


def load_on_top(model: nn.Module, file: Path) -> None:
    """Load the LoRA as an adapter in floats."""
    peft.set_peft_model_state_dict(adapt(model), load_file(file))  # type: ignore[arg-type]


def fuse(model: nn.Module, file: Path) -> None:
    """Add the LoRA's product to float weights."""
    for name, adapter in Lora.read(file).adapters.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        layer.weight.data += adapter.delta()


def relative(difference: Tensor, reference: Tensor) -> float:
    """Return the norm of a difference as a share of a reference's."""
    return (difference.norm() / reference.norm()).item()


def nbytes(model: nn.Module) -> int:
    """Return the bytes of all parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())


def fastest(model: nn.Module, repeats: int) -> float:
    """Return the seconds of one pass."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        digits.velocity_probe(model)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def measure(name: str, source: Path, file: Path, change: Tensor, repeats: int) -> list[Any]:
    """Return a row for each way to use the LoRA on one recipe."""
    plain = digits.load_transformer(torch.float32)
    exact = digits.velocity_probe(plain)
    loraq.quantize_(plain, replace(Recipe.named(name), effort="fast"), progress=False)
    before, alone = digits.velocity_probe(plain), fastest(plain, repeats)
    products: dict[str, float] = {}

    def append(model: nn.Module) -> None:
        appended = loraq.append_lora(model, file, progress=False)
        products["append"] = mean(factors.relative_error for factors in appended.factors)

    ways: dict[str, Callable[[nn.Module], object]] = {
        "on top": lambda model: load_on_top(model, file),
        "append": append,
        "absorb": lambda model: loraq.absorb_lora(model, file, source, progress=False),
    }
    rows = []
    for way, put in ways.items():
        model = copy.deepcopy(plain)
        begin = time.perf_counter()
        put(model)
        seconds = time.perf_counter() - begin
        ours = digits.velocity_probe(model) - before
        rows.append(
            {
                "recipe": name,
                "way": way,
                "output_error": relative(before - exact, exact),
                "change_error": relative(ours - change, change),
                "product_error": products.get(way),
                "bytes": nbytes(model) - nbytes(plain),
                "bytes_before": nbytes(plain),
                "seconds": seconds,
                "forward": fastest(model, repeats) / alone,
                "layers": len(quantized_layers(model)),
            }
        )
        print(
            f"{name:16} {way:8} {rows[-1]['output_error']:12.4f} {rows[-1]['change_error']:12.4f}"
            f" {products.get(way, float('nan')):10.4f} {rows[-1]['bytes']:9} {seconds:8.1f}"
            f" {rows[-1]['forward']:8.2f}",
            flush=True,
        )
    return rows


def main() -> None:
    """Print one row for each recipe and way."""
    chosen = options(
        __doc__,
        steps=(60, "steps of training the LoRA (default: 60)"),
        lora=("", "file to keep the trained LoRA in, which a later run reads"),
        recipes=(RECIPES, "recipes to measure (default: every precision of the branch)"),
    )
    with tempfile.TemporaryDirectory() as place:
        file = Path(chosen.lora or Path(place) / "negative.safetensors")
        if not file.exists():
            train(file, chosen.steps)
        model = digits.load_transformer(torch.float32)
        exact = digits.velocity_probe(model)
        fuse(model, file)
        change = digits.velocity_probe(model) - exact
        share = relative(change, exact)
        print(f"The LoRA changes the float model's velocity by {share:.3f} of its norm.\n")
        print("recipe           way      output error change error    product  bytes  s  forward")
        source = digits.transformer_folder()
        rows = [
            row | {"change": share}
            for name in chosen.recipes
            for row in measure(name, source, file, change, chosen.repeats)
        ]
    report(rows, save=chosen.save)


if __name__ == "__main__":
    main()
