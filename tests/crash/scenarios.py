"""What is killed: every kind of run that writes a folder or a file."""

import json
import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import loraq
import loraq.pipeline.ranks
from loraq.stats import ActivationStats
from tests.integrations.small.pixart import small_pixart

RECIPE = loraq.Recipe.from_dict({**loraq.Recipe.named("mxfp4+w8a8-r8").to_dict(), "method": "lqer"})
OTHER = loraq.Recipe.named("mxfp4-a16")

# Spawned workers would import torch at each of a thousand kills; forked ones make the same calls.
loraq.pipeline.ranks.get_context = lambda _: multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Scenario:
    """A run, and what it begins with."""

    name: str
    #: Makes all that is there before, below a folder.
    prepare: Callable[[Path], None]
    #: Runs below that folder, with a number of workers.
    run: Callable[[Path, int], None]
    #: Name of what is made, in the folder.
    target: str = "out"
    workers: tuple[int, ...] = (1,)


def make_source(root: Path) -> None:
    torch.manual_seed(0)
    layers = nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
    save_file(nn.Sequential(*layers).state_dict(), root / "source.safetensors")


def quantize(root: Path, workers: int, **options) -> None:
    source, recipe = root / "source.safetensors", options.pop("recipe", RECIPE)
    if not source.exists():
        source = root / "source"
    options = {"progress": False, "workers": workers, **options}
    loraq.quantize_checkpoint(source, root / "out", recipe, **options)


def make_old(root: Path) -> None:
    make_source(root)
    quantize(root, 1, recipe=OTHER)


def make_interrupted(root: Path) -> None:
    make_source(root)

    def stop(done: int, *_: object) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        quantize(root, 1, progress=stop)


def make_interrupted_over_old(root: Path) -> None:
    make_interrupted(root)
    partial = root / ".out.partial"
    partial.rename(root / "kept")
    quantize(root, 1, recipe=OTHER)
    (root / "kept").rename(partial)


def overwrite(root: Path, workers: int) -> None:
    quantize(root, workers, overwrite=True)


def make_pipeline(root: Path) -> None:
    place = root / "source"
    small_pixart(num_layers=1).save_pretrained(place / "transformer")
    others = {"scheduler/scheduler_config.json": "{}", "vae/model.bin": "v" * 99}
    for name, content in others.items():
        (place / name).parent.mkdir()
        (place / name).write_text(content)
    components = {name: ["diffusers", "X"] for name in ("transformer", "scheduler", "vae")}
    index = {"_class_name": "PixArtSigmaPipeline", **components}
    (place / "model_index.json").write_text(json.dumps(index))


def make_two(root: Path) -> None:
    make_pipeline(root)
    place = root / "source"
    small_pixart(num_layers=1, attention_head_dim=8).save_pretrained(place / "transformer_2")
    index = json.loads((place / "model_index.json").read_text())
    index["transformer_2"] = ["diffusers", "X"]
    (place / "model_index.json").write_text(json.dumps(index))


def make_old_two(root: Path) -> None:
    make_two(root)
    quantize(root, 1, recipe=OTHER)


def make_interrupted_two(root: Path) -> None:
    make_two(root)

    def stop(done: int, *_: object) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        quantize(root, 1, progress=stop)


def make_old_pipeline(root: Path) -> None:
    make_pipeline(root)
    quantize(root, 1, recipe=OTHER)


def make_absorbed(root: Path) -> None:
    make_pipeline(root)
    loraq.quantize_checkpoint(root / "source", root / "model", RECIPE, progress=False)
    layer, rng = "transformer_blocks.0.attn1.to_q", torch.Generator().manual_seed(1)
    down, up = torch.randn(4, 32, generator=rng), torch.randn(32, 4, generator=rng)
    lora = {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
    save_file(lora, root / "style.safetensors")


def make_absorbed_over_old(root: Path) -> None:
    make_absorbed(root)
    quantize(root, 1, recipe=OTHER)


def absorb(root: Path, _: int) -> None:
    model, lora, source = root / "model", root / "style.safetensors", root / "source"
    target = root / "out"
    loraq.absorb_lora(model, lora, source, target=target, overwrite=True, progress=False)


def save(root: Path, _: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    loraq.quantize_(model, RECIPE, progress=False)
    loraq.save(model, root / "out", shard_bytes=1000, overwrite=True)


def save_pretrained(root: Path, _: int) -> None:
    model = small_pixart(num_layers=1)
    loraq.quantize_(model, RECIPE, progress=False)
    model.save_pretrained(root / "out")


def save_stats(root: Path, _: int) -> None:
    loraq.save_stats({"a": ActivationStats(7, torch.eye(8))}, root / "out.safetensors")


def make_old_stats(root: Path) -> None:
    loraq.save_stats({"b": ActivationStats(5, torch.ones(8))}, root / "out.safetensors")


SCENARIOS = (
    Scenario("fresh", make_source, quantize, workers=(1, 2)),
    Scenario("resumed", make_interrupted, quantize, workers=(1, 2)),
    Scenario("overwriting", make_old, overwrite, workers=(1, 2)),
    Scenario("resumed overwriting", make_interrupted_over_old, overwrite, workers=(1, 2)),
    Scenario("pipeline", make_pipeline, quantize, workers=(1, 2)),
    Scenario("overwriting pipeline", make_old_pipeline, overwrite, workers=(1, 2)),
    Scenario("two transformers", make_two, quantize, workers=(1, 2)),
    Scenario("two transformers, resumed", make_interrupted_two, quantize),
    Scenario("two transformers, overwriting", make_old_two, overwrite),
    Scenario("absorbing", make_absorbed, absorb),
    Scenario("absorbing, overwriting", make_absorbed_over_old, absorb),
    Scenario("saving", lambda root: None, save),
    Scenario("saving, overwriting", make_old, save),
    Scenario("save_pretrained", lambda root: None, save_pretrained),
    Scenario("saving statistics", lambda root: None, save_stats, "out.safetensors"),
    Scenario("statistics, overwriting", make_old_stats, save_stats, "out.safetensors"),
)
