"""The model card that a quantized model takes along to the hub.

`push_to_hub` of diffusers and of transformers puts a card into the folder that they upload: that of
the repository, or a template where it has none. The template is replaced here, just before the
library uploads the folder, by what the folder says of itself. That stands between two marks and is
written anew by the next push; everything else in a card is its owner's, and a card without the
marks stays as it is.
"""

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from loraq import disk
from loraq.checkpoint.summary import Summary, describe
from loraq.figures import number, size_of
from loraq.layers import quantized_layers
from loraq.version import __version__

#: Its name, which the hub shows.
FILE_NAME = "README.md"
BEGIN = "<!-- loraq: push_to_hub writes what stands from here to the end mark -->"
END = "<!-- loraq: end -->"
#: What uploads a folder in diffusers and in transformers, once the card is in it.
_UPLOADS = ("_upload_folder", "_upload_modified_files")
#: The line that both libraries give their template.
_TEMPLATE = re.compile(r"^.*This model card has been automatically generated\.$", re.MULTILINE)
#: Schemes that are listed, the most frequent first: ranks that were shared out may be many.
_MOST_SCHEMES = 8


def attach_card(model: nn.Module) -> None:
    """Let a quantized model's own `push_to_hub` describe the model in the card that it uploads.

    So do the models in it. One that cannot be pushed, or has no quantized layers, is left as it is.
    """
    for part in model.modules():
        names = [name for name in _UPLOADS if callable(getattr(type(part), name, None))]
        if names and quantized_layers(part):
            for name in names:
                setattr(part, name, partial(_upload, part, name))


def _upload(
    model: Any, name: str, working_dir: str, repo_id: str, *positional: Any, **named: Any
) -> Any:
    """Fill the card of a folder, and upload the folder as the library does."""
    fill_card(Path(working_dir), repo_id)
    return getattr(type(model), name)(model, working_dir, repo_id, *positional, **named)


def fill_card(folder: Path, repository: str) -> None:
    """Describe a quantized model in the card that lies beside it, unless the card is its owner's.

    Args:
        folder: what is uploaded; without a card, as of a model in a subfolder, it is left alone.
        repository: where to, which the card says how to load.

    Raises:
        CheckpointError: the folder is not a quantized model's.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return
    text = path.read_bytes().decode()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        text = before + _write_section(folder, repository) + after
    elif (card := _read_template(text)) is not None:
        card.text = f"\n# {repository}\n\n{_write_section(folder, repository)}\n"
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), "loraq", "quantized"]))
        text = str(card)
    disk.write_file(path, text.encode())


def _read_template(text: str) -> Any:
    """Return the card of a text that is, word for word, what a library makes where there is none.

    `None` for any other.
    """
    said = _TEMPLATE.search(text)
    if said is None:
        return None
    from huggingface_hub import ModelCard, ModelCardData

    card = ModelCard(text)
    template = ModelCard.from_template(ModelCardData(), model_description=said[0])
    return card if card.text.strip() == template.text.strip() else None


def _write_section(folder: Path, repository: str) -> str:
    """Return the part of a card that is ours, in Markdown, with its marks."""
    summary = Summary.read(folder)
    library = "diffusers" if "_class_name" in summary.config else "transformers"
    name = summary.class_name
    has_branches = any(layer.scheme.branch for layer in summary.made.values())
    rows = [
        *_describe_recipes(summary),
        *_describe_layers(summary),
        ("relative error of the weights", _describe_errors(summary)),
        (
            "size",
            f"{size_of(summary.nbytes)}, {summary.effective_bits:.2f} bits for each of "
            f"{summary.parameters:,} parameters, everything counted; in 16 bits "
            f"{size_of(2 * summary.parameters)}",
        ),
        (
            "memory when it runs",
            f"{size_of(summary.nbytes + summary.scratch)}: packed, and one layer at a time "
            "decoded; activations are not counted",
        ),
    ]
    return "\n".join(
        [
            BEGIN,
            f"`{name}`, quantized by loraq {__version__}: each linear layer is a packed weight"
            + (" and a low-rank branch" if has_branches else "")
            + " ([LoRaQ](https://arxiv.org/abs/2604.18117)).",
            "",
            "```python",
            '# pip install "loraq[diffusers]"',
            "import torch",
            f"from {library} import {name}",
            "",
            f"import loraq.{library}",
            "",
            f"model = {name}.from_pretrained({json.dumps(repository)}, dtype=torch.bfloat16)",
            "```",
            "",
            "| | |",
            "|---|---|",
            *(f"| {what} | {value} |" for what, value in rows),
            "",
            "`loraq inspect` shows every layer, and whether all is whole.",
            END,
        ]
    )


def _describe_recipes(summary: Summary) -> list[tuple[str, str]]:
    rows = [
        ("made with", f"method {each['method']}, effort {each['effort']}, seed {each['seed']}")
        for each in summary.manifest.recipes
        if {"method", "effort", "seed"} <= each.keys()
    ]
    if n := sum("stats_sha256" in layer.record for layer in summary.manifest.layers.values()):
        rows.append(("statistics of the inputs", f"used for {n} layers"))
    return rows


def _describe_layers(summary: Summary) -> list[tuple[str, str]]:
    """Return how layers are stored, how often; and what the rules of the class kept in 8 bits."""
    counted = Counter(describe(layer.scheme) for layer in summary.made.values())
    rows = [(f"{n} layers", stored) for stored, n in counted.most_common(_MOST_SCHEMES)]
    if others := sum(counted.values()) - sum(n for _, n in counted.most_common(_MOST_SCHEMES)):
        rows.append((f"{others} layers", "the same formats with other ranks, or others"))
    if kept := len(summary.manifest.layers) - len(summary.made):
        rows.append((f"{kept} layers", "kept in 8 bits by the rules of the class"))
    return rows


def _describe_errors(summary: Summary) -> str:
    if summary.mean_error is None:
        return "not noted"
    mean, largest = number(summary.mean_error), number(max(summary.made_errors))
    return f"mean {mean}, largest {largest} (‖W − Ŵ‖ / ‖W‖)"
