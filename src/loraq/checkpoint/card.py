"""The model card of a quantized folder: what it is, how it is loaded, what it takes."""

import json
from collections import Counter
from math import prod
from pathlib import Path

from loraq.checkpoint.inspect import count_stored
from loraq.checkpoint.manifest import Manifest
from loraq.json_files import read_json
from loraq.scheme import Scheme
from loraq.version import __version__

#: Its name, which model hubs show.
FILE_NAME = "README.md"
_MIB = 2**20


def describe_folder(folder: Path, repository: str) -> str:
    """Return the text of a model's card, in Markdown with the hub's front matter.

    Args:
        folder: of a quantized model with a configuration.
        repository: name under which it will be loaded.

    Raises:
        CheckpointError: the folder is not a quantized one.
    """
    manifest = Manifest.read(folder, verify=False)
    config = read_json(folder / "config.json")
    of_diffusers = "_class_name" in config
    model_class = config["_class_name"] if of_diffusers else config["architectures"][0]
    library = "diffusers" if of_diffusers else "transformers"
    numbers, nbytes = count_stored(folder, manifest)
    scratch = 2 * max(prod(layer.shape[-2:]) for layer in manifest.layers.values())
    made = [layer for layer in manifest.layers.values() if not layer.is_kept]
    name = json.dumps(repository)
    lines = [
        "---",
        f"library_name: {library}",
        "tags: [loraq, quantization, 4-bit]",
        "---",
        f"# {model_class}, quantized by loraq",
        "",
        f"Each linear layer is a packed weight and a quantized low-rank branch (LoRaQ, "
        f"[arXiv 2604.18117](https://arxiv.org/abs/2604.18117)), written by loraq {__version__}.",
        "",
        "```python",
        f"import loraq.{library}",
        "import torch",
        f"from {library} import {model_class}",
        "",
        f"model = {model_class}.from_pretrained({name}, torch_dtype=torch.bfloat16)",
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| layers | {_name(scheme)}: {n} |" for scheme, n in _count_schemes(manifest)),
        *_describe_recipes(manifest),
        f"| parameters | {numbers:,}, {8 * nbytes / max(1, numbers):.2f} bits each, all counted |",
        f"| files | {nbytes / _MIB:.1f} MiB; in 16 bits {2 * numbers / _MIB:.1f} MiB |",
        f"| memory when it runs | {nbytes / _MIB:.1f} MiB, and {scratch / _MIB:.1f} MiB for the "
        "layer that is running; activations not counted |",
    ]
    errors = [layer.record["relative_error"] for layer in made if "relative_error" in layer.record]
    if errors:
        lines.append(
            f"| relative error of the 4-bit weights | mean {sum(errors) / len(errors):.4f}, "
            f"largest {max(errors):.4f} |"
        )
    kept = len(manifest.layers) - len(made)
    lines += [
        "",
        f"{kept} layers are kept in 8 bits by the rules of the class. "
        "`loraq inspect` shows every layer, and whether all is whole.",
        "",
    ]
    return "\n".join(lines)


def _count_schemes(manifest: Manifest) -> list[tuple[Scheme, int]]:
    return Counter(layer.scheme for layer in manifest.layers.values()).most_common(8)


def _name(scheme: Scheme) -> str:
    branch = scheme.branch
    beside = f" + branch of rank {branch.rank} in {branch.weight}" if branch else ""
    return f"{scheme.weight}{beside}, activations {scheme.activation}"


def _describe_recipes(manifest: Manifest) -> list[str]:
    return [
        f"| made with | method {recipe['method']}, effort {recipe['effort']}, "
        f"seed {recipe['seed']}, budget {recipe['budget']} |"
        for recipe in manifest.recipes
    ]
