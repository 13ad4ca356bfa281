"""Which files of a folder are the weights: those that the Hugging Face libraries would read.

    diffusion_pytorch_model.safetensors                        one file
    diffusion_pytorch_model.safetensors.index.json             shards, named by their index
    diffusion_pytorch_model.fp16.safetensors                   one file, of the variant "fp16"
    diffusion_pytorch_model.safetensors.index.fp16.json        shards of the variant "fp16"

A lone file may have any other name. Hidden files are no weights: macOS, for example, writes one
with the prefix `._` beside every file that it copies.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from loraq.errors import CheckpointError, list_some
from loraq.json_files import read_json
from loraq.regular_file import is_plain_name

#: Names that loaders look for, the first that is there.
_STEMS = ("diffusion_pytorch_model", "model")
_SHARD = r"-\d{5}-of-\d{5}"
#: Some libraries write the variant behind the number of the shard.
_FILE = re.compile(
    rf"(?P<stem>{'|'.join(_STEMS)})(\.(?P<variant>[\w-]+?))?({_SHARD}(\.(?P<late>[\w-]+))?)?"
    r"\.safetensors"
)
_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(\.(?P<variant>[\w-]+))?\.json")
#: Weights that are not read: pickles, which may run code of their own, and other formats.
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.msgpack", "*.h5")
#: Patterns of all names of weight files.
WEIGHT_FILES = ("*.safetensors*", *_OTHER_FORMATS)


@dataclass(frozen=True)
class Weights:
    """The files of one copy of a model's weights."""

    files: tuple[str, ...]
    #: Names the file of every tensor; `None` for a single file.
    index: Path | None = None
    #: Such as "fp16"; "" for files whose name says none.
    variant: str = ""
    #: The other variants that the folder holds.
    others: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """What a user should know of the choice; empty if there was none."""
        if not self.others:
            return ""
        others = ", ".join(_describe(variant) for variant in self.others)
        return (
            f"The weights of {_describe(self.variant)} are used; the folder also holds those of "
            f"{others} (`--variant`)."
        )


def select_weights(folder: Path, variant: str | None = None) -> Weights:
    """Choose among the weight files of a folder, without opening one.

    Args:
        folder: with one safetensors file, or with shards and their index, or with several of these
            as variants.
        variant: the one to take. `None` takes the files whose name says none, or else the only
            variant.

    Raises:
        CheckpointError: there are no weights, not of this variant, or several to choose from.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"'{folder}' is not a folder. A folder with safetensors files is required."
        )
    indexes = _by_variant(_visible(folder, "*.safetensors.index*.json"), _INDEX)
    names = _visible(folder, "*.safetensors")
    known = [name for name in names if is_model_weights(name)]
    # LoRAs, for example, may lie beside a model's weights; a lone file may have any name.
    files = _by_variant(known if known or indexes else names, _FILE)
    found = sorted({*indexes, *files})
    if not found:
        raise CheckpointError(f"'{folder}' has no .safetensors file. {_explain_others(folder)}")
    if variant is None and found[0] and len(found) > 1:
        raise CheckpointError(
            f"'{folder}' has the variants {', '.join(found)} and no plain weights. Choose one with "
            "`--variant` (`variant=`)."
        )
    chosen = found[0] if variant is None else variant
    if chosen not in found:
        raise CheckpointError(
            f"'{folder}' has no weights of the variant '{chosen}', but of "
            f"{', '.join(map(_describe, found))}. Choose one of these."
        )
    others = tuple(name for name in found if name != chosen)
    if chosen not in indexes:
        return Weights((_only(folder, files[chosen]),), None, chosen, others)
    if len(indexes[chosen]) > 1:
        raise CheckpointError(
            f"'{folder}' has {len(indexes[chosen])} index files: {list_some(indexes[chosen])}. "
            "Keep one."
        )
    index = folder / indexes[chosen][0]
    return Weights(tuple(sorted({*read_weight_map(index).values()})), index, chosen, others)


def may_hold_weights(place: Path) -> bool:
    """Return whether there is a file, or a folder with one, of weights of any format."""
    return place.is_file() or any(_visible(place, pattern) for pattern in WEIGHT_FILES)


def is_model_weights(name: str) -> bool:
    """Return whether a loader would take a file of this name for a model's weights."""
    return _FILE.fullmatch(name) is not None


def read_weight_map(index: Path) -> dict[str, str]:
    """Return the file of every tensor that an index names.

    Raises:
        CheckpointError: the index cannot be read, or names anything but files beside it.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise CheckpointError(
            f"'{index}' has no usable 'weight_map'. It must map tensor names to file names."
        )
    if not weight_map:
        raise CheckpointError(f"'{index}' names no .safetensors file. Download it again.")
    for file in weight_map.values():
        if not is_plain_name(file) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"'{index}' names the file '{file}'. Only .safetensors files beside the index are "
                "read."
            )
    return weight_map


def _visible(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.glob(pattern) if not path.name.startswith("."))


def _by_variant(names: list[str], pattern: re.Pattern[str]) -> dict[str, list[str]]:
    """Return names by the variant that they say; "" for names of another kind."""
    found: dict[str, list[str]] = {}
    for name in names:
        said = match.groupdict() if (match := pattern.fullmatch(name)) else {}
        found.setdefault(said.get("variant") or said.get("late") or "", []).append(name)
    return found


def _only(folder: Path, files: list[str]) -> str:
    """Return the file of a variant that has no index, the one that loaders look for first.

    Raises `CheckpointError` unless it is clear which one.
    """
    stems = [match["stem"] for name in files if (match := _FILE.fullmatch(name))]
    first = min(stems, key=_STEMS.index, default="")
    files = [name for name in files if name.startswith(first)]
    if len(files) == 1:
        return files[0]
    raise CheckpointError(
        f"'{folder}' has {len(files)} weight files and no index: {list_some(files)}. Keep one, or "
        "add the missing '.safetensors.index.json'."
    )


def _explain_others(folder: Path) -> str:
    others = [name for pattern in _OTHER_FORMATS for name in _visible(folder, pattern)]
    if not others:
        return "Other weight files are not read."
    return (
        f"Other weight files are not read, because pickles can run code of their own: "
        f"{list_some(others, most=3)}. Load it with diffusers (`from_pretrained(…, "
        "use_safetensors=False)`), save it with `save_pretrained`, and start from that folder."
    )


def _describe(variant: str) -> str:
    return f"variant '{variant}'" if variant else "no variant"
